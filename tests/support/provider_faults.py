"""Every call to the provider, each with everything that can go wrong about it, on clocks that the test moves.

Payments by the hundred go through the worker's real code and the real sandbox at once, each on its way to one call that
goes wrong for it in one way. A pair of call and fault counts when the sandbox has really done it.

The calls are those of the outbox's phases: what `submit`, `confirm`, `cancel`, `capture`, `refund` and `evidence` send,
what they ask when an outcome is unknown or has to be known, what `apply_webhooks` fetches because of a webhook, what
polling fetches, and what the periodic jobs read.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from db.embedded.processes import wait_until
from jobs.payouts import poll_payouts
from jobs.periodic import PeriodicJob
from jobs.polling import (
    poll_balance_transactions,
    poll_events,
    poll_unfinished,
    recheck_pending_balance,
)
from jobs.worker import Worker
from tests.support.payments import Connection, add_merchant, command, create, request
from tests.support.sandbox_process import SandboxProcess, eventually
from tests.support.workers import run_until_idle

Json = dict[str, Any]

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
DELAY_SECONDS = 3 * DAY
REORDER_SECONDS = HOUR
SOON = 80.0
"""Longer than any delay before a retry."""
LATER = 7 * HOUR
"""Longer than any delay before a poll, and than money is pending."""
PENDING_SECONDS = HOUR
UNDECIDED_SECONDS = 8 * DAY
"""How long refunds and disputes stay as they are, unless the test decides them."""
ROUNDS_MAX = 12

VISA, DECLINED, ACTION_REQUIRED = "pm_card_visa", "pm_card_visa_chargeDeclined", "pm_card_authenticationRequired"
PENDING = "pm_card_pendingRefund"

# The table's name of each fault, and the sandbox's fault for it.
CALL_FAULTS = {
    "timeout before": "timeout_before",
    "timeout after": "timeout_after",
    "reset in mid-body": "reset",
    "500 before": "error_500_before",
    "500 after": "error_500_after",
    "409": "conflict_409",
    "429": "rate_limit_429",
    "malformed 200": "garbage_200",
    "fields left out": "sparse_200",
    "after 25 hours": "timeout_after",
    "webhook first": "webhook_first",
}
WEBHOOK_FAULTS = {
    "ten duplicates": "repeated",
    "reordered": "reordered",
    "delayed by days": "delayed",
    "lost": "lost",
    "wrongly signed": "forged",
    "event without fields": "sparse",
    "thin event": "thin",
    "other mode as well": "other_mode",
}
FAULTS = CALL_FAULTS | WEBHOOK_FAULTS
# One account per case: simultaneous faults of one account would look like an outage of the provider.
ACCOUNTS = {fault: f"acct_1SuretyFault{number}" for number, fault in enumerate(FAULTS)}
LATE = "after 25 hours"
FIRST = "webhook first"

# Where a question brings webhooks that are late, which ones those are.
LATE_WEBHOOKS = {
    "apply_webhooks: fetch": "charge.failed",
    "apply_webhooks: fetch dispute": "charge.dispute.funds_withdrawn",
    "poll_unfinished: fetch": "payment_intent.succeeded",
    "poll_balance_transactions: list": "charge.updated",
    "recheck_pending_balance: list": "charge.updated",
    "poll_payouts: list": "payout.paid",
    "poll_events: list": "charge.updated",
}


@dataclass(frozen=True)
class ProviderCall:
    """One of our calls: the sandbox's name for it, a card that leads there, and the webhooks that belong to it."""

    operation: str
    card: str
    webhook: str
    overtaken: str
    """The webhook that others overtake."""


