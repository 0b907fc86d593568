"""Polling of unfinished objects and of the provider's lists. It finds every change whose webhook was lost.

poll_unfinished            fetches unfinished payments, refunds and disputes
poll_events                reads the list of events, for those that no webhook brought
poll_balance_transactions  reads the list of balance transactions, and the refunds that it shows
recheck_pending_balance    reads balance transactions again that should be available by now
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Literal, assert_never

from msgspec import Struct, field
from psycopg.types.json import Jsonb

from db.errors import error_text, is_retryable
from jobs.handlers.calls import (
    CallSubject,
    call_result,
    failed_call_result,
    not_sent_result,
    run_calls,
)
from jobs.handlers.payments import intent_error_result, intent_result
from jobs.handlers.webhooks import facts_of_row, fetch_dispute, fetch_result, store_polled_events
from jobs.recorder import CallResult, unreadable_object
from jobs.stripe.client import CLOCK_AHEAD_SECONDS_MAX, CLOCK_SKEW_SECONDS, ListPage, ProviderResponse
from jobs.stripe.errors import AccessRefused, ObjectAbsent, ObjectUnreadable, ProviderError
from jobs.stripe.facts import Fact, FactOrigin, Json, listed_transaction_facts, refund_facts
from jobs.stripe.webhook_events import POLLED_EVENTS, ProviderObject
from jobs.worker import Worker

log = logging.getLogger("surety.polling")

POLL_BATCH_MAX = 200
PENDING_TRANSACTIONS_MAX = 1000
# Each reading of a list overlaps the last one by this many poll intervals, because a list may show a row late.
OVERLAP_POLLS = 3
RANGE_GAP_MAX = timedelta(hours=1)
# A greater difference is a moved clock of a test, or an unusable Date header.
CLOCK_AHEAD_MAX = timedelta(seconds=CLOCK_AHEAD_SECONDS_MAX)


class ObjectToPoll(CallSubject, kw_only=True):
    """A row of surety.claim_objects_to_poll."""

    kind: Literal["payment", "refund", "dispute"]
    subject_id: str
    intent_id: str | None
    first_sent_at: datetime | None
    last_sent_at: datetime | None
    begun_at: float = field(default_factory=time.monotonic)

    @property
    def operation(self) -> str:
        """The name of the poll in the audit trail."""
        return "fetch" if self.kind == "payment" else f"fetch {self.kind}"


class PollWindow(Struct):
    """A row of surety.poll_windows."""

    account: str
    read_from: datetime
    read_to: datetime


class PendingTransaction(Struct):
    """A row of surety.claim_pending_money."""

    account: str
    created_at: datetime


async def poll_unfinished(worker: Worker) -> None:
    """Fetch unfinished payments, refunds and disputes that are due; all end even if every webhook is lost."""
    while not worker.stopping.is_set() and (
        targets := await worker.database.rows(
            ObjectToPoll,
            "select kind, subject_id, payment_id, provider_id, intent_id, account, amount_minor, currency, livemode,"
            " first_sent_at, last_sent_at from surety.claim_objects_to_poll(%s)",
            POLL_BATCH_MAX,
        )
    ):
        asked = [audit_entry_of_call(target.operation, target.payment_id) for target in targets]
        await write_audit_entries(worker, asked)
        works = [partial(poll_object, worker, target) for target in targets]
        await run_calls(works, partial(record_poll_results, worker))


async def poll_object(worker: Worker, target: ObjectToPoll) -> list[CallResult]:
    """The result of fetching one object."""
    if target.account in worker.circuit_breaker.blocked:
        return [not_sent_result(target, target.operation)]
    read: Callable[[ProviderResponse], CallResult]
    match target.kind:
        case "payment":
            response = locate_intent(worker, target)
            read = partial(intent_result, target, source="poll")
        case "refund":
            response = locate_refund(worker, target)
            read = partial(polled_refund_result, target)
        case "dispute":
            response = fetch_polled_dispute(worker, target)
            read = fetch_result
        case _:
            assert_never(target.kind)
    explain = partial(poll_error_result, target)
    return [await call_result(target, target.operation, response, read=read, explain=explain)]


def poll_error_result(target: ObjectToPoll, error: ProviderError) -> CallResult:
    """A poll without a usable response. An object that is another, or can't be read, is a discrepancy."""
    if target.kind == "payment":
        return intent_error_result(target, error, target.operation)
    result = failed_call_result(target.account, error)
    if isinstance(error, ObjectUnreadable) and target.provider_id is not None:
        result |= unreadable_object(target.provider_id, error)
    return result


