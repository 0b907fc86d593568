"""Merchants' requests after the charge: captures, cancellations, refunds, evidence.

Each merchant's agent reads its feed, `GET /v1/events`, and acts on the events. A missing event would leave an action
undone, so the run also exercises the feed.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from app.local.demo.merchants import USUAL_TOKENS, Order

POLL_SECONDS = 0.3
RETRY_SECONDS = 0.5
PAGE_LIMIT = 100

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlannedAction:
    """A request of a merchant about a payment, and the events that trigger it."""

    share: float
    """Of all payments; at least one payment."""
    on: tuple[str, ...]
    """Types of the events that trigger it."""
    path: str
    """The path of the request, with the payment's `{id}` and the dispute's `{dispute}`."""
    evidence: str | None = None
    """The text of the evidence; the sandbox decides disputes by it."""
    tenths: int | None = None
    """The amount in tenths of the payment's; None: the request names none, which means all."""
    until: str | None = None
    """Type of the event that completes it, if the answer does not."""
    special: Json = field(default_factory=dict)
    """Parameters that such a payment is created with."""

    def body(self, amount_minor: int) -> Json:
        """The body of the request about a payment of so many minor units."""
        if self.evidence is not None:
            return {"evidence": {"uncategorized_text": self.evidence}, "submit": True}
        return {} if self.tenths is None else {"amount": amount_minor * self.tenths // 10}


HELD = ("payment.authorized",)
PAID = ("payment.confirmed", "payment.settled")
DISPUTED = ("payment.disputed",)
EVIDENCE = "/v1/disputes/{dispute}/evidence"
MANUAL: Json = {"capture_method": "manual"}


def paid_by(token: str) -> Json:
    """The parameters of a payment by this test card."""
    return {"payment_method": {"type": "card", "token": token}}


PLANNED_ACTIONS = (
    PlannedAction(0.03, HELD, "/v1/payments/{id}/capture", special=MANUAL),
    PlannedAction(0.02, HELD, "/v1/payments/{id}/capture", tenths=7, special=MANUAL),
    PlannedAction(0.01, HELD, "/v1/payments/{id}/cancel", special=MANUAL),
    PlannedAction(0.03, PAID, "/v1/payments/{id}/refunds"),
    PlannedAction(0.03, PAID, "/v1/payments/{id}/refunds", tenths=3),
    PlannedAction(
        0.005, PAID, "/v1/payments/{id}/refunds", special=paid_by("pm_card_refundFail"), until="refund.failed"
    ),
    PlannedAction(0.005, DISPUTED, EVIDENCE, evidence="winning_evidence", special=paid_by("pm_card_createDispute")),
    PlannedAction(
        0.005,
        DISPUTED,
        EVIDENCE,
        evidence="losing_evidence",
        special=paid_by("pm_card_createDisputeProductNotReceived"),
    ),
)
AMOUNT_MINOR_MAX = 5_000
"""Of a payment with a planned action: its merchant must earn enough to refund it."""


def plan_actions(orders: list[Order], seed: int) -> tuple[list[Order], list[MerchantAgent]]:
    """The orders, some of them with a planned action, and the agents that carry the actions out."""
    chance = random.Random(f"{seed} plans")
    wanted = [plan for plan in PLANNED_ACTIONS for _ in range(max(1, round(plan.share * len(orders))))]
    numbers = chance.sample(range(len(orders)), min(len(orders) // 2, len(wanted)))
    orders, agents = list(orders), dict[str, MerchantAgent]()
    for number, plan in zip(numbers, wanted, strict=False):
        order = orders[number]
        body: Json = {
            **order.body,
            "amount": chance.randint(100, AMOUNT_MINOR_MAX),
            "currency": "usd",
            "payment_method": {"type": "card", "token": chance.choice(USUAL_TOKENS)},
            **plan.special,
        }
        orders[number] = replace(order, body=body)
        agents.setdefault(order.api_key, MerchantAgent(order.api_key)).plans[str(body["reference"])] = plan
    return orders, list(agents.values())


@dataclass(slots=True)
class MerchantAgent:
    """The agent of one merchant."""

    api_key: str
    plans: dict[str, PlannedAction] = field(default_factory=dict)
    """By the payment's reference, the actions that are not accepted yet."""
    refusals: list[str] = field(default_factory=list)
    waits_for: dict[str, str] = field(default_factory=dict)
    """By the id of a created object, the type of the event that completes its action."""
    _triggered: dict[str, tuple[str, Json]] = field(default_factory=dict)
    """By the payment's reference, payment id and body of a request until it is accepted."""

    def read(self, event: Json) -> None:
        """Note the action that an event triggers."""
        subject = event["data"]
        if self.waits_for.get(subject["id"]) == event["type"]:
            del self.waits_for[subject["id"]]
        plan = self.plans.get(subject.get("reference") or "")
        if plan is not None and event["type"] in plan.on:
            self._triggered[subject["reference"]] = (subject["id"], plan.body(subject["amount"]))

    async def act(self, client: httpx.AsyncClient) -> None:
        """Send the triggered requests; one refused with 409 or 503 is repeated later under its key."""
        for reference, (payment, body) in list(self._triggered.items()):
            path = self.plans[reference].path
            headers = {"Authorization": f"Bearer {self.api_key}"}
            keyed = headers | {"Idempotency-Key": f"{reference}-{path.rpartition('/')[2]}"}
            try:
                if "{dispute}" in path:
                    listed = await client.get("/v1/disputes", params={"payment": payment}, headers=headers)
                    path = path.format(dispute=listed.raise_for_status().json()["data"][0]["id"])
                answer = await client.post(path.format(id=payment), json=body, headers=keyed)
            except httpx.HTTPError:
                continue
            if answer.is_success:
                plan = self.plans.pop(reference)
                del self._triggered[reference]
                if plan.until:
                    self.waits_for[answer.json()["id"]] = plan.until
            elif answer.status_code not in (409, 503):
                self.refusals.append(f"{path}: {answer.status_code} {answer.text}")
                del self.plans[reference], self._triggered[reference]

    async def work(self, client: httpx.AsyncClient) -> None:
        """Read the feed and act until every action is complete."""
        after: str | None = None
        headers = {"Authorization": f"Bearer {self.api_key}"}
        while self.plans or self.waits_for:
            asked = {"limit": PAGE_LIMIT} | ({"starting_after": after} if after else {})
            try:
                page = (await client.get("/v1/events", params=asked, headers=headers)).raise_for_status().json()
            except httpx.HTTPError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            after = page["next"]
            for event in page["data"]:
                self.read(event)
            await self.act(client)
            if not page["has_more"]:
                await asyncio.sleep(POLL_SECONDS)
