"""Money limits, and payments on hold, in some schedules: operators set them first, and decide about holds at random."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import psycopg
from msgspec import Struct, field

from tests.simulation.clients import WantedPayment, request_until_answered
from tests.simulation.database import Pool
from tests.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

LIMITED_SHARE = 0.2
HELD_SHARE = 0.15
DECISIONS = ("released", "released", "refused")
REFUSALS = frozenset({"limit-exceeded"})


class ScheduleLimits(Struct):
    """The limits of one schedule: payments and minor units a day, by merchant and currency."""

    count_max: dict[tuple[str, str], int] = field(default_factory=dict)
    amount_max: dict[tuple[str, str], int] = field(default_factory=dict)
    has_holds: bool = False


def add_limits(schedule: Schedule, more: list[WantedPayment]) -> ScheduleLimits:
    """Set what this schedule has, with `more` payments that meet it: by a stream of its own, so that others stay."""
    chance = random.Random(f"{schedule.plan.seed}:limits")
    limits = ScheduleLimits()
    drawn = chance.random()
    if drawn < LIMITED_SHARE:
        for merchant in schedule.merchants:
            query = (
                "select count(*) + %s, coalesce(sum(amount_minor), 0)::bigint + %s from surety.payments"
                " where merchant_id = %s and currency = 'usd'"
            )
            [(count, amount)] = schedule.database.rows(query, chance.randint(1, 2), chance.randint(0, 30_000), merchant)
            limits.count_max[merchant, "usd"], limits.amount_max[merchant, "usd"] = count, amount
            schedule.database.rows("select surety.set_money_limit(%s, 'usd', %s, %s, 'test')", merchant, count, amount)
    elif drawn < LIMITED_SHARE + HELD_SHARE:
        limits.has_holds = True
        held_merchant = chance.choice((None, *schedule.merchants))
        query = "select surety.add_velocity_rule(%s, 'email', '1 hour', 0, null, null, 'hold', 'test')"
        schedule.database.rows(query, held_merchant)
    else:
        return limits
    merchant_number = chance.randrange(len(schedule.merchants))
    for wanted in more:
        wanted.merchant, wanted.currency = merchant_number, "usd"
    schedule.wanted += more
    if limits.count_max:
        # Side by side: what the lock of a limit serializes.
        schedule.asking += [schedule.clients.start(request_until_answered(schedule, wanted)) for wanted in more]
    else:
        schedule.unasked += more
    return limits


def decide_some_hold(schedule: Schedule) -> None:
    """An operator decides about a payment on hold, or about one whose hold has ended."""
    held = schedule.database.rows("select payment_id from surety.payment_holds order by payment_id")
    if held:
        [payment_id] = schedule.chance.choice(held)
        decision = schedule.chance.choice(DECISIONS)
        schedule.asking.append(schedule.clients.start(decide_hold(schedule, payment_id, decision)))


async def decide_hold(schedule: Schedule, payment_id: str, decision: str) -> None:
    """Send a decision until it is answered."""
    while True:
        await schedule.turn(schedule.clients, "decision about a hold")
        try:
            async with Pool(schedule, schedule.api).connection() as connection:
                query = b"select outcome from surety.decide_hold(%s, %s, 'operator:test', 'by chance')"
                await (await connection.cursor().execute(query, (payment_id, decision))).fetchone()
        except (psycopg.OperationalError, Killed):
            await asyncio.sleep(1)
            continue
        schedule.schedule_handlers("submit")
        return


def decide_left_holds(schedule: Schedule) -> None:
    """Operators decide about half of the payments that are still on hold; time ends the other holds."""
    for (payment_id,) in schedule.database.rows(
        "select payment_id from surety.payment_holds where closed_at is null order by payment_id"
    ):
        if schedule.chance.random() < 0.5:
            query = "select outcome from surety.decide_hold(%s, %s, 'operator:test', 'at last')"
            schedule.database.rows(query, payment_id, schedule.chance.choice(DECISIONS))


def check_limits(schedule: Schedule) -> None:
    """No day has more payments or money than its limit, and every hold has ended."""
    accepted = schedule.database.rows(
        "select merchant_id, currency, (created_at at time zone 'UTC')::date::text as day, count(*),"
        " sum(amount_minor)::bigint from surety.payments group by merchant_id, currency, day order by day"
    )
    for merchant, currency, day, count, amount in accepted:
        if count > schedule.limits.count_max.get((merchant, currency), count):
            schedule.report_violation("a day has no more payments than its limit", f"{merchant} {day}: {count}")
        if amount > schedule.limits.amount_max.get((merchant, currency), amount):
            schedule.report_violation("a day has no more money than its limit", f"{merchant} {day}: {amount}")
    if left := schedule.database.rows("select payment_id from surety.payment_holds where closed_at is null"):
        schedule.report_violation("every hold ends", left[0][0])
