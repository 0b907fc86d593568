"""Periodic jobs: how often each runs, and the upkeep among them.

All run in one worker, the leader (leader.py). Those without a time below run every SURETY_POLL_SECONDS.

    schedule_due_handlers      schedules handlers that have due work             every second (leader.py)
    poll_…, recheck_…          reads from the provider (jobs/polling.py, jobs/payouts.py)
    read_payout_lines          reads the balance transactions of payouts (jobs/payouts.py)
    retry_unmatched_facts      matches facts again that found no payment
    check_deadlines            expected settlements, payers' actions, refused accounts, holds, evidence
    check_provider_key         permissions of the provider's key, own account     every minute, if due (ten minutes)
    maintain                   makes partitions ahead, pays merchants out by
                               schedule, sums the balances of days, deletes
                               expired rows                                       every hour
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import LiteralString

from procrastinate import JobContext

from db.errors import error_text, is_retryable
from db.settings import Settings
from jobs.payouts import poll_payouts, read_payout_lines
from jobs.polling import poll_balance_transactions, poll_events, poll_unfinished, recheck_pending_balance
from jobs.stripe.key_check import check_provider_key_if_due
from jobs.worker import Worker, worker_of

log = logging.getLogger("surety.periodic")

SCHEDULING = "schedule_due_handlers"
INTERVAL_SECONDS = {SCHEDULING: 1, "check_provider_key": 60, "maintain": 3600}
# How long before its deadline a dispute's missing evidence is reported.
EVIDENCE_REMINDER_LEAD = timedelta(days=3)

PeriodicJob = Callable[[Worker], Awaitable[None]]


async def retry_unmatched_facts(worker: Worker) -> None:
    """Match facts again that found no payment."""
    await worker.schedule_handlers_for(await worker.database.value("select surety.retry_unmatched_facts()"))


async def check_deadlines(worker: Worker) -> None:
    """Report overdue settlements, match banks' lines to new payouts, cancel payments whose payer did not act or that
    were on hold for too long, end those whose account is refused, remind merchants of missing evidence.
    """
    await repeat_until_done(worker, "select surety.open_overdue_discrepancies()")
    await worker.database.value("select surety.match_bank_lines()")
    # Each call takes a bounded number of payments or disputes, and returns no event types once none is left.
    query = "select surety.emit_expired_actions(make_interval(secs => %s))"
    while made := await worker.database.value(query, worker.settings.surety_action_seconds):
        await worker.schedule_handlers_for(made)
    while made := await worker.database.value("select surety.end_refused_payments(%s)", worker.actor):
        await worker.schedule_handlers_for(made)
    while made := await worker.database.value("select surety.expire_holds(%s)", worker.actor):
        await worker.schedule_handlers_for(made)
    while made := await worker.database.value("select surety.emit_evidence_reminders(%s)", EVIDENCE_REMINDER_LEAD):
        await worker.schedule_handlers_for(made)


async def maintain(worker: Worker) -> None:
    """Make partitions for the months ahead and the payouts to merchants that are due; sum the days whose postings are
    final; delete expired idempotency keys, old counts, unused rate limits, and the oldest log of deliveries.
    """
    await worker.database.value("select surety.maintain_partitions()")
    while not worker.stopping.is_set() and await worker.database.value(
        "select surety.create_due_merchant_payouts(%s)", worker.actor
    ):
        pass
    await worker.database.value("select ledger.end_days()")
    await repeat_until_done(worker, "select ledger.sum_day()")
    await repeat_until_done(worker, "select surety.delete_expired_idempotency_keys()")
    await worker.database.value("select surety.delete_old_refusals()")
    await worker.database.value("select surety.delete_whole_bursts()")
    await worker.database.value("select surety.delete_old_accepted_money()")
    await worker.database.value("select surety.delete_old_secret_requests()")
    await worker.database.value("select outbox.drop_old_delivery_attempts()")


async def delete_orphaned_jobs(context: JobContext, timestamp: int) -> None:
    """Delete jobs of dead workers from Procrastinate's tables."""
    del timestamp
    await worker_of(context).database.value("select outbox.delete_orphaned_jobs()")


async def repeat_until_done(worker: Worker, query: LiteralString) -> None:
    """Repeat a query, each time a transaction over a bounded number of rows, until it finds none."""
    while not worker.stopping.is_set() and await worker.database.value(query):
        pass


PERIODIC_JOBS: dict[str, PeriodicJob] = {
    "poll_unfinished": poll_unfinished,
    "poll_events": poll_events,
    "poll_balance_transactions": poll_balance_transactions,
    "recheck_pending_balance": recheck_pending_balance,
    "poll_payouts": poll_payouts,
    "read_payout_lines": read_payout_lines,
    "retry_unmatched_facts": retry_unmatched_facts,
    "check_deadlines": check_deadlines,
    "check_provider_key": check_provider_key_if_due,
    "maintain": maintain,
}


async def run_and_record(worker: Worker, name: str, job: PeriodicJob, *, success_is_recorded: bool = False) -> bool:
    """Run a periodic job and record its end for `surety status`; returns whether it succeeded.

    Raises the errors that no repetition may mend.
    """
    try:
        await job(worker)
    except Exception as error:
        failure = error_text(error)
        await record_end(worker, name, failure)
        if not is_retryable(error):
            raise
        log.warning("%s failed: %s", name, failure)
        return False
    if not success_is_recorded:
        await record_end(worker, name, None)
    return True


async def record_end(worker: Worker, name: str, failure: str | None) -> None:
    """Record the end of a periodic job."""
    every = interval_seconds(name, worker.settings)
    query = "select surety.record_periodic_job(%s, make_interval(secs => %s), %s)"
    await worker.database.value(query, name, every, failure)


def interval_seconds(name: str, settings: Settings) -> int:
    """The seconds between two starts of a periodic job."""
    return INTERVAL_SECONDS.get(name, settings.surety_poll_seconds)
