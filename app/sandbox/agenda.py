"""What happens by itself: the sandbox waits for the earliest plan and carries it out, one after another."""

import asyncio
import heapq
import logging
from collections.abc import Callable

from app.sandbox import disputes, fraud, intents, money, refunds
from app.sandbox.memory import StoredObject
from app.sandbox.webhooks import WebhookSender
from app.sandbox.world import World

log = logging.getLogger("sandbox")


def act_as_payer(world: World, intent: StoredObject) -> None:
    """The sandbox's payer completes 3-D Secure, or fails it."""
    intents.complete_authentication(world, intent, approved=not world.faults.payer_declines(intent.id))


SCHEDULED_ACTIONS: dict[str, Callable[[World, StoredObject], object]] = {
    "book_charge": money.book_charge_late,
    "processing_ends": intents.finish_processing,
    "payer_answers": act_as_payer,
    "hold_expires": intents.expire_authorization,
    "refund_referenced": refunds.add_reference,
    "refund_succeeds": refunds.succeed,
    "refund_fails": refunds.fail_refund,
    "refund_unanswered": refunds.expire_action,
    "holder_disputes": disputes.open_after_charge,
    "dispute_decided": disputes.decide_by_evidence,
    "dispute_past_due": disputes.miss_deadline,
    "inquiry_ends": disputes.end_inquiry,
    "issuer_warns": fraud.warn,
    "payout_arrives": money.complete_payout,
}


async def run_agenda(world: World, sender: WebhookSender) -> None:
    """Carry out every plan when it is due, for ever."""
    while True:
        world.agenda_changed.clear()
        wait_seconds = _run_due_actions(world, sender)
        try:
            async with asyncio.timeout(wait_seconds):
                await world.agenda_changed.wait()
        except TimeoutError:
            continue


def _run_due_actions(world: World, sender: WebhookSender) -> float | None:
    """Carry out what is due; returns the seconds until the next plan, None if there is none."""
    agenda = world.agenda
    while agenda and agenda[0].due <= world.memory.now():
        plan = heapq.heappop(agenda)
        if plan.what.startswith("deliver"):
            sender.post(plan)
            continue
        try:
            SCHEDULED_ACTIONS[plan.what](world, world.memory.get(plan.subject))
        except Exception:
            log.exception("%s of %s", plan.what, plan.subject)
            world.rollback()
        world.memory.finish(plan)
        world.commit()
    return max(agenda[0].due - world.memory.now(), 0) if agenda else None


async def pay_out_periodically(world: World) -> None:
    """Automatic payouts, on the sandbox's short schedule."""
    while True:
        await asyncio.sleep(world.settings.payout_seconds)
        money.create_payouts(world)
        world.commit()
