"""What nobody has to ask for.

Each of these rounds is a job that runs in one worker at a time, whichever takes it; one that finds another under way
leaves it alone. How often the provider is asked is SURETY_POLL_SECONDS.

    schedule_due_handlers              wakes handlers that have due work             every second
    poll_unfinished            asks about unfinished payments, refunds and disputes
    poll_events                reads the provider's list of events, for what no webhook has result
    poll_balance_transactions  reads what moved in the provider's balance
    recheck_pending_balance    looks again at what should be available by now
    poll_payouts               reads what was sent to the bank
    retry_unmatched_facts      facts that found no payment, once more
    check_deadlines            what should have followed, payers who don't act, evidence that is due
    maintain                   partitions ahead, what may be forgotten       every hour
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any, LiteralString, TypeVar

from msgspec import Struct, field
from procrastinate import JobContext
from procrastinate.tasks import Task
from psycopg.types.json import Jsonb

from db.settings import Settings
from jobs import WorkerApp, app
from jobs.database import bisect_on_error
from jobs.handlers.calls import CallResult, CallSubject, call_result, completed_groups, not_sent_result
from jobs.handlers.payments import intent_error_result, intent_result
from jobs.handlers.webhooks import POLLED_EVENTS, ProviderObject, fetch_dispute, store_polled_events
from jobs.stripe.client import ObjectAbsent, ProviderError, ProviderResponse
from jobs.stripe.facts import Fact, FactOrigin, Json, balance_transaction_facts, payout_facts, redacted, refund_facts
from jobs.worker import Worker, worker_of

log = logging.getLogger("surety.polling")

POLL_BATCH_MAX = 200
PENDING_TRANSACTIONS_MAX = 1000
# Every reading of a list overlaps the last by so many polls: a list may show a row late, a clock may be behind.
OVERLAP_POLLS = 3
RANGE_GAP_MAX = timedelta(hours=1)
MINUTE = 60
# How long before its deadline a dispute's missing evidence is reported.
EVIDENCE_REMINDER_LEAD = timedelta(days=3)

PeriodicJob = Callable[[Worker], Awaitable[None]]


class PaymentToPoll(CallSubject, kw_only=True):
    """A row of surety.claim_payments_to_poll."""

    first_sent_at: datetime | None
    last_sent_at: datetime | None
    begun_at: float = field(default_factory=time.monotonic)


class RefundToPoll(Struct):
    """A row of surety.claim_refunds_to_poll."""

    refund_id: str
    payment_id: str
    provider_id: str | None
    intent_id: str
    account: str
    livemode: bool


class DisputeToPoll(Struct):
    """A row of surety.claim_disputes_to_poll."""

    payment_id: str
    provider_id: str
    account: str
    livemode: bool


ToPoll = TypeVar("ToPoll", PaymentToPoll, RefundToPoll, DisputeToPoll)


class PollWindow(Struct):
    """A row of surety.poll_windows."""

    account: str
    read_from: datetime
    read_to: datetime


class PendingTransaction(Struct):
    """A row of surety.claim_pending_money."""

    account: str
    created_at: datetime


async def schedule_due_handlers(worker: Worker) -> None:
    """Wake the handlers that have due work: what a kick missed, what is due again, what a dead worker left."""
    await worker.database.value("select outbox.schedule_due_handlers()")


async def poll_unfinished(worker: Worker) -> None:
    """Ask about what is unfinished: all would end even if every webhook were lost."""
    await poll_objects(
        worker, PaymentToPoll, "fetch", poll_payment,
        "select payment_id, provider_id, account, amount_minor, currency, livemode, first_sent_at, last_sent_at"
        " from surety.claim_payments_to_poll(%s)",
    )  # fmt: skip
    await poll_objects(
        worker, RefundToPoll, "fetch refund", poll_refund,
        "select refund_id, payment_id, provider_id, intent_id, account, livemode"
        " from surety.claim_refunds_to_poll(%s)",
    )  # fmt: skip
    await poll_objects(
        worker, DisputeToPoll, "fetch dispute", poll_dispute,
        "select payment_id, provider_id, account, livemode from surety.claim_disputes_to_poll(%s)",
    )  # fmt: skip


async def poll_objects(
    worker: Worker,
    kind: type[ToPoll],
    operation: str,
    poll_one: Callable[[Worker, ToPoll], Awaitable[list[CallResult]]],
    claim: LiteralString,
) -> None:
    """Ask whatever is due, a bounded number of questions at once, and record what is answered."""
    while not worker.stopping.is_set() and (targets := await worker.database.rows(kind, claim, POLL_BATCH_MAX)):
        await write_audit_entries(worker, [audit_entry_of_call(operation, target.payment_id) for target in targets])
        async for results in completed_groups([partial(poll_one, worker, target) for target in targets]):
            await record_poll_results(worker, results)


async def poll_dispute(worker: Worker, target: DisputeToPoll) -> list[CallResult]:
    """What the provider says about one dispute."""
    source = ProviderObject(target.account, target.livemode, "dispute", target.provider_id)
    began = time.monotonic()
    try:
        result = await fetch_dispute(worker, source, FactOrigin(target.account, target.livemode, "poll"))
    except ProviderError as error:
        result = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    except (KeyError, TypeError, AttributeError) as error:
        result = {"outcome": "unknown"} | unreadable_object(target.provider_id, error)
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    return [{"payment_id": target.payment_id, "operation": "fetch dispute", "duration_ms": duration_ms, **result}]


async def poll_refund(worker: Worker, target: RefundToPoll) -> list[CallResult]:
    """What the provider says about one refund."""
    origin = FactOrigin(target.account, target.livemode, "poll")
    began = time.monotonic()
    result: CallResult
    try:
        answer = await locate_refund(worker, target)
        result = {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body)}
        if target.provider_id in {None, answer.body.get("id")}:
            result |= facts_of_row(answer.body, origin, refund_facts)
    except ProviderError as error:
        result = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    return [{"payment_id": target.payment_id, "operation": "fetch refund", "duration_ms": duration_ms, **result}]


async def locate_refund(worker: Worker, target: RefundToPoll) -> ProviderResponse:
    """The refund as it is at the provider. Raises ObjectAbsent if it never came there."""
    if target.provider_id is not None:
        return await worker.stripe.fetch(target.account, "refunds", target.provider_id)
    found = await worker.stripe.find_refund(target.account, target.intent_id, target.refund_id)
    if found is None:
        raise ObjectAbsent(f"{target.intent_id} has no refund {target.refund_id}")
    return found


async def poll_payment(worker: Worker, target: PaymentToPoll) -> list[CallResult]:
    """What the provider says about one payment."""
    if target.account in worker.breaker.blocked:
        return [not_sent_result(target, "fetch")]
    read, explain = (
        partial(intent_result, target, source="poll"),
        partial(intent_error_result, target, operation="fetch"),
    )
    return [await call_result(target, "fetch", locate_intent(worker, target), read=read, explain=explain)]


async def locate_intent(worker: Worker, target: PaymentToPoll) -> ProviderResponse:
    """The payment's intent as it is at the provider. Raises ObjectAbsent if it never came there."""
    if target.provider_id is not None:
        return await worker.stripe.fetch_intent(target.account, target.provider_id)
    assert target.first_sent_at is not None
    assert target.last_sent_at is not None
    sent = target.first_sent_at, target.last_sent_at
    found = await worker.stripe.find_intent(target.account, target.payment_id, *sent, target.begun_at)
    if found is None:
        raise ObjectAbsent(f"no intent is made for {target.payment_id}")
    return found


