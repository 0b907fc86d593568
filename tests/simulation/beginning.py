"""How a schedule begins: who is there, what is wanted, and where the payments are when trouble finds them."""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tests.simulation.clients import Wanted
from tests.simulation.ground import Ground
from tests.simulation.healing import ALL, FEW, HEALING, work_off

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

MERCHANTS = 2
TOKENS = ("pm_card_visa",) * 8 + (
    "pm_card_pendingRefund",
    "pm_card_refundFail",
    "pm_card_createDispute",
    "pm_card_createDisputeInquiry",
    "pm_card_chargeDeclined",
    "pm_card_authenticationRequired",
    "pm_card_authenticationRequiredChargeDeclinedInsufficientFunds",
    "pm_card_bypassPending",
    "pm_card_unknown",
)


def open_shops(ground: Ground) -> tuple[list[str], list[bytes]]:
    """The merchants' ids, and the hashes of their keys."""
    merchants, keys = [], []
    for number in range(MERCHANTS):
        [(merchant,)] = ground.rows("select surety.add_merchant(%s)", f"merchant {number}")
        key_hash = hashlib.sha256(f"key {number}".encode()).digest()
        ground.rows("select surety.add_api_key(%s, %s, 'test')", merchant, key_hash)
        merchants.append(merchant)
        keys.append(key_hash)
    return merchants, keys


def draw_wanted(chance: random.Random, payments: int) -> list[Wanted]:
    """What clients will ask for."""
    wanted = [
        Wanted(
            number=number,
            merchant=chance.randrange(MERCHANTS),
            key=f"key-{number}",
            amount=chance.randrange(100, 20_000),
            currency=chance.choice(("usd", "usd", "eur")),
            token=chance.choice(TOKENS),
            capture_method=chance.choice(("automatic", "automatic", "manual")),
            reference=f"order-{chance.randrange(2)}" if chance.random() < 0.5 else None,
        )
        for number in range(payments)
    ]
    if chance.random() < 0.3:
        # Somebody's program uses a key again for something else.
        again = chance.choice(wanted)
        wanted.append(replace(again, number=len(wanted), amount=again.amount + 1, answers=[], told={}))
    return wanted


async def begin_calmly(schedule: Schedule) -> None:
    """Bring some payments to where the rest of their lives begins: trouble should find them there, too."""
    chance, payments = schedule.chance, schedule.plan.payments
    stage = chance.choice(("new", "new", "held", "held", "charged", "settled", "settled"))
    if stage == "new":
        if chance.random() < 0.75:
            # All come at once, and again, before anybody has been answered.
            schedule.unasked.clear()
            schedule.storm()
        return
    schedule.ground.let_batches_hold(ALL)
    for _ in range(chance.randint(1, len(schedule.unasked))):
        schedule.ask()
    await asyncio.wait(schedule.asking)
    if stage == "held":
        await schedule.workers[-1].drain("submit")
    else:
        await work_off(schedule, ())
    if stage == "settled":
        schedule.move_to(schedule.loop.seconds + 3)
        await work_off(schedule, HEALING)
    if chance.random() < 0.5:
        await schedule.deliver_all()
    for _ in range(chance.randint(payments, 3 * payments)):
        schedule.instruct()
    await asyncio.wait(schedule.asking)
    schedule.ground.let_batches_hold(FEW)
