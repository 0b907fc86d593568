"""How a schedule begins: merchants, requested payments, and how far the payments are when faults begin."""

from __future__ import annotations

import asyncio
import hashlib
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import psycopg
from msgspec.structs import replace

from app.sandbox.settings import PLATFORM_ACCOUNT
from tests.simulation.clients import WantedPayment, send_command
from tests.simulation.database import SimulatedDatabase
from tests.simulation.recovery import ALL, FEW, RECOVERY_JOBS, run_periodic_jobs
from tests.simulation.refused_access import CONNECTED_ACCOUNT

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

MERCHANTS = 2
# This one has an account of its own, which can be cut off.
CONNECTED_MERCHANT = 1
TOKENS = ("pm_card_visa",) * 8 + (
    "pm_card_pendingRefund",
    "pm_card_refundFail",
    "pm_card_createDispute",
    "pm_card_createDisputeInquiry",
    "pm_card_createIssuerFraudRecord",
    "pm_card_chargeDeclined",
    "pm_card_authenticationRequired",
    "pm_card_authenticationRequiredChargeDeclinedInsufficientFunds",
    "pm_card_bypassPending",
    "pm_card_unknown",
)


def add_merchants(database: SimulatedDatabase) -> tuple[list[str], list[bytes]]:
    """The merchants' ids, and the hashes of their keys."""
    merchants, keys = [], []
    for number in range(MERCHANTS):
        account = CONNECTED_ACCOUNT if number == CONNECTED_MERCHANT else ""
        [(merchant,)] = database.rows("select surety.add_merchant(%s, %s)", f"merchant {number}", account)
        key_hash = hashlib.sha256(f"key {number}".encode()).digest()
        database.rows("select surety.add_api_key(%s, %s, 'test')", merchant, key_hash)
        merchants.append(merchant)
        keys.append(key_hash)
    add_mistaken_merchant(database)
    return merchants, keys


def add_mistaken_merchant(database: SimulatedDatabase) -> None:
    """An operator takes the platform's own account for a merchant's, after a worker has found out whose it is."""
    database.rows("select surety.record_key_check('stripe', false, false, %s, '{}')", PLATFORM_ACCOUNT)
    with suppress(psycopg.errors.CheckViolation):
        database.rows("select surety.add_merchant('mistaken', %s)", PLATFORM_ACCOUNT)


def draw_wanted_payments(chance: random.Random, payments: int, *, first: int = 0) -> list[WantedPayment]:
    """The payments that clients will request, numbered from `first`."""
    wanted = [
        WantedPayment(
            number=number,
            merchant=chance.randrange(MERCHANTS),
            key=f"key-{number}",
            amount=chance.randrange(100, 20_000),
            currency=chance.choice(("usd", "usd", "eur")),
            token=chance.choice(TOKENS),
            capture_method=chance.choice(("automatic", "automatic", "manual")),
            reference=f"order-{chance.randrange(2)}" if chance.random() < 0.5 else None,
        )
        for number in range(first, first + payments)
    ]
    if chance.random() < 0.3:
        # A merchant reuses a key for another payment.
        again = chance.choice(wanted)
        wanted.append(
            replace(again, number=first + len(wanted), amount=again.amount + 1, answers=[], command_answers={})
        )
    return wanted


async def advance_some_payments(schedule: Schedule) -> None:
    """Advance some payments without faults, so that faults also occur late in a payment's life."""
    chance, payments = schedule.chance, schedule.plan.payments
    stage = chance.choice(("new", "new", "held", "held", "charged", "settled", "settled"))
    if stage == "new":
        if chance.random() < 0.75:
            # All requests arrive at once, and again, before any was answered.
            schedule.unasked.clear()
            schedule.request_again()
        return
    schedule.database.set_batch_size(ALL)
    for _ in range(chance.randint(1, len(schedule.unasked))):
        schedule.send_request()
    await asyncio.wait(schedule.asking)
    if stage == "held":
        await schedule.workers[-1].drain("submit")
    else:
        await run_periodic_jobs(schedule, ())
    if stage == "settled":
        schedule.move_to(schedule.loop.seconds + 3)
        await run_periodic_jobs(schedule, RECOVERY_JOBS)
    if chance.random() < 0.5:
        await schedule.deliver_all()
    for _ in range(chance.randint(payments, 3 * payments)):
        send_command(schedule)
    await asyncio.wait(schedule.asking)
    schedule.database.set_batch_size(FEW)
