"""The provider's payouts to our bank: their changes, and the balance transactions that each pays out.

poll_payouts       reads the list of payouts, and fetches those again that may have changed since
read_payout_lines  reads the balance transactions of automatic payouts, once the provider has assigned them
"""

from __future__ import annotations

import time
from datetime import datetime
from functools import partial

from msgspec import Struct
from psycopg.types.json import Jsonb

from jobs.handlers.calls import failed_call_result
from jobs.handlers.webhooks import facts_of_row, fetch_object, fetch_result
from jobs.polling import (
    PollWindow,
    advance_poll_cursor,
    audit_entry_of_call,
    poll_windows,
    read_pages,
    read_window,
    record_page,
    record_poll_results,
    write_audit_entries,
)
from jobs.recorder import CallResult
from jobs.stripe.errors import ProviderError
from jobs.stripe.facts import FactOrigin, Json, listed_transaction_facts, payout_facts
from jobs.stripe.webhook_events import ProviderObject
from jobs.worker import Worker

LINES = "payout_balance_transactions"


class PayoutToPoll(Struct):
    """A row of surety.claim_payouts_to_poll."""

    account: str
    payout_id: str
    livemode: bool


class PayoutToRead(Struct):
    """A row of surety.claim_payout_lines."""

    account: str
    payout_id: str
    created_at: datetime


async def poll_payouts(worker: Worker) -> None:
    """Payouts, by the time of their creation; then those that may have failed or got a trace id since."""
    for window in await poll_windows(worker, "payouts"):
        pages = worker.stripe.payouts(window.account, window.read_from)
        take = partial(record_page, worker, window.account, payout_facts)
        await read_window(worker, "payouts", window, pages, take)
    query = "select account, payout_id, livemode from surety.claim_payouts_to_poll()"
    while not worker.stopping.is_set() and (due := await worker.database.rows(PayoutToPoll, query)):
        for payout in due:
            if payout.account not in worker.circuit_breaker.blocked:
                await poll_payout(worker, payout)


async def poll_payout(worker: Worker, payout: PayoutToPoll) -> None:
    """Fetch a payout and record it as it is now."""
    operation = "fetch payout"
    await write_audit_entries(worker, [audit_entry_of_call(operation, None, payout=payout.payout_id)])
    began = time.monotonic()
    result: CallResult
    try:
        answer = await fetch_object(worker, ProviderObject(payout.account, payout.livemode, "payout", payout.payout_id))
        origin = FactOrigin(payout.account, payout.livemode, "poll")
        result = fetch_result(answer) | facts_of_row(answer.body, origin, payout_facts)
    except ProviderError as error:
        result = failed_call_result(payout.account, error)
        if "outage" in result:
            result["failed_call"] = (payout.account, began)
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    await record_poll_results(worker, [{"operation": operation, "duration_ms": duration_ms, **result}])


async def read_payout_lines(worker: Worker) -> None:
    """The balance transactions of payouts, and whether their nets add up to the payout."""
    query = "select account, payout_id, created_at from surety.claim_payout_lines()"
    while not worker.stopping.is_set() and (due := await worker.database.rows(PayoutToRead, query)):
        for payout in due:
            if payout.account in worker.circuit_breaker.blocked:
                continue
            pages = worker.stripe.payout_transactions(payout.account, payout.payout_id)
            take = partial(record_payout_page, worker, payout)
            if await read_pages(worker, LINES, payout.account, payout.created_at, pages, take):
                await worker.database.value("select surety.end_payout_lines(%s, %s)", payout.account, payout.payout_id)
                window = PollWindow(payout.account, payout.created_at, payout.created_at)
                await advance_poll_cursor(worker, window, LINES)


async def record_payout_page(worker: Worker, payout: PayoutToRead, page: list[Json]) -> None:
    """Record a page of a payout's balance transactions: their facts, then that the payout pays them out."""
    await record_page(worker, payout.account, listed_transaction_facts, page)
    lines = [
        {
            "id": line["id"],
            "category": line.get("reporting_category") or "",
            "net": line.get("net") or 0,
            "currency": line.get("currency") or "",
        }
        for line in page
    ]
    await worker.database.value(
        "select surety.record_payout_lines(%s, %s, %s)", payout.account, payout.payout_id, Jsonb(lines)
    )