CALLS = {
    "submit: create": ProviderCall("payment_intents.create", VISA, "payment_intent.created", "payment_intent.created"),
    "submit: look for it": ProviderCall(
        "payment_intents.list", VISA, "payment_intent.created", "payment_intent.created"
    ),
    "confirm: confirm": ProviderCall(
        "payment_intents.confirm", VISA, "payment_intent.succeeded", "payment_intent.succeeded"
    ),
    "confirm: ask": ProviderCall(
        "payment_intents.retrieve", VISA, "payment_intent.succeeded", "payment_intent.succeeded"
    ),
    "cancel: cancel": ProviderCall(
        "payment_intents.cancel", DECLINED, "payment_intent.canceled", "payment_intent.payment_failed"
    ),
    "cancel: ask": ProviderCall(
        "payment_intents.retrieve", DECLINED, "payment_intent.canceled", "payment_intent.payment_failed"
    ),
    "capture: capture": ProviderCall(
        "payment_intents.capture", VISA, "payment_intent.succeeded", "payment_intent.amount_capturable_updated"
    ),
    "capture: ask": ProviderCall(
        "payment_intents.retrieve", VISA, "payment_intent.succeeded", "payment_intent.amount_capturable_updated"
    ),
    "refund: refund": ProviderCall("refunds.create", VISA, "refund.created", "refund.created"),
    "refund: look for it": ProviderCall("refunds.list", VISA, "refund.created", "refund.created"),
    "evidence: submit": ProviderCall("disputes.update", VISA, "charge.dispute.updated", "charge.dispute.updated"),
    "evidence: fetch": ProviderCall("disputes.retrieve", VISA, "charge.dispute.closed", "charge.dispute.updated"),
    "apply_webhooks: fetch": ProviderCall(
        "payment_intents.retrieve", DECLINED, "payment_intent.payment_failed", "payment_intent.payment_failed"
    ),
    "apply_webhooks: fetch dispute": ProviderCall(
        "disputes.retrieve", VISA, "charge.dispute.created", "charge.dispute.created"
    ),
    "poll_unfinished: fetch": ProviderCall(
        "payment_intents.retrieve", ACTION_REQUIRED, "payment_intent.succeeded", "payment_intent.succeeded"
    ),
    "poll_unfinished: fetch refund": ProviderCall("refunds.retrieve", PENDING, "refund.updated", "refund.updated"),
    "poll_unfinished: fetch dispute": ProviderCall(
        "disputes.retrieve", VISA, "charge.dispute.closed", "charge.dispute.closed"
    ),
    "recheck_pending_balance: list": ProviderCall(
        "balance_transactions.list", VISA, "charge.updated", "payment_intent.succeeded"
    ),
    "poll_balance_transactions: list": ProviderCall(
        "balance_transactions.list", VISA, "charge.updated", "payment_intent.succeeded"
    ),
    "poll_payouts: list": ProviderCall("payouts.list", VISA, "payout.paid", "payout.created"),
    "poll_events: list": ProviderCall("events.list", VISA, "payment_intent.succeeded", "payment_intent.succeeded"),
}


# Due balance transactions are read first: reading all would leave none that are due.
POLLS: dict[str, PeriodicJob] = {
    "recheck_pending_balance: list": recheck_pending_balance,
    "poll_balance_transactions: list": poll_balance_transactions,
    "poll_payouts: list": poll_payouts,
    "poll_events: list": poll_events
}  # fmt: skip


def is_late(call: str, fault: str) -> bool:
    """Whether a pair has to wait until other payments' delayed webhooks have come: a list that comes after webhooks
    brings all that are held.
    """
    return fault == LATE or (fault == FIRST and CALLS[call].operation.endswith(".list"))


@dataclass
class FaultCase:
    """A payment on its way to one pair."""

    payment_id: str
    call: str
    fault: str
    turn: int
    intent: str = ""
    refund: str = ""
    dispute: str = ""
    """The provider's id of it, as the intent's."""


@dataclass
class OrderedFault:
    """A fault ordered of the sandbox, and the pair that it counts for; None where it only leads somewhere."""

    pair: tuple[str, str] | None
    operation: str
    fault: str
    match: str = ""
    times: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operation, self.fault, self.match

    def as_json(self) -> Json:
        """As the sandbox takes it."""
        return {"operation": self.operation, "fault": self.fault, "match": self.match, "times": self.times}


