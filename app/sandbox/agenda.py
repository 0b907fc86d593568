"""What happens by itself: the sandbox waits for the earliest plan and carries it out, one after another."""

import asyncio
import heapq
import logging
from collections.abc import Callable

from app.sandbox import disputes, fraud, intents, money, refunds
from app.sandbox.memory import Record
from app.sandbox.webhooks import Postman
from app.sandbox.world import World

log = logging.getLogger("sandbox")


def payer_answers(world: World, intent: Record) -> None:
    """The sandbox's payer completes 3-D Secure, or fails it."""
    intents.authenticated(world, intent, approved=not world.faults.payer_declines(intent.id))


HAPPENINGS: dict[str, Callable[[World, Record], object]] = {
    "book_charge": money.announce_booking,
    "processing_ends": intents.finish_processing,
    "payer_answers": payer_answers,
    "hold_expires": intents.expire_hold,
    "refund_referenced": refunds.refer,
    "refund_succeeds": refunds.succeed,
    "refund_fails": refunds.fail,
    "refund_unanswered": refunds.give_up,
    "holder_disputes": disputes.hear_holder,
    "dispute_decided": disputes.decide,
    "dispute_past_due": disputes.pass_due,
    "inquiry_ends": disputes.end_inquiry,
    "issuer_warns": fraud.warn,
    "payout_arrives": money.arrive,
}


async def follow(world: World, postman: Postman) -> None:
    """Carry out every plan when it is due, for ever."""
    while True:
        world.agenda_changed.clear()
        wait_seconds = _carry_out_due(world, postman)
        try:
            async with asyncio.timeout(wait_seconds):
                await world.agenda_changed.wait()
        except TimeoutError:
            continue


def _carry_out_due(world: World, postman: Postman) -> float | None:
    """Carry out what is due; returns the seconds until the next plan, None if there is none."""
    agenda = world.agenda
    while agenda and agenda[0].due <= world.memory.now():
        plan = heapq.heappop(agenda)
        if plan.what.startswith("deliver"):
            postman.post(plan)
            continue
        try:
            HAPPENINGS[plan.what](world, world.memory.get(plan.subject))
        except Exception:
            log.exception("%s of %s", plan.what, plan.subject)
            world.rollback()
        world.memory.finish(plan)
        world.commit()
    return max(agenda[0].due - world.memory.now(), 0) if agenda else None


async def pay_out_regularly(world: World) -> None:
    """Automatic payouts, on the sandbox's short schedule."""
    while True:
        await asyncio.sleep(world.settings.payout_seconds)
        money.pay_out(world)
        world.commit()
