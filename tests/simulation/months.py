"""Four hundred days in the middle of a schedule, with everything unfinished left unfinished.

The service is visited at intervals of hours to two weeks. At a visit merchants, payers, banks and dashboard users act,
on payments of any age, and the workers run with faults. Between visits only the provider's own time passes. Keys
expire, webhooks that were not taken for three days are lost, outages last for days and weeks, keys are revoked and
accounts cut off for days, months are partitioned, and old partitions are detached and dropped.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.simulation.clients import send_command
from tests.simulation.customers import act_on_customer
from tests.simulation.initial_state import draw_wanted_payments
from tests.simulation.processes import PERIODIC_JOB_NAMES, WorkerProcess
from tests.simulation.recovery import ALL, FEW, run_periodic_jobs

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

DAY = 86_400.0
# Intervals between visits, in days: a few hours, days, and weeks. Stripe's list of events reaches back thirty days. The
# longest interval and then the longest outage are shorter by two, and the visit after it follows within one. A refusal
# of access, which begins at a visit, is shorter than an outage, and the visit after it may be any time later.
INTERVALS = ((0.05, 0.5), (1.0, 8.0), (8.0, 16.0))
INTERVAL_WEIGHTS = (1, 3, 6)
UNREAD_DAYS_MAX = 24.0
# Stripe repeats a webhook for three days.
WEBHOOK_DAYS = 3.0
# Partitions of events and webhooks are detached after so many days. Webhooks and retries refer to them for less.
KEPT_DAYS = 45
NEW_PAYMENTS_MAX = 4
# The longest time between two probes of a circuit. A visit waits for three: of the key, of the account, and one more.
PROBE_SECONDS = 301.0
READINGS_MAX = 4
# The probability of a periodic job at a visit. The provider makes no payouts here, and partitions are kept anyway.
JOB_RATE = 0.8
SELDOM_JOB_RATES = {"poll_payouts": 0.2, "maintain": 0.3}
# Workers report calls and send due probes at these intervals. All their turns between two probes would do the same.
CIRCUIT_TURN_SECONDS = 20.0
# The rounds of recovery are a day each at most.
MONTHS_OF_RECOVERY = 3


async def let_months_pass(schedule: Schedule) -> None:
    """Let the plan's days pass. Processes do not take turns meanwhile; faults still occur."""
    schedule.is_calm = schedule.has_faults = True
    schedule.workers.append(WorkerProcess(schedule, "months"))
    for process in schedule.workers:
        process.worker.circuit_turn_seconds = CIRCUIT_TURN_SECONDS
    # Jobs and requests that are running by now end first: each waits for an answer for a minute at most.
    await asyncio.sleep(300)
    # One of the others goes on, and takes part in probing.
    for process in schedule.workers[1:-1]:
        process.stop()
    schedule.workers = [schedule.workers[0], schedule.workers[-1]]
    end = schedule.loop.seconds + schedule.plan.days * DAY
    while schedule.loop.seconds < end:
        await visit(schedule)
        await pass_time(schedule, draw_interval(schedule))
    schedule.provider.lose_old_webhooks()
    schedule.provider.cancel_wrong_amounts()
    ahead = MONTHS_OF_RECOVERY // schedule.database.partition_months
    schedule.database.rows("select surety.maintain_partitions(%s)", ahead)
    schedule.has_faults = False


def draw_interval(schedule: Schedule) -> float:
    """The seconds until the next visit. If a list of events was not read for long, it follows the end of the fault."""
    provider, now = schedule.provider, schedule.loop.seconds
    [(least, most)] = schedule.chance.choices(INTERVALS, INTERVAL_WEIGHTS)
    seconds = schedule.chance.uniform(least, most) * DAY
    if provider.is_unread:
        until = max(now, provider.refused_until or 0.0, provider.outage.until if provider.outage is not None else 0.0)
        seconds = min(seconds, max(until + DAY, provider.read_at + UNREAD_DAYS_MAX * DAY) - now)
    return seconds


async def pass_time(schedule: Schedule, seconds: float) -> None:
    """Advance time from one of the provider's scheduled actions to the next, when all jobs have ended.

    Calls that run late take effect on the way.
    """
    if running := [task for worker in schedule.workers for task in worker.jobs]:
        await asyncio.wait(running)
    if schedule.provider.outage is not None:
        # Long enough for a probe to find the outage and for its circuit to open.
        await asyncio.sleep(180)
    until = schedule.loop.seconds + seconds
    while schedule.loop.seconds < until:
        due = schedule.provider.next_due()
        schedule.move_to(until if due is None else min(until, max(due, schedule.loop.seconds + 0.001)))
        await asyncio.sleep(0)
    schedule.database.move_clock(schedule.loop.seconds)
    schedule.period += 1
    if seconds > WEBHOOK_DAYS * DAY:
        schedule.provider.lose_old_webhooks()