async def fetch_polled_dispute(worker: Worker, target: ObjectToPoll) -> ProviderResponse:
    """The dispute as it is at the provider; its facts are recorded by the fetch."""
    assert target.provider_id is not None
    dispute = ProviderObject(target.account, target.livemode, "dispute", target.provider_id)
    return await fetch_dispute(worker, dispute, FactOrigin(target.account, target.livemode, "poll"))


def polled_refund_result(target: ObjectToPoll, answer: ProviderResponse) -> CallResult:
    """The refund's facts; none if the answer is another refund."""
    result = fetch_result(answer)
    if target.provider_id not in {None, answer.body.get("id")}:
        return result
    return result | facts_of_row(answer.body, FactOrigin(target.account, target.livemode, "poll"), refund_facts)


async def locate_refund(worker: Worker, target: ObjectToPoll) -> ProviderResponse:
    """The refund as it is at the provider. Raises ObjectAbsent if it never arrived there."""
    if target.provider_id is not None:
        return await worker.stripe.fetch(target.account, "refunds", target.provider_id)
    assert target.intent_id is not None
    found = await worker.stripe.find_refund(target.account, target.intent_id, target.subject_id)
    if found is None:
        raise ObjectAbsent(f"{target.intent_id} has no refund {target.subject_id}")
    return found


async def locate_intent(worker: Worker, target: ObjectToPoll) -> ProviderResponse:
    """The payment's intent as it is at the provider. Raises ObjectAbsent if it never arrived there."""
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
    """Events of the provider that no webhook has brought."""
    for window in await poll_windows(worker, "events"):
        pages = worker.stripe.events(window.account, window.read_from, sorted(POLLED_EVENTS))
        take = partial(store_polled_events, worker, window.account)
        await read_window(worker, "events", window, pages, take)


async def poll_balance_transactions(worker: Worker) -> None:
    """Balance transactions, which no webhook reports, by the time of their creation."""
    for window in await poll_windows(worker, "balance_transactions"):
        pages = worker.stripe.balance_transactions(window.account, window.read_from)
        take = partial(record_page, worker, window.account, listed_transaction_facts)
        await read_window(worker, "balance_transactions", window, pages, take)


async def recheck_pending_balance(worker: Worker) -> None:
    """Balance transactions that should be available by now, read by ranges of their creation times."""
    due = await worker.database.rows(
        PendingTransaction,
        "select account, created_at from surety.claim_pending_money(%s, make_interval(secs => %s))",
        PENDING_TRANSACTIONS_MAX,
        worker.settings.surety_poll_seconds,
    )
    for account in sorted({line.account for line in due}):
        if account in worker.circuit_breaker.blocked:
            continue
        for since, until in merge_time_ranges([line.created_at for line in due if line.account == account]):
            pages = worker.stripe.balance_transactions(account, since, until)
            take = partial(record_page, worker, account, listed_transaction_facts)
            name = "pending_balance_transactions"
            if not await read_pages(worker, name, account, since, pages, take):
                break
        else:
            await advance_poll_cursor(worker, PollWindow(account, since, until), name)


async def record_page(
    worker: Worker, account: str, read: Callable[[Json, FactOrigin], list[Fact]], page: list[Json]
) -> None:
    """Record the facts of a list's objects."""
    origin = FactOrigin(account, worker.stripe.livemode, "poll")
    await record_poll_results(worker, [facts_of_row(line, origin, read) for line in page])


