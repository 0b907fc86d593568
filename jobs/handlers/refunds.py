"""refund.pending: the provider is told to give money back, once.

An unknown outcome is asked about: the intent's refunds are listed and matched by their metadata. If ours isn't among
them, it is sent again under the same key, or under a fresh one where the old one would replay what is no answer.
"""

from __future__ import annotations

from functools import partial

from jobs.handlers.calls import (
    CallResult,
    ProviderCall,
    call_result,
    error_result,
    missing_subject_results,
    not_sent_result,
    record_as_completed,
    record_call_results,
    unblocked_events,
)
from jobs.stripe.client import (
    OutcomeUnknown,
    PaymentDeclined,
    PaymentRefused,
    ProviderError,
    ProviderResponse,
    ResponseMismatch,
)
from jobs.stripe.facts import FactOrigin, Json, failure, id_of, redacted, refund_facts
from jobs.worker import Batch, Worker


class RefundCall(ProviderCall, kw_only=True):
    """A row of surety.begin_refunds: what to do about one refund. The amount of the payment is amount_minor."""

    refund_id: str
    refund_minor: int


async def refund(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Make the refunds of these events and record what comes of each."""
    event_ids = await unblocked_events(worker, batch, event_ids)
    if not event_ids:
        return
    calls = await worker.database.rows(
        RefundCall,
        "select event_id, refund_id, refund_minor, payment_id, todo, 'refund:' || refund_id as operation,"
        " idempotency_key, request, account, provider_id, first_sent_at, last_sent_at, amount_minor, currency, livemode"
        " from surety.begin_refunds(%s, %s, %s, %s)",
        batch.batch_id, batch.fence, worker.actor, event_ids,
    )  # fmt: skip
    missing = await missing_subject_results(worker, batch, event_ids, {call.event_id for call in calls})

    async def make(call: RefundCall) -> list[CallResult]:
        event = {"event_id": call.event_id}
        if call.todo == "skip":
            return [event]
        if batch.is_lost or worker.stopping.is_set():
            return [event | {"release_seconds": 0, "error": "its worker stopped"}]
        if call.account in worker.breaker.blocked:
            return [event | not_sent_result(call, call.operation)]
        making = perform_refund(worker, call)
        read, read_error = partial(refund_result, call), partial(refund_error_result, call)
        return [event | await call_result(call, call.operation, making, read=read, read_error=read_error)]

    if missing:
        await record_call_results(worker, batch, missing)
    await record_as_completed(worker, batch, [partial(make, call) for call in calls])


async def perform_refund(worker: Worker, call: RefundCall) -> ProviderResponse:
    """The refund at the provider, looked for first where an earlier send's outcome is unknown."""
    assert call.request is not None
    assert call.idempotency_key is not None
    assert call.provider_id is not None
    key = call.idempotency_key
    if call.todo in {"ask", "renew"}:
        found = await worker.stripe.find_refund(call.account, call.provider_id, call.refund_id)
        if found is not None:
            return found
    if call.todo == "renew":
        key = await worker.database.value("select surety.renew_call_key(%s, %s)", call.payment_id, call.operation)
    return await worker.stripe.create_refund(call.account, key, call.request)


def refund_result(call: RefundCall, answer: ProviderResponse) -> CallResult:
    """The answered refund as a fact. Raises ResponseMismatch or OutcomeUnknown if it is another one."""
    made = answer.body
    check_refund(call, made)
    origin = FactOrigin(call.account, call.livemode, "response", answer.request_id)
    return {
        "outcome": "answered",
        "status": answer.status,
        "snapshot": redacted(made),
        "facts": refund_facts(made, origin),
    }


def check_refund(call: RefundCall, made: Json) -> None:
    """Raises OutcomeUnknown unless the answer is a refund, and ResponseMismatch unless it is this one."""
    metadata = made.get("metadata")
    if made.get("object") != "refund" or not isinstance(made.get("id"), str) or not isinstance(metadata, dict):
        raise OutcomeUnknown("an answer that is no refund")
    if metadata.get("surety_refund") != call.refund_id or id_of(made.get("payment_intent")) != call.provider_id:
        raise ResponseMismatch(f"{made['id']} belongs to {metadata.get('surety_refund')}", kind="foreign")
    if made.get("currency") != call.currency:
        raise ResponseMismatch(f"{made['id']} is in {made.get('currency')} instead of {call.currency}", kind="currency")


def refund_error_result(call: RefundCall, error: ProviderError) -> CallResult:
    """A call without an answer to believe, by what that means."""
    if isinstance(error, PaymentRefused | PaymentDeclined):
        return {
            "outcome": error.outcome,
            "status": error.status,
            "snapshot": redacted(error.body),
            "refund_id": call.refund_id,
            "refused": failure(error.error),
        }
    return error_result(call, call.operation, error)