async def poll_events(worker: Worker) -> None:
    """What the provider reported and no webhook brought: all would be known even if every webhook were lost."""
    for window in await poll_windows(worker, "events"):
        pages = worker.stripe.events(window.account, window.read_from, sorted(POLLED_EVENTS))
        take = partial(store_polled_events, worker, window.account)
        if await read_pages(worker, "list events", window.account, window.read_from, pages, take):
            await advance_poll_cursor(worker, window, "events")


async def poll_balance_transactions(worker: Worker) -> None:
    """Balance transactions, which no webhook tells of, by the time of their creation."""
    for window in await poll_windows(worker, "balance_transactions"):
        if await read_balance_transactions(worker, window.account, window.read_from):
            await advance_poll_cursor(worker, window, "balance_transactions")


async def recheck_pending_balance(worker: Worker) -> None:
    """Balance transactions that should have become available. They lie close together, so lists find them."""
    due = await worker.database.rows(
        PendingTransaction,
        "select account, created_at from surety.claim_pending_money(%s, make_interval(secs => %s))",
        PENDING_TRANSACTIONS_MAX,
        worker.settings.surety_poll_seconds,
    )
    for account in sorted({line.account for line in due}):
        for since, until in merge_time_ranges([line.created_at for line in due if line.account == account]):
            await read_balance_transactions(worker, account, since, until)


