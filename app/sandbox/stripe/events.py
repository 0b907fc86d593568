"""Stripe's events: each change of an object emits one, and its delivery as a webhook is scheduled with it."""

import heapq
from typing import Any

from app.sandbox.faults import WebhookFault
from app.sandbox.memory import ScheduledAction, StoredObject, encode
from app.sandbox.settings import API_VERSION, PLATFORM_ACCOUNT
from app.sandbox.state import Sandbox

REPETITION_SECONDS = 0.15


def emit(sandbox: Sandbox, type: str, record: StoredObject, previous: dict[str, Any] | None = None) -> None:
    """Store an event with a snapshot of the object as it is now, and schedule its webhook."""
    settings, memory, call = sandbox.settings, sandbox.memory, sandbox.call
    data: dict[str, Any] = {"object": record.body}
    if previous is not None:
        data["previous_attributes"] = previous
    id, created = memory.unused_id("evt", type, record.id), sandbox.unix_seconds()
    event: dict[str, Any] = {
        "id": id,
        "object": "event",
        "api_version": API_VERSION,
        "created": created,
        "data": data,
        "livemode": settings.livemode,
        "pending_webhooks": 1 if settings.webhook_url else 0,
        "request": {"id": call.request_id if call else None, "idempotency_key": call.key if call else None},
        "type": type,
    }
    payment = record.body.get("payment_intent") or record.id
    if record.account != PLATFORM_ACCOUNT:
        event["account"] = record.account
    memory.save_event(
        StoredObject(id, "event", record.account, created, {}, parent=payment, label=type), encode(event).decode()
    )
    is_wanted = not settings.webhook_events or type in settings.webhook_events
    if settings.webhook_url and is_wanted and record.account not in sandbox.unconnected_accounts:
        about = (payment, *(record.body.get("metadata") or {}).values())
        _schedule_delivery(sandbox, id, type, about)


def _schedule_delivery(sandbox: Sandbox, event_id: str, type: str, about: tuple[str, ...]) -> None:
    tally = sandbox.memory.tally
    tally("webhooks:sent")
    fault = sandbox.faults.of_webhook(type, event_id, about)
    if fault is not None:
        tally(f"webhooks:{fault}")
    if fault != "lost" and sandbox.delivering is not None:
        sandbox.delivering.append(event_id)
    _schedule_by_fault(sandbox, event_id, fault)


def _schedule_by_fault(sandbox: Sandbox, event_id: str, fault: WebhookFault | None) -> None:
    settings, tally = sandbox.settings, sandbox.memory.tally
    match fault:
        case "lost":
            return
        case "repeated":
            times = sandbox.faults.repetitions(event_id)
            tally("webhooks:extra_deliveries", times - 1)
            for turn in range(times):
                sandbox.schedule(turn * REPETITION_SECONDS, "deliver", event_id)
        case "reordered":
            sandbox.schedule(settings.reorder_seconds, "deliver", event_id)
        case "delayed":
            sandbox.schedule(settings.delay_seconds, "deliver", event_id)
        case None:
            sandbox.schedule(0, "deliver", event_id)
        case "forged" | "sparse" | "thin":
            sandbox.schedule(0, f"deliver_{fault}", event_id)
        case "other_mode":
            sandbox.schedule(0, "deliver_other_mode", event_id)
            sandbox.schedule(0, "deliver", event_id)


def take_pending_deliveries(sandbox: Sandbox, about: str) -> list[ScheduledAction]:
    """Remove and return the scheduled deliveries about a payment; all of them if `about` is ""."""
    held = [
        action
        for action in sandbox.scheduled
        if action.what.startswith("deliver") and about in (sandbox.memory.event(action.subject)[1], "")
    ]
    sandbox.scheduled = [action for action in sandbox.scheduled if action not in held]
    heapq.heapify(sandbox.scheduled)
    return held
