"""Erasures in some schedules: operators erase payments and customers at random, as `surety customers erase` does."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import psycopg

from tests.simulation.connections import SimulatedConnection
from tests.simulation.database import Pool
from tests.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

ERASURES_SHARE = 0.2
EVENTS_AT_ONCE = 5
SUBJECTS = """
    select p.id, p.merchant_id from surety.payments as p
    union all
    select c.id, c.merchant_id from surety.customers as c
    order by 1
"""
TABLES_WITH_PAYERS = (
    *("surety.payments", "surety.payment_labels", "surety.idempotency_keys", "surety.calls"),
    *("surety.provider_events", "outbox.dead_letters", "audit.entries"),
)


def has_erasures(schedule: Schedule) -> bool:
    """Whether data are erased in this schedule: by a stream of its own, so that others stay."""
    return random.Random(f"{schedule.plan.seed}:erasures").random() < ERASURES_SHARE


def erase_someone(schedule: Schedule) -> None:
    """In schedules with erasures: an operator erases a payment, or a customer with its payments."""
    if has_erasures(schedule) and (subjects := schedule.database.rows(SUBJECTS)):
        subject, merchant = schedule.chance.choice(subjects)
        schedule.note("erasure", subject[:3])
        schedule.asking.append(schedule.clients.start(erase(schedule, subject, merchant)))


async def erase(schedule: Schedule, subject: str, merchant: str) -> None:
    """Erase a payment or customer, from the beginning after each interruption. One in progress is left."""
    while True:
        await schedule.turn(schedule.clients, "erasure")
        try:
            async with Pool(schedule, schedule.api).connection() as connection:
                await erase_at_once(connection, subject, merchant)
        except (psycopg.OperationalError, Killed):
            await asyncio.sleep(1)
            continue
        schedule.schedule_handlers("detach_method")
        return


async def erase_at_once(connection: SimulatedConnection, subject: str, merchant: str) -> None:
    """The statements of one erasure, in the command's order."""
    asked = (None, subject) if subject.startswith("cus_") else (subject, None)
    payments, customers, _ = await fetch(
        connection, "select * from surety.find_erasable(%s, null, %s, %s)", merchant, *asked
    )
    [refused] = await fetch(
        connection,
        "select exists (select from surety.payments as p where p.id = any(%s)"
        " and surety.why_not_erasable(p) is not null)",
        payments,
    )
    if refused:
        return
    await fetch(connection, "select surety.begin_erasure(%s)", [*payments, *customers])
    [until] = await fetch(connection, "select max(id) from surety.provider_events")
    after: str | None = "whk_0"
    while after is not None:
        query = "select last_id, redacted from surety.redact_events(%s, %s, %s)"
        after, _ = await fetch(connection, query, after, until, EVENTS_AT_ONCE)
    for payment in payments:
        await fetch(connection, "select surety.erase_payment(%s)", payment)
    for customer in customers:
        await fetch(connection, "select surety.erase_customer(%s, surety.time_now())", customer)


async def fetch(connection: SimulatedConnection, query: str, *values: Any) -> tuple[Any, ...]:
    """The one row of a query."""
    row: tuple[Any, ...] | None = await (await connection.cursor().execute(query.encode(), values or None)).fetchone()
    assert row is not None
    return row


def erased_subjects(schedule: Schedule) -> set[str]:
    """The payments and customers that are erased."""
    return {subject for (subject,) in schedule.database.rows("select subject_id from surety.erasures")}


def without_payer(schedule: Schedule, answer: str | None) -> str | None:
    """An answer as it is repeated after an erasure."""
    if answer is None or not answer.startswith("{"):
        return answer
    [(redacted,)] = schedule.database.rows("select surety.redact_answer(%s)", answer)
    return str(redacted)


def check_erasures(schedule: Schedule) -> None:
    """No table that the erasure reaches holds the address of an erased payer; erased customers have no data."""
    erased = erased_subjects(schedule)
    if not erased:
        return
    addresses = [f"%{wanted.email}%" for wanted in schedule.wanted if wanted.payment_id in erased]
    for table in TABLES_WITH_PAYERS:
        query = f"select t::text from {table} as t where t::text like any(%s) limit 1"
        if found := schedule.database.rows(query, addresses):
            schedule.report_violation("an erased payer is forgotten", f"{table}: {found[0][0][:300]}")
    left = schedule.database.rows(
        "select c.id from surety.customers as c join surety.erasures as e on e.subject_id = c.id"
        " left join surety.payment_methods as m on m.customer_id = c.id"
        " where c.erased_at is not null and (c.email is not null or c.metadata <> '{}'"
        " or m.detached_at is null and m.id is not null or m.mandate <> '{}' or m.fingerprint is not null)"
    )
    if left:
        schedule.report_violation("an erased payer is forgotten", f"customer {left[0][0]}")