async def poll_payouts(worker: Worker) -> None:
    """What the provider sent to the bank."""
    for window in await poll_windows(worker, "payouts"):
        pages = worker.stripe.payouts(window.account, window.read_from)
        take = partial(record_page, worker, window.account, payout_facts)
        if await read_pages(worker, "list payouts", window.account, window.read_from, pages, take):
            await advance_poll_cursor(worker, window, "payouts")


async def retry_unmatched_facts(worker: Worker) -> None:
    """Facts that found no payment, once more."""
    await worker.schedule_handlers_for(await worker.database.value("select surety.retry_unmatched_facts()"))


async def check_deadlines(worker: Worker) -> None:
    """What should have followed by now and didn't; payers who were asked to act and don't."""
    await worker.database.value("select surety.open_overdue_discrepancies()")
    query = "select surety.cancel_expired_actions(make_interval(secs => %s))"
    await worker.schedule_handlers_for(await worker.database.value(query, worker.settings.surety_action_seconds))
    await worker.schedule_handlers_for(
        await worker.database.value("select surety.emit_evidence_reminders(%s)", EVIDENCE_REMINDER_LEAD)
    )


async def maintain(worker: Worker) -> None:
    """Partitions for the months ahead; what need not be remembered any longer."""
    await worker.database.value("select surety.maintain_partitions()")
    await worker.database.value("select surety.delete_expired_idempotency_keys()")
    await worker.database.value("select outbox.delete_orphaned_jobs()")


async def read_balance_transactions(
    worker: Worker, account: str, since: datetime, until: datetime | None = None
) -> bool:
    """Record what moved in an account's balance; whether the provider returned all of it."""
    pages = worker.stripe.balance_transactions(account, since, until)
    take = partial(record_page, worker, account, balance_transaction_facts)
    return await read_pages(worker, "list balance transactions", account, since, pages, take)


async def record_page(
    worker: Worker, account: str, read: Callable[[Json, FactOrigin], list[Fact]], page: list[Json]
) -> None:
    """Record what the objects of a list say."""
    origin = FactOrigin(account, worker.stripe.livemode, "poll")
    await record_poll_results(worker, [facts_of_row(line, origin, read) for line in page])


async def read_pages(
    worker: Worker,
    operation: str,
    account: str,
    since: datetime,
    pages: AsyncGenerator[list[Json]],
    take: Callable[[list[Json]], Awaitable[None]],
) -> bool:
    """Take a list of the provider's page by page; whether it could be read to its end."""
    await write_audit_entries(worker, [audit_entry_of_call(operation, None, account=account, since=since.isoformat())])
    began, rows = time.monotonic(), 0
    try:
        async for page in pages:
            rows += len(page)
            await take(page)
        result: CallResult = {"outcome": "answered", "snapshot": {"account": account, "rows": rows}}
    except ProviderError as error:
        result = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    await record_poll_results(worker, [{"operation": operation, "duration_ms": duration_ms, **result}])
    return bool(result["outcome"] == "answered")


def facts_of_row(line: Json, origin: FactOrigin, read: Callable[[Json, FactOrigin], list[Fact]]) -> CallResult:
    """The facts of one object of a list; one that can't be read is a discrepancy, and stands in nobody's way."""
    try:
        return {"facts": read(line, origin)}
    except (KeyError, TypeError, AttributeError) as error:
        return unreadable_object(line["id"], error)


