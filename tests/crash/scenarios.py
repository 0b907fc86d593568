"""Actions after the charge during the kills: capture, cancel, refund, submit evidence; and cardholders' disputes.

Each merchant's runner follows its event feed and acts on the events, so a skipped event would leave a scenario
unfinished. Requests of one scenario are sent concurrently, each under a key of its own.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from app.local.demo.merchants import USUAL_TOKENS
from app.local.demo.payment_actions import AMOUNT_MINOR_MAX, EVIDENCE, HELD, MANUAL, PAID, Json, PlannedAction, paid_by
from tests.crash.retrying_client import PAUSE_SECONDS, Request, RetryingClient

POLL_SECONDS = 0.5
PAGE_LIMIT = 100

Scenario = tuple[PlannedAction, ...]

INITIATED = ("payment.initiated",)
UNFINISHED = ("payment.initiated", "payment.submitting")
DISPUTE_LOST = ("dispute.lost",)
FINAL_EVENTS = ("payment.failed", "payment.canceled", "dispute.won", "dispute.lost", "dispute.warning_closed")
"""Events that end a scenario even if actions are left: a deadline may have passed."""
REFUND_FAILED = ("refund.failed",)
INQUIRY_OPENED = ("dispute.warning_needs_response",)
CHARGEBACK_OPENED = ("dispute.needs_response",)
CAPTURE, CANCEL, REFUNDS = "/v1/payments/{id}/capture", "/v1/payments/{id}/cancel", "/v1/payments/{id}/refunds"
CHARGEBACK, INQUIRY = paid_by("pm_card_createDispute"), paid_by("pm_card_createDisputeInquiry")

# The first action of a scenario has the scenario's share of all payments, and the payment's special parameters.
SCENARIOS: tuple[Scenario, ...] = (
    (PlannedAction(0.04, HELD, CAPTURE, special=MANUAL),),
    (PlannedAction(0.03, HELD, CAPTURE, tenths=7, special=MANUAL), PlannedAction(0, PAID, REFUNDS)),
    (PlannedAction(0.03, HELD, CANCEL, special=MANUAL),),
    # The second of the two is refused.
    (PlannedAction(0.02, HELD, CAPTURE, special=MANUAL), PlannedAction(0, HELD, CANCEL)),
    # At any progress of the submission.
    (PlannedAction(0.03, INITIATED, CANCEL),),
    (PlannedAction(0.04, PAID, REFUNDS),),
    (PlannedAction(0.04, PAID, REFUNDS, tenths=3),),
    # More than the captured amount: one of the three is refused.
    (
        PlannedAction(0.04, PAID, REFUNDS, tenths=3),
        PlannedAction(0, PAID, REFUNDS, tenths=3),
        PlannedAction(0, PAID, REFUNDS, tenths=5),
    ),
    (PlannedAction(0.02, PAID, REFUNDS, special=paid_by("pm_card_pendingRefund")),),
    (
        PlannedAction(0.02, PAID, REFUNDS, tenths=6, special=paid_by("pm_card_refundFail")),
        PlannedAction(0, REFUND_FAILED, REFUNDS),
    ),
    (PlannedAction(0.02, CHARGEBACK_OPENED, EVIDENCE, evidence="winning_evidence", special=CHARGEBACK),),
    (PlannedAction(0.02, CHARGEBACK_OPENED, EVIDENCE, evidence="losing_evidence", special=CHARGEBACK),),
    # The dispute may come before the refund, also while the refund is pending.
    (
        PlannedAction(0.02, PAID, REFUNDS, tenths=3, special=CHARGEBACK),
        PlannedAction(0, CHARGEBACK_OPENED, EVIDENCE, evidence="winning_evidence"),
    ),
    (
        PlannedAction(0.01, INQUIRY_OPENED, EVIDENCE, evidence="escalate_inquiry_evidence", special=INQUIRY),
        PlannedAction(0, CHARGEBACK_OPENED, EVIDENCE, evidence="winning_evidence"),
    ),
    # Without evidence the dispute is lost, and nothing is left to refund.
    (PlannedAction(0.02, DISPUTE_LOST, REFUNDS, special=CHARGEBACK),),
)


def draw_scenario(chance: random.Random) -> tuple[Scenario, Json]:
    """A scenario, or an empty one, and the special parameters of its payment."""
    left = chance.random()
    for scenario in SCENARIOS:
        if (left := left - scenario[0].share) < 0:
            card = paid_by(chance.choice(USUAL_TOKENS))
            return scenario, {
                "amount": chance.randint(100, AMOUNT_MINOR_MAX),
                "currency": "usd",
                **card,
                **scenario[0].special,
            }
    return (), {}


class ScenarioRunner:
    """Runs the scenarios of one merchant."""

    def __init__(self, api_key: str, retrying_client: RetryingClient) -> None:
        self._api_key = api_key
        self._retrying_client = retrying_client
        self._plans: dict[str, dict[int, PlannedAction]] = {}
        """The actions left, by the payment's reference. Their numbers are parts of their keys."""
        self._payments: dict[str, Json] = {}
        """Payments with a scenario by id, to which events of refunds and disputes refer."""
        self.under_way: set[str] = set()
        """References of payments without an answer of the provider in the feed."""

    def expect(self, reference: str, scenario: Scenario) -> None:
        """Register a payment before it is requested, with its scenario, which may be empty."""
        self.under_way.add(reference)
        if scenario:
            self._plans[reference] = dict(enumerate(scenario))

    def forget(self, reference: str) -> None:
        """Drop a payment whose request was refused."""
        self.under_way.discard(reference)
        self._plans.pop(reference, None)

    def left(self) -> list[str]:
        """The actions that are left."""
        plans = [(reference, plan) for reference, plans in self._plans.items() for plan in plans.values()]
        return [f"{reference}: {plan.path} on {' or '.join(plan.on)}" for reference, plan in plans]

    async def work(self, client: httpx.AsyncClient, no_more_payments: asyncio.Event) -> None:
        """Follow the feed and act until no action is left."""
        after: str | None = None
        async with asyncio.TaskGroup() as acts:
            while self._plans or not no_more_payments.is_set():
                page = await self._read(client, after)
                if page is None:
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                after = page["next"]
                for event in page["data"]:
                    for request in self._requests_after(event["type"], event["data"]):
                        acts.create_task(self._act(client, request))
                if not page["has_more"]:
                    await asyncio.sleep(POLL_SECONDS)

    async def _act(self, client: httpx.AsyncClient, request: Request) -> None:
        """Send a request. A refused refund never fails later, so actions on its failure are dropped."""
        if not await self._retrying_client.ask(client, request, may_be_refused=True):
            plans = self._plans.get(request.reference, {})
            for number in [number for number, plan in plans.items() if plan.on == REFUND_FAILED]:
                del plans[number]
            if not plans:
                self._plans.pop(request.reference, None)

    async def _read(self, client: httpx.AsyncClient, after: str | None) -> Json | None:
        """A page of the feed. None if there was no answer."""
        asked: dict[str, Any] = {"limit": PAGE_LIMIT} | ({"starting_after": after} if after else {})
        try:
            answer = await client.get("/v1/events", params=asked, headers={"Authorization": f"Bearer {self._api_key}"})
        except httpx.TransportError:
            return None
        if answer.is_success:
            page: Json = answer.json()
            return page
        if answer.status_code != 503:
            self._retrying_client.wrong_answers.append(f"/v1/events: {answer.status_code} {answer.text}")
        return None

    def _requests_after(self, event_type: str, subject: Json) -> list[Request]:
        """The requests that follow an event."""
        if subject["object"] == "payment" and event_type not in UNFINISHED:
            self.under_way.discard(subject["reference"])
        if subject["object"] == "payment" and subject["reference"] in self._plans:
            self._payments[subject["id"]] = subject
        payment = self._payments.get(str(subject.get("payment", subject["id"])))
        if payment is None:
            return []
        reference = payment["reference"]
        plans = self._plans.get(reference, {})
        due = [number for number, plan in plans.items() if event_type in plan.on]
        asked = [self._request(plans.pop(number), number, payment, subject["id"]) for number in due]
        if not plans or event_type in FINAL_EVENTS:
            self._plans.pop(reference, None)
        return asked

    def _request(self, plan: PlannedAction, number: int, payment: Json, dispute: str) -> Request:
        path = plan.path.format(id=payment["id"], dispute=dispute)
        reference, body = payment["reference"], plan.body(payment["amount"])
        return Request(self._api_key, f"{reference}-{number}", path, body, reference)
