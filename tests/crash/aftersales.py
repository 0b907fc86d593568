"""What merchants do after the charge while things die: capture, cancel, refund, defend themselves; and what holders do.

Each merchant's clerk follows its feed of events and acts on what it reads, so an event that the feed skipped would be a
story without an end. Requests of one story are asked beside each other, each under a key of its own.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from app.local.demo.merchants import USUAL_TOKENS
from app.local.demo.payment_actions import AMOUNT_MINOR_MAX, EVIDENCE, HELD, MANUAL, PAID, Json, Plan, paid_by
from tests.crash.correspondence import PAUSE_SECONDS, Correspondence, Request

POLL_SECONDS = 0.5
PAGE_LIMIT = 100

Story = tuple[Plan, ...]

INITIATED = ("payment.initiated",)
UNDER_WAY = ("payment.initiated", "payment.submitting")
LOST = ("dispute.lost",)
OVER = ("payment.failed", "payment.canceled", "dispute.won", "dispute.lost", "dispute.warning_closed")
"""What ends a story, whatever was still planned: a deadline may have passed while nobody answered."""
CAME_BACK = ("refund.failed",)
INQUIRED = ("dispute.warning_needs_response",)
CHARGED_BACK = ("dispute.needs_response",)
CAPTURE, CANCEL, REFUNDS = "/v1/payments/{id}/capture", "/v1/payments/{id}/cancel", "/v1/payments/{id}/refunds"
CHARGEBACK, INQUIRY = paid_by("pm_card_createDispute"), paid_by("pm_card_createDisputeInquiry")

# The first plan of a story has its share of all payments and says what its payment is made with.
STORIES: tuple[Story, ...] = (
    (Plan(0.04, HELD, CAPTURE, special=MANUAL),),
    (Plan(0.03, HELD, CAPTURE, tenths=7, special=MANUAL), Plan(0, PAID, REFUNDS)),
    (Plan(0.03, HELD, CANCEL, special=MANUAL),),
    # One of the two is told that it came second.
    (Plan(0.02, HELD, CAPTURE, special=MANUAL), Plan(0, HELD, CANCEL)),
    # Whatever has been sent by then.
    (Plan(0.03, INITIATED, CANCEL),),
    (Plan(0.04, PAID, REFUNDS),),
    (Plan(0.04, PAID, REFUNDS, tenths=3),),
    # More than there is: one of the three is refused.
    (Plan(0.04, PAID, REFUNDS, tenths=3), Plan(0, PAID, REFUNDS, tenths=3), Plan(0, PAID, REFUNDS, tenths=5)),
    (Plan(0.02, PAID, REFUNDS, special=paid_by("pm_card_pendingRefund")),),
    (Plan(0.02, PAID, REFUNDS, tenths=6, special=paid_by("pm_card_refundFail")), Plan(0, CAME_BACK, REFUNDS)),
    (Plan(0.02, CHARGED_BACK, EVIDENCE, evidence="winning_evidence", special=CHARGEBACK),),
    (Plan(0.02, CHARGED_BACK, EVIDENCE, evidence="losing_evidence", special=CHARGEBACK),),
    # The holder may be quicker, also when the refund is on its way.
    (
        Plan(0.02, PAID, REFUNDS, tenths=3, special=CHARGEBACK),
        Plan(0, CHARGED_BACK, EVIDENCE, evidence="winning_evidence"),
    ),
    (
        Plan(0.01, INQUIRED, EVIDENCE, evidence="escalate_inquiry_evidence", special=INQUIRY),
        Plan(0, CHARGED_BACK, EVIDENCE, evidence="winning_evidence"),
    ),
    # Nobody answers, so it is lost, and nothing is left to be refunded.
    (Plan(0.02, LOST, REFUNDS, special=CHARGEBACK),),
)


def choose_story(lot: random.Random) -> tuple[Story, Json]:
    """A story, or none, and what is special about its payment."""
    left = lot.random()
    for story in STORIES:
        if (left := left - story[0].share) < 0:
            card = paid_by(lot.choice(USUAL_TOKENS))
            return story, {"amount": lot.randint(100, AMOUNT_MINOR_MAX), "currency": "usd", **card, **story[0].special}
    return (), {}


class Clerk:
    """Of one merchant."""

    def __init__(self, api_key: str, told: Correspondence) -> None:
        self._api_key = api_key
        self._told = told
        self._plans: dict[str, dict[int, Plan]] = {}
        """By the payment's reference, what is left to be done; the numbers are for the keys."""
        self._payments: dict[str, Json] = {}
        """By id, those with a story, for what is told of their refunds and disputes."""
        self.under_way: set[str] = set()
        """References of payments that the provider has not answered, as far as the feed tells."""

    def expect(self, reference: str, story: Story) -> None:
        """A payment that will be made is to have this story, which may have nothing in it."""
        self.under_way.add(reference)
        if story:
            self._plans[reference] = dict(enumerate(story))

    def left(self) -> list[str]:
        """What has not been done."""
        plans = [(reference, plan) for reference, plans in self._plans.items() for plan in plans.values()]
        return [f"{reference}: {plan.path} on {' or '.join(plan.on)}" for reference, plan in plans]

    async def work(self, client: httpx.AsyncClient, is_sold_out: asyncio.Event) -> None:
        """Follow the feed and act until nothing is left to do."""
        after: str | None = None
        async with asyncio.TaskGroup() as acts:
            while self._plans or not is_sold_out.is_set():
                page = await self._read(client, after)
                if page is None:
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                after = page["next"]
                for event in page["data"]:
                    for request in self._hear(event["type"], event["data"]):
                        acts.create_task(self._act(client, request))
                if not page["has_more"]:
                    await asyncio.sleep(POLL_SECONDS)

    async def _act(self, client: httpx.AsyncClient, request: Request) -> None:
        """Ask for something; of what is refused, as for want of money, nothing will ever come back."""
        if not await self._told.ask(client, request, may_be_refused=True):
            plans = self._plans.get(request.reference, {})
            for number in [number for number, plan in plans.items() if plan.on == CAME_BACK]:
                del plans[number]
            if not plans:
                self._plans.pop(request.reference, None)

    async def _read(self, client: httpx.AsyncClient, after: str | None) -> Json | None:
        """A page of the feed; None if nobody answers."""
        asked: dict[str, Any] = {"limit": PAGE_LIMIT} | ({"after": after} if after else {})
        try:
            answer = await client.get("/v1/events", params=asked, headers={"Authorization": f"Bearer {self._api_key}"})
        except httpx.TransportError:
            return None
        if answer.is_success:
            page: Json = answer.json()
            return page
        if answer.status_code != 503:
            self._told.wrong.append(f"/v1/events: {answer.status_code} {answer.text}")
        return None

    def _hear(self, what: str, about: Json) -> list[Request]:
        """What an event makes its merchant ask for."""
        if about["object"] == "payment" and what not in UNDER_WAY:
            self.under_way.discard(about["reference"])
        if about["object"] == "payment" and about["reference"] in self._plans:
            self._payments[about["id"]] = about
        payment = self._payments.get(str(about.get("payment", about["id"])))
        if payment is None:
            return []
        reference = payment["reference"]
        plans = self._plans.get(reference, {})
        due = [number for number, plan in plans.items() if what in plan.on]
        asked = [self._request(plans.pop(number), number, payment, about["id"]) for number in due]
        if not plans or what in OVER:
            self._plans.pop(reference, None)
        return asked

    def _request(self, plan: Plan, number: int, payment: Json, dispute: str) -> Request:
        path = plan.path.format(id=payment["id"], dispute=dispute)
        reference, body = payment["reference"], plan.body(payment["amount"])
        return Request(self._api_key, f"{reference}-{number}", path, body, reference)