class FaultMatrix:
    """One database, one sandbox, one worker, and all payments."""

    def __init__(self, conn: Connection, sandbox: SandboxProcess, worker: Worker) -> None:
        self.conn, self.sandbox, self.worker = conn, sandbox, worker
        self.counts: Counter[tuple[str, str]] = Counter()
        self.cases: list[FaultCase] = []
        self._orders: list[OrderedFault] = []
        self._ahead_seconds = 0.0
        self._keys = {fault: add_merchant(conn, account=account)[1] for fault, account in ACCOUNTS.items()}
        conn.execute("update surety.environment set kind = 'test'")
        # As many attempts as ever, at times that the test's clock reaches.
        conn.execute("update outbox.handlers set retry_after = '{60 s,60 s}'")
        self.move(0)

    # --- the way of all payments, up to each call

    async def go(self, *, late: bool) -> None:
        """Lead payments into every call with each of its faults, and heal all of them in the end.

        Late are the faults between which and the next attempt 25 hours pass.
        """
        pause_seconds = 25 * HOUR if late else SOON
        pairs = [(call, fault) for call in CALLS for fault in FAULTS if is_late(call, fault) == late]
        # Case by case in turn, the earlier faulty request takes effect or does not.
        self.cases = self._open(pairs)
        for lead in (
            self._submit, self._confirm, self._cancel, self._capture, self._refund, self._dispute, self._give_evidence,
            self._poll,
        ):  # fmt: skip
            await lead(pause_seconds)
            self._clear_faults()
        for call, read in POLLS.items():
            await self._read(read, [pair for pair in pairs if pair[0] == call], pause_seconds)
        await self.heal()

    def _open(self, pairs: list[tuple[str, str]]) -> list[FaultCase]:
        requests = [
            request(
                self._keys[fault],
                method_token=CALLS[call].card,
                capture_method="manual" if call.startswith("capture") else "automatic",
                return_url="https://shop.example/back",
            )
            for call, fault in pairs
        ]
        opened = zip((outcome["payment_id"] for outcome in create(self.conn, requests)), pairs, strict=True)
        return [FaultCase(payment_id, *pair, turn) for turn, (payment_id, pair) in enumerate(opened)]

    async def _submit(self, pause_seconds: float) -> None:
        orders = []
        for case in self._of("submit: create"):
            orders += self._of_call(case, case.payment_id) + self._of_webhook(case, case.payment_id)
        for case in self._of("submit: look for it"):
            error = ("error_500_before", "error_500_after")[case.turn % 2]
            orders += [OrderedFault(None, "payment_intents.create", error, case.payment_id)]
            orders += self._of_webhook(case, case.payment_id) + self._held(case, case.payment_id)
        await self._act_while_applying(orders, "submit")
        self.move(pause_seconds)
        await self._act([o for case in self._of("submit: look for it") for o in self._of_call(case, "")], "submit")
        await self._until(lambda: not self._in_state("initiated") | self._in_state("submitting"), "submit")
        intents: dict[str, str] = dict(self.conn.execute("select id, provider_id from surety.payments").fetchall())
        for case in self.cases:
            case.intent = intents[case.payment_id]

    async def _confirm(self, pause_seconds: float) -> None:
        orders = self._before_confirming()
        for case in self._of("confirm: confirm"):
            orders += self._of_call(case, case.payment_id)
        for case in self._of("apply_webhooks: fetch") + self._of("confirm: ask"):
            orders += self._of_call(case, case.intent)
        await self._act_while_applying(orders, "confirm")
        fetched = [case for case in self._of("apply_webhooks: fetch") if case.fault in CALL_FAULTS]
        self._wait_for_webhooks(CALLS["apply_webhooks: fetch"].webhook, fetched)
        await self._act([], "apply_webhooks")
        self.move(pause_seconds)
        await self._act([], "confirm")
        self.move(pause_seconds)
        await self._act([], "confirm", "apply_webhooks")

    def _before_confirming(self) -> list[OrderedFault]:
        """Order the faults and late webhooks that later calls of the table depend on."""
        orders = []
        for case in self.cases:
            if not case.call.startswith("submit"):
                orders += self._of_webhook(case, "" if case.call == "poll_payouts: list" else case.intent)
            match case.call:
                case "apply_webhooks: fetch":
                    orders += [OrderedFault(None, "payment_intents.confirm", "timeout_after", case.payment_id)]
                case "confirm: ask":
                    has_happened = (case.turn % 2 == 1 and case.fault in CALL_FAULTS) or case.fault == FIRST
                    orders += [OrderedFault(None, "payment_intents.confirm", timeout(has_happened), case.payment_id)]
                    orders += self._held(case, case.intent)
            if case.fault == FIRST and (late := LATE_WEBHOOKS.get(case.call)):
                orders += [
                    OrderedFault(None, f"webhook:{late}", "delayed", "" if late == "payout.paid" else case.intent)
                ]
        return orders

    async def _cancel(self, pause_seconds: float) -> None:
        orders = []
        for case in self._of("cancel: cancel"):
            orders += self._of_call(case, case.payment_id)
        for case in self._of("cancel: ask"):
            orders += self._order_lost_answer(case, "payment_intents.cancel", case.payment_id)
            orders += self._of_call(case, case.intent)
        await self._act_while_applying(orders, "cancel")
        self.move(pause_seconds)
        await self._act([], "cancel")

    async def _capture(self, pause_seconds: float) -> None:
        sent, asked = self._of("capture: capture"), self._of("capture: ask")
        await self._until(lambda: {case.intent for case in sent + asked} <= self._in_state("authorized"), "confirm")
        for case in sent + asked:
            self._command("capture_payment", case, payment_id=case.payment_id)
        orders = [order for case in sent for order in self._of_call(case, case.payment_id)]
        for case in asked:
            orders += self._order_lost_answer(case, "payment_intents.capture", case.payment_id)
            orders += self._of_call(case, case.intent)
        await self._act_while_applying(orders, "capture")
        self.move(pause_seconds)
        await self._act([], "capture")
        # Before authorizations expire.
        taken = {case.intent for case in sent + asked}
        await self._until(lambda: not taken & (self._in_state("authorized") | self._in_state("processing")), "capture")

    async def _refund(self, pause_seconds: float) -> None:
        sent, asked = self._of("refund: refund"), self._of("refund: look for it")
        polled = self._of("poll_unfinished: fetch refund")
        cases = sent + asked + polled
        await self._until_charged(cases)
        refunds = {case.payment_id: self._command("create_refund", case, payment_id=case.payment_id) for case in cases}
        orders = [order for case in sent for order in self._of_call(case, refunds[case.payment_id])]
        for case in asked:
            orders += self._order_lost_answer(case, "refunds.create", refunds[case.payment_id]) + self._of_call(
                case, ""
            )
        await self._act_while_applying(orders, "refund")
        self.move(pause_seconds)
        await self._act([], "refund")
        made: dict[str, str] = dict(self.conn.execute("select id, provider_id from surety.refunds").fetchall())
        for case in polled:
            case.refund = made[refunds[case.payment_id]]

    async def _dispute(self, pause_seconds: float) -> None:
        """Cardholders dispute; `apply_webhooks` fetches the disputes."""
        calls = (
            "apply_webhooks: fetch dispute",
            "evidence: submit",
            "evidence: fetch",
            "poll_unfinished: fetch dispute",
        )
        cases = [case for call in calls for case in self._of(call)]
        await self._until_charged(cases)
        for case in cases:
            case.dispute = self.sandbox.control("disputes", {"payment_intent": case.intent})["id"]
        fetched = self._of("apply_webhooks: fetch dispute")
        self._wait_for_webhooks("charge.dispute.created", [case for case in cases if case.fault in CALL_FAULTS])
        await self._act([order for case in fetched for order in self._of_call(case, case.dispute)], "apply_webhooks")
        self.move(pause_seconds)
        await self._act([], "apply_webhooks")

    async def _give_evidence(self, pause_seconds: float) -> None:
        sent, asked = self._of("evidence: submit"), self._of("evidence: fetch")
        known: dict[str, str] = dict(self.conn.execute("select provider_id, id from surety.disputes").fetchall())
        orders = []
        for case in sent + asked:
            said = {"uncategorized_text": ("winning_evidence", "losing_evidence")[case.turn % 2]}
            self._command("submit_evidence", case, dispute_id=known[case.dispute], evidence=said, submit=True)
            orders += self._of_call(case, known[case.dispute] if case in sent else case.dispute)
            # Its webhooks stay away meanwhile, unless they came first.
            orders += self._held(case, case.intent) if case.fault != FIRST or case in asked else []
        await self._act_while_applying(orders, "evidence")
        self.move(pause_seconds)
        await self._act([], "evidence")

    def _command(self, function: str, case: FaultCase, **asked: Any) -> str:
        """Send a command about a payment; the id of the object in the answer."""
        outcome = command(self.conn, function, self._keys[case.fault], **asked)
        assert outcome["problem"] is None, outcome
        return str(outcome["body"]["id"])

    def _order_lost_answer(self, case: FaultCase, operation: str, match: str) -> list[OrderedFault]:
        """Whether a call took effect is unknown, and no webhook shows it."""
        has_happened = case.turn % 2 == 1 or case.fault == FIRST
        return [OrderedFault(None, operation, timeout(has_happened), match), *self._held(case, case.intent)]

    async def _poll(self, pause_seconds: float) -> None:
        """Payers, banks and the network act without webhooks: polling has to find it."""
        paid, refunded, disputed = (self._of(f"poll_unfinished: fetch{what}") for what in ("", " refund", " dispute"))
        await self._until(lambda: {case.intent for case in paid} <= self._in_state("requires_action"), "confirm")
        self._order([order for case in refunded + disputed for order in self._held(case, case.intent)])
        for case in paid:
            self._pay_at_the_bank(case.intent)
        for case in refunded:
            self.sandbox.control(f"refunds/{case.refund}", {"outcome": ("succeeded", "failed")[case.turn % 2]})
        for case in disputed + self._of("apply_webhooks: fetch dispute"):
            self.sandbox.control(f"disputes/{case.dispute}", {"outcome": ("won", "lost")[case.turn % 2]})
        self.move(LATER)
        orders = [order for case in paid for order in self._of_call(case, case.intent)]
        orders += [order for case in refunded for order in self._of_call(case, case.refund)]
        self._order(orders + [order for case in disputed for order in self._of_call(case, case.dispute)])
        await poll_unfinished(self.worker)
        self._count()
        self.move(pause_seconds)

    async def _read(self, read: PeriodicJob, pairs: list[tuple[str, str]], pause_seconds: float) -> None:
        """Run a periodic job that reads lists. Lists cover all payments, so each fault has an account of its own."""
        asked = [pair for pair in pairs if pair[1] in CALL_FAULTS]
        self._order([OrderedFault((call, fault), CALLS[call].operation, CALL_FAULTS[fault]) for call, fault in asked])
        await read(self.worker)
        self._count()
        self._clear_faults()
        self.move(pause_seconds)

    # --- ends

    async def heal(self) -> None:
        """Advance the clock without faults until every payment has ended."""
        self._orders = [order for order in self._orders if order.pair is not None]
        self._clear_faults()
        for _ in range(ROUNDS_MAX):
            self.move(LATER)
            await self.worker.circuit_breaker.report_and_probe()
            await run_until_idle(self.worker)
            for round_ in (poll_unfinished, poll_balance_transactions, recheck_pending_balance, poll_payouts):
                await round_(self.worker)
            if not self.unfinished():
                return

    async def deliver_late_webhooks(self) -> None:
        """Advance the clock by days: delayed and overtaken webhooks are delivered and applied."""
        self.move(DELAY_SECONDS + DAY)
        eventually(lambda: self.sandbox.control("webhooks")["pending"] == 0, 30)
        await self.heal()
        self._count()

    def unfinished(self) -> list[tuple[Any, ...]]:
        """The objects that have not ended."""
        return self.conn.execute(
            """
            select p.id, p.state from surety.payments as p where p.state not in (
                'settled', 'refunded', 'reversed', 'failed')
            union all
            select r.id, r.state from surety.refunds as r where r.state in ('pending', 'requires_action')
            union all
            select d.id, d.status from surety.disputes as d where d.status not in ('won', 'lost')
            union all
            select r.event_id, r.handler from outbox.retries as r
            union all
            select b.id::text, b.handler from outbox.batches as b
            union all
            select d.event_id, d.handler || ': ' || d.reason from outbox.dead_letters as d where d.closed_at is null
            """
        ).fetchall()

    def move(self, seconds: float) -> None:
        """Move our clock and the provider's."""
        self._ahead_seconds += seconds
        self.conn.execute(
            "insert into surety.clock (ahead) values (make_interval(secs => %s))"
            " on conflict (kind) do update set ahead = excluded.ahead",
            (self._ahead_seconds,),
        )
        self.conn.execute("select surety.maintain_partitions()")
        if seconds:
            self.sandbox.control("clock", {"advance": seconds})

    # --- orders

    def _of(self, call: str) -> list[FaultCase]:
        return [case for case in self.cases if case.call == call]

    def _of_call(self, case: FaultCase, match: str) -> list[OrderedFault]:
        """The fault of the call itself, if the case is about one. No webhook replaces a poll after a day."""
        fault = CALL_FAULTS.get(case.fault)
        if fault is None:
            return []
        operation = CALLS[case.call].operation
        is_sent = not operation.endswith((".list", ".retrieve"))
        held = self._held(case, case.intent or case.payment_id) if is_sent and case.fault == LATE else []
        return [OrderedFault((case.call, case.fault), operation, fault, match), *held]

    def _of_webhook(self, case: FaultCase, match: str) -> list[OrderedFault]:
        """The fault of the call's webhook, if the case is about one."""
        fault = WEBHOOK_FAULTS.get(case.fault)
        if fault is None:
            return []
        call = CALLS[case.call]
        type_ = call.overtaken if fault == "reordered" else call.webhook
        return [OrderedFault((case.call, case.fault), f"webhook:{type_}", fault, match)]

    def _held(self, case: FaultCase, match: str) -> list[OrderedFault]:
        """All webhooks of a payment delayed, so that none of them spares us the question that the case is about."""
        is_about_webhooks = case.fault in WEBHOOK_FAULTS
        return [] if is_about_webhooks else [OrderedFault(None, "webhook", "delayed", match, 20)]

    def _clear_faults(self) -> None:
        """Remove unused faults of calls, so that no later call gets them. Faults of webhooks stay."""
        self._orders = [order for order in self._orders if order.operation.startswith("webhook")]
        self._order([])

    def _order(self, orders: list[OrderedFault]) -> None:
        self._count()
        self._orders += orders
        self.sandbox.control("faults", {"next": [order.as_json() for order in self._orders]})

    def _count(self) -> None:
        """Count the ordered faults that the sandbox has injected."""
        left: Counter[tuple[str, str, str]] = Counter()
        for order in self.sandbox.control("faults")["next"]:
            left[order["operation"], order["fault"], order.get("match", "")] += order.get("times", 1)
        for order in reversed(self._orders):
            stays = min(order.times, left[order.key])
            left[order.key] -= stays
            if order.pair is not None:
                self.counts[order.pair] += order.times - stays
            order.times = stays
        self._orders = [order for order in self._orders if order.times]

    # --- acts

    async def _act(self, orders: list[OrderedFault], *handlers: str) -> None:
        self._order(orders)
        await run_until_idle(self.worker, *handlers)
        self._count()

    async def _act_while_applying(self, orders: list[OrderedFault], handler: str) -> None:
        """Work a handler off while webhooks are applied as they come, so that they may come before the answer."""
        self._order(orders)
        done = asyncio.Event()

        async def apply() -> None:
            while not done.is_set():
                await run_until_idle(self.worker, "apply_webhooks")
                await asyncio.sleep(0.02)

        applying = asyncio.create_task(apply())
        try:
            await run_until_idle(self.worker, handler)
        finally:
            done.set()
            await applying
        self._count()

    async def _until(self, is_so: Callable[[], bool], handler: str) -> None:
        """Advance the clock and run a handler until the condition holds."""
        for _ in range(ROUNDS_MAX):
            if is_so():
                return
            self.move(SOON)
            await self.worker.circuit_breaker.report_and_probe()
            await self._act([], handler)

    async def _until_charged(self, cases: list[FaultCase]) -> None:
        wanted = {case.intent for case in cases}
        await self._until(lambda: wanted <= self._in_state("confirmed") | self._in_state("settled"), "confirm")

    def _in_state(self, state: str) -> set[str]:
        """The intents of payments in a state."""
        return {
            row[0] for row in self.conn.execute("select provider_id from surety.payments where state = %s", (state,))
        }

    def _wait_for_webhooks(self, type_: str, cases: list[FaultCase]) -> None:
        """Wait for the webhooks that announce the objects of these cases, unless a confirmation was slow."""
        query = "select count(*) from surety.provider_events where type = %s and body like any(%s)"
        wanted = [f"%{case.intent}%" for case in cases]
        wait_until(lambda: self.conn.execute(query, (type_, wanted)).fetchone() == (len(cases),), 5)

    def _pay_at_the_bank(self, intent: str) -> None:
        url = self.conn.execute(
            "select next_action ->> 'url' from surety.payments where provider_id = %s", (intent,)
        ).fetchone()
        assert url is not None and url[0] is not None, intent
        answer = self.sandbox.client.post(url[0], data={"outcome": "approve"})
        assert answer.status_code < 400, answer.text


def timeout(has_happened: bool) -> str:
    """The name of a fault that leaves the outcome unknown."""
    return "timeout_after" if has_happened else "timeout_before"


def table(counts: Counter[tuple[str, str]]) -> list[str]:
    """The counts, calls downwards and faults across, the faults' names above in numbers."""
    lines = [f"{number:>2} {fault}" for number, fault in enumerate(FAULTS, 1)]
    width = max(map(len, CALLS)) + 2
    head = " " * width + "".join(f"{number:>4}" for number in range(1, len(FAULTS) + 1))
    rows = [f"{call:<{width}}" + "".join(f"{counts[call, fault]:>4}" for fault in FAULTS) for call in CALLS]
    return [*lines, "", head, *rows]
