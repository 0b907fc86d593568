"""The sandbox's Stripe without sockets: deterministic, in memory, at the schedule's time.

Requests have the form in which Stripe's SDK makes them, and the product's own client reads the answers. Faults have the
sandbox's names. Webhooks wait in a mailbox until the schedule delivers one.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from app.sandbox.connections import SandboxResponse
from app.sandbox.faults import PASSING_FAULTS, FaultInjector, RequestFault
from app.sandbox.memory import Memory
from app.sandbox.scheduled_actions import SCHEDULED_ACTIONS
from app.sandbox.settings import SandboxSettings
from app.sandbox.state import Sandbox
from app.sandbox.stripe import control
from app.sandbox.stripe.errors import StripeError, invalid_request
from app.sandbox.stripe.objects import intents
from app.sandbox.stripe.requests import (
    StripeRequest,
    error_response,
    execute_request,
    keep_response,
    key_in_use,
    parse_request,
    rate_limited,
    server_error,
)
from app.sandbox.stripe.variants import changed_event, sparse_answer
from jobs.stripe.connections import NoAnswer, OutgoingRequest, RawResponse
from tests.simulation.loop import PROCESS, Process
from tests.simulation.outages import Outage, check_outage_failures_uncounted, start_outage
from tests.simulation.refused_access import begin_refusal, end_refusal

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

Json = dict[str, Any]

MEMORY = Path(":memory:")
WRITE_FAULTS: tuple[RequestFault, ...] = (*PASSING_FAULTS, "refused_400")
# Reads have no idempotency key.
READ_FAULTS = tuple(fault for fault in PASSING_FAULTS if fault != "conflict_409")
# Only calls that can take effect once are executed a day late: a refund still to be made looks like one never made.
LATE_SECONDS = (0.5, 30.0)
A_DAY_LATE_SECONDS = 25 * 3600.0
# How far the provider's clock is ahead of the database's, in seconds.
SKEWS = (0.0, 0.0, -1200.0, -40.0, 40.0, 1200.0)


class SimulatedMemory(Memory):
    """A memory whose time is the schedule's, ahead of the database's or behind it."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(MEMORY, schedule.plan.seed)
        self._schedule = schedule
        self.skew = random.Random(f"{schedule.plan.seed}:skew").choice(SKEWS)

    def now(self) -> float:
        seconds: float = self._schedule.started_at + self._schedule.loop.seconds + self.skew
        return seconds