async def visit(schedule: Schedule) -> None:
    """Some actions of people, some runs of the workers, upkeep, and a look at the invariants."""
    chance, provider = schedule.chance, schedule.provider
    schedule.note("visit")
    began = int(provider.memory.now())
    keep_partitions(schedule)
    let_people_act(schedule)
    if chance.random() < 0.6:
        await schedule.deliver_all()
    schedule.database.set_batch_size(chance.choice((FEW, ALL)))
    rates = {name: SELDOM_JOB_RATES.get(name, JOB_RATE) for name in PERIODIC_JOB_NAMES}
    await run_periodic_jobs(schedule, [name for name, rate in rates.items() if chance.random() < rate])
    await asyncio.sleep(5)
    if has_unread_events(schedule, began):
        await read_list_of_events(schedule)
    else:
        provider.is_unread = False
    if not provider.is_unread:
        provider.read_at = schedule.loop.seconds
    if not provider.is_unread and schedule.draw_fault("access_refused"):
        provider.refuse_access()
    if chance.random() < 0.2:
        schedule.inspect()
    if chance.random() < 0.2:
        provider.decide_disputes()


def let_people_act(schedule: Schedule) -> None:
    """Merchants request payments and send commands, third parties and payers act."""
    chance = schedule.chance
    if len(schedule.wanted) < schedule.plan.payments + NEW_PAYMENTS_MAX and chance.random() < 0.3:
        wanted = draw_wanted_payments(chance, 1, first=len(schedule.wanted))
        schedule.wanted += wanted
        schedule.unasked += wanted
    while schedule.unasked:
        schedule.send_request()
    for _ in range(chance.choice((0, 0, 1, 4))):
        schedule.let_third_party_act()
    for _ in range(chance.choice((0, 1, 3))):
        send_command(schedule)
        act_on_customer(schedule)
    if chance.random() < 0.2:
        schedule.let_payer_act()


async def read_list_of_events(schedule: Schedule) -> None:
    """Read the list of events, which the visit's jobs have not read to its end.

    A visit stands for many minutes: probes close circuits, and one reading succeeds. An outage or a refusal still
    prevents it.
    """
    began = int(schedule.provider.memory.now())
    schedule.has_faults = False
    for turn in range(READINGS_MAX):
        if turn:
            schedule.move_to(schedule.loop.seconds + PROBE_SECONDS)
        await run_periodic_jobs(schedule, ("poll_events",))
        if schedule.provider.refused_until is not None or not has_unread_events(schedule, began):
            break
    schedule.has_faults = True
    schedule.provider.is_unread = has_unread_events(schedule, began)


def has_unread_events(schedule: Schedule, began: int) -> bool:
    """Whether an account's list of events was not read to its end since then, in Unix seconds of the provider's clock.

    An open circuit is not the only reason: a worker may not have noticed yet that it is closed.
    """
    query = (
        "select from (select provider_account from surety.merchants union select '') as a (account)"
        " left join surety.poll_cursors as c on c.account = a.account and c.list = 'events'"
        " where c.polled_to is null or c.polled_to < to_timestamp(%s) limit 1"
    )
    return bool(schedule.database.rows(query, began))


def keep_partitions(schedule: Schedule) -> None:
    """Partition the months ahead, as each hour, and sometimes detach and drop old partitions, as an operator does.

    It repeats nothing within a month.
    """
    [(month,)] = schedule.database.rows("select to_char(surety.time_now() at time zone 'UTC', 'YYYYMM')")
    if month != schedule.partitioned_month:
        schedule.partitioned_month = month
        schedule.database.rows("select surety.maintain_partitions()")
    if schedule.chance.random() < 0.2:
        query = "select partition, detach from surety.detachable_partitions(make_interval(days => %s))"
        for partition, detach in schedule.database.rows(query, KEPT_DAYS):
            schedule.note("detaches", partition)
            schedule.database.observer.execute(detach.encode(), prepare=False)
            schedule.database.observer.execute(f"drop table {partition}".encode(), prepare=False)