async def read_window(
    worker: Worker,
    name: str,
    window: PollWindow,
    pages: AsyncGenerator[ListPage],
    take: Callable[[list[Json]], Awaitable[None]],
) -> None:
    """Read an account's list from the window's begin; move its cursor if the end was reached.

    The cursor is a time of the provider's clock, since the list has the provider's times: that of the first answer.
    """
    began: list[datetime] = []

    async def noting_begin() -> AsyncGenerator[ListPage]:
        async for page in pages:
            if not began and page.answered_at is not None:
                began.append(page.answered_at)
            yield page

    if await read_pages(worker, name, window.account, window.read_from, noting_begin(), take):
        read_to = window.read_to - timedelta(seconds=CLOCK_SKEW_SECONDS)
        if began:
            read_to = began[0]
            ahead = read_to - window.read_to
            worker.stripe.clock_ahead_seconds = ahead.total_seconds() if abs(ahead) < CLOCK_AHEAD_MAX else 0.0
        await advance_poll_cursor(worker, PollWindow(window.account, window.read_from, read_to), name)


async def read_pages(
    worker: Worker,
    name: str,
    account: str,
    since: datetime,
    pages: AsyncGenerator[ListPage],
    take: Callable[[list[Json]], Awaitable[None]],
) -> bool:
    """Read a list of the provider page by page; returns whether it was read to its end. If not, the reason is noted.

    If the provider refuses it, the account is probed, so an idle system notices that our access has ended.
    An error that a repetition may mend ends the periodic job; any other ends only the reading of this account's list.
    """
    if account in worker.circuit_breaker.blocked:
        return False
    operation = f"list {name.replace('_', ' ')}"
    await write_audit_entries(worker, [audit_entry_of_call(operation, None, account=account, since=since.isoformat())])
    began, rows, is_refused = time.monotonic(), 0, False
    try:
        async for page in pages:
            rows += len(page.rows)
            await take(page.rows)
        result: CallResult = {"outcome": "answered", "snapshot": {"account": account, "rows": rows}}
    except ProviderError as error:
        result = {"outcome": error.outcome, "status": error.status, "error": str(error)}
        is_refused = isinstance(error, AccessRefused)
    except Exception as error:
        if is_retryable(error):
            raise
        log.exception("%s of account %r", operation, account)
        result = {"outcome": "error", "error": error_text(error)}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    await record_poll_results(worker, [{"operation": operation, "duration_ms": duration_ms, **result}])
    if is_refused:
        await worker.circuit_breaker.check_accounts([(account, time.monotonic())])
    if "error" in result:
        query = "select surety.note_unreadable_list('stripe', %s, %s, %s, %s)"
        await worker.database.value(query, account, name, result["error"], is_refused)
    return "error" not in result


async def poll_windows(worker: Worker, name: str) -> list[PollWindow]:
    """The accounts whose list is to be read, and from when."""
    overlap = timedelta(seconds=OVERLAP_POLLS * worker.settings.surety_poll_seconds)
    query = "select account, read_from, read_to from surety.poll_windows(%s, %s)"
    return await worker.database.rows(PollWindow, query, name, overlap)


async def advance_poll_cursor(worker: Worker, window: PollWindow, name: str) -> None:
    """Note that an account's list was read up to the window's end."""
    await worker.database.value(
        "select surety.advance_poll_cursor('stripe', %s, %s, %s)", window.account, name, window.read_to
    )


def merge_time_ranges(moments: list[datetime]) -> list[tuple[datetime, datetime]]:
    """The shortest time ranges that hold all moments, split where a gap exceeds one hour."""
    found: list[tuple[datetime, datetime]] = []
    for moment in sorted(moments):
        if found and moment - found[-1][1] <= RANGE_GAP_MAX:
            found[-1] = (found[-1][0], moment)
        else:
            found.append((moment, moment))
    return found


def audit_entry_of_call(operation: str, payment_id: str | None, **more: Json | str) -> Json:
    """The audit entry of a call that is about to be made."""
    return {"kind": "call", "payment_id": payment_id, "outcome": "asked", "snapshot": {"operation": operation, **more}}


async def write_audit_entries(worker: Worker, entries: list[Json]) -> None:
    """Write audit entries."""
    if entries:
        signed = [entry | {"actor": worker.actor} for entry in entries]
        await worker.database.value("select audit.write_entries(%s)", Jsonb(signed))


async def record_poll_results(worker: Worker, results: list[CallResult]) -> None:
    """Record results that belong to no event."""
    failed = [(result.pop("failed_call"), "access_refused" in result) for result in results if "failed_call" in result]
    await worker.circuit_breaker.check_accounts(call for call, is_refused in failed if is_refused)
    if results:
        await worker.recorder.record(results)