class SimulatedProvider:
    """The provider of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        chance = schedule.chance
        settings = SandboxSettings(
            seed=schedule.plan.seed,
            webhook_url="mailbox",
            transaction_seconds=2.0,
            available_seconds=chance.choice((1.0, 86_400.0)),
            processing_seconds=chance.choice((0.0, 0.0, 40.0)),
            payout_seconds=0,
            hold_seconds=86_400.0,
            response_seconds=43_200.0,
            inquiry_seconds=86_400.0,
            public_url="http://provider",
        )
        self.memory = SimulatedMemory(schedule)
        """The sandbox's record."""
        self.sandbox = Sandbox(settings, self.memory, FaultInjector(settings.seed))
        self.process = Process("provider")
        self.mailbox: list[str] = []
        self.late: list[str] = []
        self.has_lost = False
        """Whether a webhook was lost."""
        self.outage: Outage | None = None
        self.refused_until: float | None = None
        """Until when our access is refused, in the schedule's seconds."""
        self.was_refused = False
        """Whether our access was refused at any time."""
        self.is_unread = False
        """Whether a list of events was not read at the last visit, or since the last refusal."""
        self.read_at = 0.0
        """When all lists of events were read at last, in the schedule's seconds."""
        self.answered_at = 0.0
        """The time of the last answer, in the schedule's seconds."""
        self._requests = 0

    def run_due(self) -> None:
        """Execute the scheduled actions that are due."""
        if self.outage is not None and self.outage.until <= self.schedule.loop.seconds:
            self.recover()
        if self.refused_until is not None and self.refused_until <= self.schedule.loop.seconds:
            self.give_access()
        memory = self.sandbox.memory
        while self.sandbox.scheduled and self.sandbox.scheduled[0].due <= memory.now():
            plan = heapq.heappop(self.sandbox.scheduled)
            SCHEDULED_ACTIONS[plan.what](self.sandbox, memory.get(plan.subject))
            memory.finish(plan)
            self.commit()

    def recover(self) -> None:
        """End the outage."""
        outage, self.outage = self.outage, None
        if outage is not None:
            self.schedule.note("the outage ends")
            check_outage_failures_uncounted(self.schedule, outage)

    def refuse_access(self) -> None:
        """Begin to refuse our access."""
        if self.outage is None and self.refused_until is None:
            self.refused_until = begin_refusal(self.schedule)
            self.was_refused = self.is_unread = True
            self.commit()

    def give_access(self) -> None:
        """End the refusal of our access."""
        if self.refused_until is not None:
            self.refused_until = None
            end_refusal(self.schedule)
            self.commit()

    def next_due(self) -> float | None:
        """The time of the next scheduled action, in the schedule's seconds."""
        scheduled = self.sandbox.scheduled
        return scheduled[0].due - self.schedule.started_at - self.memory.skew if scheduled else None

    def commit(self) -> None:
        """Commit the sandbox's state, and put its webhooks into the mailbox unless they are lost or late."""
        self.sandbox.commit()
        schedule = self.schedule
        deliveries = [plan for plan in self.sandbox.scheduled if plan.what == "deliver"]
        if deliveries:
            self.sandbox.scheduled = [plan for plan in self.sandbox.scheduled if plan.what != "deliver"]
            heapq.heapify(self.sandbox.scheduled)
        for plan in sorted(deliveries):
            if schedule.draw_fault("webhook_lost"):
                self.has_lost = True
                continue
            if schedule.draw_fault("webhook_delayed"):
                self.late.append(plan.subject)
                continue
            times = schedule.chance.randint(2, 10) if schedule.draw_fault("webhook_repeated") else 1
            self.mailbox += [plan.subject] * times

    def webhook_payloads(self, event_id: str) -> list[bytes]:
        """The event as it is delivered: sometimes without optional fields, thin, or after one of the other mode."""
        payload = self.memory.event(event_id)[2]
        if not self.schedule.draw_fault("webhook_changed"):
            return [payload]
        what = self.schedule.chance.choice(("deliver_sparse", "deliver_sparse", "deliver_thin", "deliver_other_mode"))
        changed = changed_event(what, payload, self.sandbox.faults)
        return [changed, payload] if what == "deliver_other_mode" else [changed]

    def lose_old_webhooks(self) -> None:
        """Lose the webhooks that no one has taken for days."""
        self.has_lost |= bool(self.mailbox or self.late)
        self.mailbox, self.late = [], []

    def payer_acts(self) -> bool:
        """One payer completes or fails its authentication. False if no payer has to."""
        waiting = [one for one in self.memory.all_of_kind("payment_intent") if one.body["status"] == "requires_action"]
        if not waiting:
            return False
        intents.complete_authentication(
            self.sandbox, self.schedule.chance.choice(waiting), self.schedule.chance.random() < 0.7
        )
        self.commit()
        return True

    def third_party_acts(self) -> str | None:
        """A dispute, a bank's decision, a returned refund, a refund in the dashboard or a refusal; returns which."""
        chance = self.schedule.chance
        if not self.schedule.plan.days and self.schedule.draw_fault("access_refused"):
            self.refuse_access()
        charges = [charge for charge in self.memory.all_of_kind("charge") if charge.body["captured"]]
        disputes, refunds = list(self.memory.all_of_kind("dispute")), list(self.memory.all_of_kind("refund"))
        undisputed = [charge for charge in charges if not charge.body["disputed"]]
        doing = chance.choice(("dispute", "decide", "decide", "return", "refund"))
        subjects = {"dispute": undisputed, "decide": disputes, "return": refunds, "refund": undisputed}[doing]
        if not subjects:
            return None
        subject = chance.choice(subjects)
        try:
            match doing:
                case "dispute":
                    part = chance.choice((None, subject.body["amount_captured"] // 2))
                    control.dispute_charge(
                        self.sandbox,
                        control.CardholderDispute(charge=subject.id, amount=part, inquiry=chance.random() < 0.2),
                    )
                case "decide":
                    outcome: Any = chance.choice((*control.DECISIONS, *control.PARTS))
                    control.decide_dispute(self.sandbox, subject.id, control.BankDecision(outcome=outcome, returned=1))
                case "return":
                    control.decide_refund(self.sandbox, subject.id, control.RefundOutcome(outcome="failed"))
                case "refund":
                    control.refund_charge(
                        self.sandbox,
                        control.DashboardRefund(charge=subject.id, amount=subject.body["amount_captured"] // 4),
                    )
        except StripeError:
            return None
        self.commit()
        return doing

    def cancel_wrong_amounts(self) -> None:
        """Cancel in the dashboard the intents that have, or were read with, a wrong amount, as the runbook says."""
        asked = dict(self.schedule.database.rows("select id, amount_minor from surety.payments"))
        query = "select subject from surety.discrepancies where kind = 'amount' and closed_at is null"
        reported = {subject for (subject,) in self.schedule.database.rows(query)}
        for intent in list(self.memory.all_of_kind("payment_intent")):
            is_wrong = intent.body["amount"] != asked.get(intent.body["metadata"]["surety_payment"])
            if (is_wrong or f"{intent.id}:submitted" in reported) and intent.body["status"] == "requires_confirmation":
                intents.cancel(self.sandbox, intent, "requested_by_customer")
                self.commit()

    def decide_disputes(self) -> None:
        """The banks decide all open disputes."""
        for dispute in list(self.memory.all_of_kind("dispute")):
            outcome: Any = "closed" if dispute.body["status"].startswith("warning_") else "lost"
            if dispute.body["status"] in control.DECISIONS[outcome][0]:
                control.decide_dispute(self.sandbox, dispute.id, control.BankDecision(outcome=outcome))
                self.commit()

    def receive(self, request: OutgoingRequest) -> StripeRequest | SandboxResponse:
        """The parsed request, or the error response to an invalid one."""
        self._requests += 1
        path, _, query = request.target.partition("?")
        named = {name.lower().encode(): value for name, value in request.headers.items()}
        parameters = query if request.method == "GET" else request.content.decode()
        try:
            return parse_request(self.sandbox, request.method, path, named, parameters, f"req_{self._requests:08d}")
        except StripeError as refusal:
            return error_response(refusal)

    async def respond(self, request: StripeRequest) -> SandboxResponse | None:
        """The response after faults. None if no response ever comes."""
        name = request.operation.name
        schedule = self.schedule
        # Together they could keep the list of events from being read for as long as it reaches back.
        if not self.is_unread and self.outage is None and request.writes and schedule.draw_fault("outage", name):
            self.outage = start_outage(self.schedule, request, self.answered_at)
        if not schedule.plan.days and request.writes and schedule.draw_fault("access_refused", name):
            self.refuse_access()
        if self.outage is not None and (request.writes or self.outage.is_whole):
            return await self.apply_fault(request, self.outage.form)
        if request.writes:
            drawn = [fault for fault in WRITE_FAULTS if self.schedule.draw_fault(fault, name)]
        else:
            drawn = [self.schedule.chance.choice(READ_FAULTS)] if self.schedule.draw_fault("reads", name) else []
        return await self.apply_fault(request, self.schedule.chance.choice(drawn) if drawn else None)

    async def apply_fault(self, request: StripeRequest, fault: RequestFault | None) -> SandboxResponse | None:
        """The response under a fault."""
        match fault:
            case "timeout_before":
                return None
            case "refused_400":
                return error_response(invalid_request("This request cannot be processed."))
            case "conflict_409":
                return error_response(key_in_use(request.call.key or ""))
            case "rate_limit_429":
                refused = error_response(rate_limited())
                refused.headers.append((b"retry-after", b"1"))
                return refused
            case "slow":
                return await asyncio.shield(self.process.start(self.execute_late(request)))
        answered = self.execute(request, fault)
        self.commit()
        return await self.send_back(request, answered, fault)

    def execute(self, request: StripeRequest, fault: RequestFault | None) -> SandboxResponse:
        """Execute the request, possibly with a misread amount, or fail before or after it."""
        if request.operation.name == "payment_intents.create" and self.schedule.draw_fault("misread_amount"):
            request.pairs = [
                (name, str(int(result) + 1) if name == "amount" else result) for name, result in request.pairs
            ]
        match fault:
            case "error_500_before":
                answered = request.replay or error_response(server_error())
                keep_response(self.sandbox, request, answered)
                return answered
            case "error_500_after":
                return execute_request(self.sandbox, request, instead=server_error())
        return execute_request(self.sandbox, request)

    async def send_back(
        self, request: StripeRequest, answered: SandboxResponse, fault: RequestFault | None
    ) -> SandboxResponse | None:
        """The response as it arrives."""
        match fault:
            case "timeout_after":
                return None
            case "reset":
                raise NoAnswer("the connection ended")
            case "sparse_200" if answered.status == 200:
                return SandboxResponse(200, sparse_answer(answered.body, self.schedule.chance), answered.headers)
            case "garbage_200":
                return SandboxResponse(200, b"<html>upstream connect error\x00", [])
            case "webhook_first":
                await self.schedule.deliver_all()
        return self.alter_amount(request, answered) if answered.status == 200 else answered

    async def execute_late(self, request: StripeRequest) -> SandboxResponse:
        """Execute late. The key is in use meanwhile, even if the caller has given up or died."""
        in_use = (request.call.account, request.call.key or request.call.request_id)
        self.sandbox.keys_in_use.add(in_use)
        is_once = request.operation.name.startswith("payment_intents.")
        chance = self.schedule.chance
        await asyncio.sleep(A_DAY_LATE_SECONDS if is_once and chance.random() < 0.5 else chance.choice(LATE_SECONDS))
        self.sandbox.keys_in_use.discard(in_use)
        answered = execute_request(self.sandbox, request)
        self.commit()
        return answered

    def alter_amount(self, request: StripeRequest, answered: SandboxResponse) -> SandboxResponse:
        """The response, sometimes with a wrong amount. Booking it would record money that was never paid."""
        if not request.operation.name.startswith("payment_intents.") or request.operation.name.endswith("list"):
            return answered
        if not self.schedule.draw_fault("other_amount", request.operation.name):
            return answered
        body = msgspec.json.decode(answered.body)
        body["amount"] += 1
        return SandboxResponse(answered.status, msgspec.json.encode(body), answered.headers)


class SimulatedSender:
    """Connects the product's HTTP client to the provider of the running schedule."""

    def __init__(self) -> None:
        self.provider: SimulatedProvider | None = None

    async def send(self, request: OutgoingRequest) -> RawResponse:
        """Send one request, which may be lost or never answered."""
        provider = self.provider
        assert provider is not None
        schedule, process = provider.schedule, PROCESS.get()
        assert process is not None
        path = request.target.partition("?")[0]
        path = "/".join(part for part in path.split("/") if "_" not in part or part == "payment_intents")
        doing = f"{request.method} {path}"
        await schedule.turn(process, doing)
        received = provider.receive(request)
        is_well = provider.outage is None
        answered = (
            await provider.respond(received) if isinstance(received, StripeRequest) else received if is_well else None
        )
        if answered is None:
            await asyncio.get_running_loop().create_future()
            raise AssertionError
        answered_at = provider.memory.now()
        await schedule.turn(process, f"{doing}: answer")
        if (is_well and (provider.outage is None or provider.outage.first is not received)) or (
            provider.outage is not None and provider.outage.answers(answered)
        ):
            provider.answered_at = schedule.loop.seconds
            if provider.outage is not None:
                provider.outage.silent_since = provider.answered_at
        named = {name.decode(): value.decode() for name, value in answered.headers}
        return RawResponse(answered.status, {"date": formatdate(answered_at, usegmt=True), **named}, answered.body)


SENDER = SimulatedSender()
