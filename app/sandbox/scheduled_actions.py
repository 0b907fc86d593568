"""Scheduled actions: the sandbox waits for the earliest one and runs them one after another."""

import asyncio
import heapq
import logging
from collections.abc import Callable

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.objects import balance, disputes, fraud_warnings, intents, refunds
from app.sandbox.stripe.webhooks import WebhookSender

log = logging.getLogger("sandbox")


def act_as_payer(sandbox: Sandbox, intent: StoredObject) -> None:
    """The simulated payer completes 3-D Secure, or fails it."""
    intents.complete_authentication(sandbox, intent, approved=not sandbox.faults.payer_declines(intent.id))


SCHEDULED_ACTIONS: dict[str, Callable[[Sandbox, StoredObject], object]] = {
    "book_charge": balance.book_charge_late,
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
    "issuer_warns": fraud_warnings.warn,
    "payout_arrives": balance.complete_payout,
}


async def run_scheduled_actions(sandbox: Sandbox, sender: WebhookSender) -> None:
    """Run every action when it is due; never returns."""
    while True:
        sandbox.schedule_changed.clear()
        wait_seconds = _run_due_actions(sandbox, sender)
        try:
            async with asyncio.timeout(wait_seconds):
                await sandbox.schedule_changed.wait()
        except TimeoutError:
            continue


def _run_due_actions(sandbox: Sandbox, sender: WebhookSender) -> float | None:
    """Run due actions; returns the seconds until the next one, None if there is none."""
    scheduled = sandbox.scheduled
    while scheduled and scheduled[0].due <= sandbox.memory.now():
        action = heapq.heappop(scheduled)
        if action.what.startswith("deliver"):
            sender.post(action)
            continue
        try:
            SCHEDULED_ACTIONS[action.what](sandbox, sandbox.memory.get(action.subject))
        except Exception:
            log.exception("%s of %s", action.what, action.subject)
            sandbox.rollback()
        sandbox.memory.finish(action)
        sandbox.commit()
    return max(scheduled[0].due - sandbox.memory.now(), 0) if scheduled else None


async def pay_out_periodically(sandbox: Sandbox) -> None:
    """Automatic payouts at fixed intervals; never returns."""
    while True:
        await asyncio.sleep(sandbox.settings.payout_seconds)
        balance.create_payouts(sandbox)
        sandbox.commit()