def unreadable_object(object_id: str, error: Exception) -> CallResult:
    """Something of the provider's that we can't make sense of, so it isn't booked."""
    detail = f"{object_id} can't be recorded: {type(error).__name__} {error}"
    return {"discrepancy": {"kind": "unmatched_cash", "subject": object_id, "detail": detail[:500]}}


async def poll_windows(worker: Worker, name: str) -> list[PollWindow]:
    """The accounts whose list is to be read, and from when."""
    overlap = timedelta(seconds=OVERLAP_POLLS * worker.settings.surety_poll_seconds)
    query = "select account, read_from, read_to from surety.poll_windows(%s, %s)"
    return await worker.database.rows(PollWindow, query, name, overlap)


async def advance_poll_cursor(worker: Worker, window: PollWindow, name: str) -> None:
    """An account's list was read up to now."""
    await worker.database.value(
        "select surety.advance_poll_cursor('stripe', %s, %s, %s)", window.account, name, window.read_to
    )


def merge_time_ranges(moments: list[datetime]) -> list[tuple[datetime, datetime]]:
    """The stretches of time in which moments lie, without a gap of more than an hour."""
    found: list[tuple[datetime, datetime]] = []
    for moment in sorted(moments):
        if found and moment - found[-1][1] <= RANGE_GAP_MAX:
            found[-1] = (found[-1][0], moment)
        else:
            found.append((moment, moment))
    return found


def audit_entry_of_call(operation: str, payment_id: str | None, **more: Json | str) -> Json:
    """What the audit trail keeps of a target."""
    return {"kind": "call", "payment_id": payment_id, "outcome": "asked", "snapshot": {"operation": operation, **more}}


async def write_audit_entries(worker: Worker, entries: list[Json]) -> None:
    """Tell the audit trail."""
    if entries:
        result = [entry | {"actor": worker.actor} for entry in entries]
        await worker.database.value("select audit.write_entries(%s)", Jsonb(result))


async def record_poll_results(worker: Worker, results: list[CallResult]) -> None:
    """Record what came of questions that belong to no event, and wake who is concerned."""

    async def write(results: list[CallResult]) -> None:
        query = "select surety.record_call_results(%s, %s)"
        await worker.schedule_handlers_for(await worker.database.value(query, worker.actor, Jsonb(results)))

    async def give_up(result: CallResult, error: Exception) -> None:
        log.error("%s can't be recorded", result.get("payment_id", "a row"), exc_info=error)
        await write([unreadable_object(fact["object_id"], error) for fact in result.get("facts", [])[:1]])

    if results:
        await bisect_on_error(results, write, give_up)


PERIODIC_JOBS: tuple[PeriodicJob, ...] = (
    schedule_due_handlers,
    poll_unfinished,
    poll_events,
    poll_balance_transactions,
    recheck_pending_balance,
    poll_payouts,
    retry_unmatched_facts,
    check_deadlines,
    maintain,
)


def as_periodic_task(work: PeriodicJob, name: str) -> Task[Any, Any, Any]:
    """A round as a task of Procrastinate's: at most one waits, at most one runs."""

    async def run(context: JobContext, /, timestamp: int) -> None:
        worker = worker_of(context)
        async with worker.database.try_lock(name) as is_locked:
            if is_locked:
                await work(worker)

    return app.task(name=name, queue="periodic", queueing_lock=name, pass_context=True)(run)


PERIODIC_TASKS = {work.__name__: as_periodic_task(work, work.__name__) for work in PERIODIC_JOBS}


def schedule_periodic_tasks(workers: WorkerApp, settings: Settings) -> None:
    """Say when each round begins; a later start of a worker in the same process says it anew."""
    poll = cron(settings.surety_poll_seconds)
    workers.periodic_registry.periodic_tasks.clear()
    for name, task in PERIODIC_TASKS.items():
        when = {"schedule_due_handlers": cron(1), "maintain": "0 * * * *"}.get(name, poll)
        workers.periodic(cron=when)(task)


def cron(seconds: int) -> str:
    """Every so many seconds, below a minute; whole minutes above. Procrastinate's crontab has the seconds last."""
    return f"* * * * * */{seconds}" if seconds < MINUTE else f"*/{min(59, seconds // MINUTE)} * * * *"
