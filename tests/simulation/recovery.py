"""Recovery: normal operation without faults until nothing is left to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from jobs.handlers.table import HANDLERS
from tests.simulation.erasures import erase_someone
from tests.simulation.limits import decide_left_holds
from tests.simulation.loop import Killed
from tests.simulation.processes import PERIODIC_JOB_NAMES, WorkerProcess

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

ROUNDS_MAX = 60
# The turn in which banks decide unanswered disputes and operators cancel intents of a wrong amount.
BANKS_DECIDE_TURN = 2
RECOVERY_JOBS = tuple(name for name in PERIODIC_JOB_NAMES if name not in {"poll_payouts", "maintain"})
# In this order each handler finds the events of those before it, and the counting `probe` comes last.
HANDLER_ORDER = tuple(HANDLERS)
# Events in a batch, with faults and without.
FEW, ALL = 3, 100


async def recover(schedule: Schedule) -> None:
    """Operate without faults: workers are replaced, clients repeat requests, time passes, dead letters are replayed."""
    schedule.is_calm, schedule.has_faults = True, False
    schedule.provider.recover()
    schedule.provider.give_access()
    is_crash = schedule.poison_position is None and schedule.chance.random() < 0.5
    for worker in schedule.workers:
        if is_crash:
            schedule.end(worker)
        else:
            worker.stop()
    await asyncio.sleep(1)
    while schedule.unasked:
        schedule.send_request()
    schedule.workers.append(WorkerProcess(schedule, "recovery"))
    for turn in range(ROUNDS_MAX):
        if turn == BANKS_DECIDE_TURN:
            schedule.provider.decide_disputes()
            schedule.provider.cancel_wrong_amounts()
            decide_left_holds(schedule)
            erase_someone(schedule)
        schedule.provider.mailbox += schedule.provider.late
        schedule.provider.late = []
        await schedule.deliver_all()
        schedule.database.set_batch_size(ALL)
        # The scheduler runs each second, the other periodic jobs each minute: due retries run before those jobs.
        if turn <= 1:
            await run_periodic_jobs(schedule, ())
        if turn:
            await run_periodic_jobs(schedule, periodic_jobs_with_work(schedule, turn))
        if turn and await is_finished(schedule):
            break
        schedule.database.rows(
            "select outbox.replay_dead_letter(d.id, 'operator', 'recovered') from outbox.dead_letters as d"
            " where d.closed_at is null and (d.handler <> 'probe' or d.event_id is distinct from %s) order by d.id",
            schedule.poison,
        )
        schedule.move_to(next_due(schedule, 65.0 if not turn else 86_400.0))
        schedule.database.move_clock(schedule.loop.seconds)
        await asyncio.sleep(0)
    else:
        schedule.report_violation("everything unfinished is finished", describe_unfinished(schedule))
    for process in (*schedule.workers, schedule.api, schedule.clients, schedule.provider.process):
        process.kill()
    await asyncio.sleep(0)


def periodic_jobs_with_work(schedule: Schedule, turn: int) -> list[str]:
    """The jobs that have work, and those that poll for it."""
    [found] = schedule.database.rows(
        "select exists (select from surety.pending_money), exists (select from surety.unmatched_facts where ended_at"
        " is null), exists (select from surety.payments where state in ('confirmed', 'requires_action'))"
        " or exists (select from surety.payment_holds where closed_at is null),"
        " exists (select from surety.payments where poll_at <= surety.time_now())"
        " or exists (select from surety.refunds where poll_at <= surety.time_now())"
        " or exists (select from surety.disputes where poll_at <= surety.time_now())"
    )
    busy = dict(
        zip(
            ("recheck_pending_balance", "retry_unmatched_facts", "check_deadlines", "poll_unfinished"),
            found,
            strict=True,
        )
    )
    # If no webhook was lost, a second reading of the event list has nothing new.
    busy["poll_events"] = turn == 1 or schedule.provider.has_lost
    return [name for name in RECOVERY_JOBS if busy.get(name, True)]


async def run_periodic_jobs(schedule: Schedule, names: Iterable[str]) -> None:
    """Run periodic jobs as the leader, then drain all handlers that have work by then."""
    worker = schedule.workers[-1]
    await worker.start(worker.worker.circuit_breaker.report_and_probe())
    for name in names:
        await worker.run_periodic_job(name, is_leader=True)
    schedule.database.move_clock(schedule.loop.seconds)
    [(mark,)] = schedule.database.rows("select outbox.schedule_work_since(%s)", worker.idle_mark)
    [(due,)] = schedule.database.rows("select outbox.schedule_due_handlers()")
    if (mark is None) != (due is not None):
        schedule.report_violation("the leader sees all work", f"{due} since {worker.idle_mark}")
    worker.idle_mark = mark
    schedule.scheduled = dict.fromkeys(due or ())
    while schedule.scheduled:
        handler = min(schedule.scheduled, key=HANDLER_ORDER.index)
        del schedule.scheduled[handler]
        with suppress(asyncio.CancelledError, Killed):
            await schedule.workers[-1].drain(handler)


async def is_finished(schedule: Schedule) -> bool:
    """Whether nothing is left to do."""
    provider = schedule.provider
    if provider.mailbox or provider.next_due() is not None or not all(one.done() for one in schedule.asking):
        return False
    [(left,)] = schedule.database.rows(
        "select exists (select from surety.payments where state in ('initiated', 'submitting',"
        " 'provider_submitted', 'requires_action', 'authorized', 'processing', 'confirmed', 'disputed'))"
        " or exists (select from surety.refunds where state = 'pending')"
        " or exists (select from surety.disputes where poll_at is not null)"
        " or exists (select from outbox.batches) or exists (select from outbox.retries where due_at is not null)"
        " or exists (select from surety.pending_money)"
        " or exists (select from outbox.dead_letters"
        " where closed_at is null and (handler <> 'probe' or event_id is distinct from %s))"
        " or exists (select from surety.unmatched_facts where ended_at is null)"
        " or exists (select from outbox.handlers where outbox.has_work(handler))",
        schedule.poison,
    )
    return not left


def next_due(schedule: Schedule, at_least: float) -> float:
    """The next due time in the schedule's seconds, between so many seconds and a day from now."""
    schedule.database.move_clock(schedule.loop.seconds)
    [(seconds,)] = schedule.database.rows(
        "select extract(epoch from least("
        " (select min(due_at) from outbox.retries), (select min(leased_until) from outbox.batches),"
        " (select min(poll_at) from surety.payments), (select min(available_at) from surety.pending_money),"
        " (select min(poll_at) from surety.refunds), (select min(poll_at) from surety.disputes),"
        " (select min(recorded_at) + interval '15 minutes' from surety.unmatched_facts where ended_at is null)"
        ") - surety.time_now())::float8"
    )
    dues = [86_400.0 if seconds is None else seconds]
    if (own := schedule.provider.next_due()) is not None:
        dues.append(own - schedule.loop.seconds)
    if not all(one.done() for one in schedule.asking):
        dues.append(31.0)
    return schedule.loop.seconds + min(86_400.0, max(at_least, min(dues) + 0.01))


def describe_unfinished(schedule: Schedule) -> str:
    """The unfinished payments, refunds and events."""
    return str(
        schedule.database.rows(
            "select (select array_agg(p.id || ' ' || p.state) from surety.payments as p join surety.states as s"
            " using (state) where not s.is_final), (select array_agg(id || ' ' || state) from surety.refunds"
            " where state = 'pending'), (select array_agg(id || ' ' || status) from surety.disputes"
            " where poll_at is not null), (select array_agg(handler || ' ' || event_ids::text) from outbox.batches),"
            " (select array_agg(handler || ' ' || attempts::text) from outbox.retries),"
            " (select count(*) from surety.pending_money), (select count(*) from outbox.dead_letters"
            " where closed_at is null), (select count(*) from surety.unmatched_facts where ended_at is null)"
        )
    )
