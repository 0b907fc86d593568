"""dispute.evidence_given: what a merchant has to say is handed to the provider.

All that was given so far is sent, so sending it twice tells it once. Whatever came of it, the dispute is fetched
afterwards, by one at a time.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial

from msgspec import Struct

from jobs.breaker import breaker_key
from jobs.handlers.calls import (
    CallResult,
    missing_subject_results,
    record_as_completed,
    record_call_results,
    unblocked_events,
)
from jobs.handlers.webhooks import ProviderObject, fetch_dispute
from jobs.stripe.client import ProviderBusy, ProviderError, ProviderOutage, RequestRejected
from jobs.stripe.facts import FactOrigin, Json, redacted
from jobs.worker import Batch, Worker


class EvidenceCall(Struct, kw_only=True):
    """A row of surety.begin_evidence: what to do about one event's dispute."""

    event_id: str
    dispute_id: str
    payment_id: str
    todo: str
    operation: str
    idempotency_key: str | None
    request: Json | None
    account: str
    provider_id: str
    livemode: bool


async def evidence(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Hand over the evidence of these events' disputes and record what comes of each."""
    event_ids = await unblocked_events(worker, batch, event_ids)
    if not event_ids:
        return
    calls = await worker.database.rows(
        EvidenceCall,
        "select event_id, dispute_id, payment_id, todo, operation, idempotency_key, request, account, provider_id,"
        " livemode from surety.begin_evidence(%s, %s, %s, %s)",
        batch.batch_id, batch.fence, worker.actor, event_ids,
    )  # fmt: skip
    missing = await missing_subject_results(worker, batch, event_ids, {call.event_id for call in calls})
    if missing:
        await record_call_results(worker, batch, missing)
    await record_as_completed(worker, batch, [partial(send_evidence, worker, batch, call) for call in calls])


async def send_evidence(worker: Worker, batch: Batch, call: EvidenceCall) -> list[CallResult]:
    """What came of one dispute's evidence."""
    event: CallResult = {"event_id": call.event_id}
    if call.todo == "skip":
        return [event]
    if batch.is_lost or worker.stopping.is_set():
        return [event | {"release_seconds": 0, "error": "its worker stopped"}]
    assert call.request is not None
    assert call.idempotency_key is not None
    key, began = call.idempotency_key, time.monotonic()
    subject = (
        ProviderObject(call.account, call.livemode, "dispute", call.provider_id),
        FactOrigin(call.account, call.livemode, "response"),
    )
    result: CallResult
    try:
        if call.todo == "renew":
            query = "select surety.renew_call_key(%s, %s)"
            key = await worker.database.value(query, call.payment_id, call.operation)
        answer = await worker.stripe.update_dispute(call.account, key, call.provider_id, call.request)
        result = {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body)}
        await fetch_dispute(worker, *subject)
    except ProviderError as error:
        result = {"outcome": error.outcome, "status": error.status, "error": str(error)}
        if isinstance(error, ProviderBusy):
            result["release_seconds"] = error.seconds
        elif isinstance(error, ProviderOutage):
            result |= {"outage": breaker_key(call.account), "began": began}
        elif isinstance(error, RequestRejected):
            result["snapshot"] = redacted(error.body)
            # It may have been submitted by a call whose answer was lost, or be over: then the dispute says so.
            with suppress(ProviderError):
                await fetch_dispute(worker, *subject)
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    return [event | {"payment_id": call.payment_id, "operation": call.operation, "duration_ms": duration_ms} | result]
