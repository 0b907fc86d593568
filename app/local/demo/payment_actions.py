"""What merchants do after the charge: capture, cancel, refund, answer disputes.

Each merchant's agent follows its feed of events, `GET /v1/events`, as a merchant's system would, and acts on what it
reads: so the feed is tried out, too, for whoever skips an event never acts.
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
    """What a merchant does about a payment, and when."""

    share: float
    """Of the payments of a shop; of few payments one, at least."""
    on: tuple[str, ...]
    """Types of the events that it waits for."""
    path: str
    """Where it is asked for; `{id}` is the payment's, `{dispute}` its dispute's."""
    evidence: str | None = None
    """What is said against a dispute; the sandbox's banks go by it."""
    tenths: int | None = None
    """Of the payment's amount; None: all, by not naming any."""
    until: str | None = None
    """Type of an event of what was asked for, without which the story isn't over."""
    special: Json = field(default_factory=dict)
    """What such a payment is made with."""

    def body(self, amount_minor: int) -> Json:
        """What is sent about a payment of so many minor units."""
        if self.evidence is not None:
            return {"evidence": {"uncategorized_text": self.evidence}, "submit": True}
        return {} if self.tenths is None else {"amount": amount_minor * self.tenths // 10}


HELD = ("payment.authorized",)
PAID = ("payment.confirmed", "payment.settled")
DISPUTED = ("payment.disputed",)
EVIDENCE = "/v1/disputes/{dispute}/evidence"
MANUAL: Json = {"capture_method": "manual"}


def paid_by(token: str) -> Json:
    """What is special about a payment by a certain card."""
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
"""Of a planned payment, in the currency in which every shop earns: what is given back must have been earned."""


def plan_actions(orders: list[Order], seed: int) -> tuple[list[Order], list[MerchantAgent]]:
    """The orders, some of them changed so that a merchant does something about them later, and who does it."""
    lot = random.Random(f"{seed} plans")
    wanted = [plan for plan in PLANNED_ACTIONS for _ in range(max(1, round(plan.share * len(orders))))]
    numbers = lot.sample(range(len(orders)), min(len(orders) // 2, len(wanted)))
    orders, agents = list(orders), dict[str, MerchantAgent]()
    for number, plan in zip(numbers, wanted, strict=False):
        order = orders[number]
        body: Json = {
            **order.body,
            "amount": lot.randint(100, AMOUNT_MINOR_MAX),
            "currency": "usd",
            "payment_method": {"type": "card", "token": lot.choice(USUAL_TOKENS)},
            **plan.special,
        }
        orders[number] = replace(order, body=body)
        agents.setdefault(order.api_key, MerchantAgent(order.api_key)).plans[str(body["reference"])] = plan
    return orders, list(agents.values())


@dataclass(slots=True)
class MerchantAgent:
    """Of one merchant."""

    api_key: str
    plans: dict[str, PlannedAction] = field(default_factory=dict)
    """By the payment's reference; what is left to be done."""
    refusals: list[str] = field(default_factory=list)
    waits_for: dict[str, str] = field(default_factory=dict)
    """By the id of what was asked for, the type of an event that is still to come."""
    _asked: dict[str, tuple[str, Json]] = field(default_factory=dict)
    """By reference, what to send, until it is accepted."""

    def read(self, event: Json) -> None:
        """Note what an event asks for."""
        subject = event["data"]
        if self.waits_for.get(subject["id"]) == event["type"]:
            del self.waits_for[subject["id"]]
        plan = self.plans.get(subject.get("reference") or "")
        if plan is not None and event["type"] in plan.on:
            self._asked[subject["reference"]] = (subject["id"], plan.body(subject["amount"]))

    async def act(self, client: httpx.AsyncClient) -> None:
        """Send what is asked for; what can't be done yet is tried again later, under the same key."""
        for reference, (payment, body) in list(self._asked.items()):
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
                del self._asked[reference]
                if plan.until:
                    self.waits_for[answer.json()["id"]] = plan.until
            elif answer.status_code not in (409, 503):
                self.refusals.append(f"{path}: {answer.status_code} {answer.text}")
                del self.plans[reference], self._asked[reference]

    async def work(self, client: httpx.AsyncClient) -> None:
        """Follow the feed and act until nothing is left to do."""
        after: str | None = None
        headers = {"Authorization": f"Bearer {self.api_key}"}
        while self.plans or self.waits_for:
            asked = {"limit": PAGE_LIMIT} | ({"after": after} if after else {})
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
