"""refund.pending: the provider is told to give money back, once.

An unknown outcome is asked about: the intent's refunds are listed and matched by their metadata. If ours isn't among
them, it is sent again under the same key, or under a fresh one where the old one would replay what is no answer.
"""

from __future__ import annotations

from functools import partial

from jobs.handlers.calls import (
    Call,
    Result,
    not_sent,
    outcome,
    record,
    record_as_they_come,
    without_held,
    without_subject,
)
from jobs.handlers.calls import unanswered as unexplained
from jobs.stripe.client import Answer, Declined, Misfit, ProviderError, Refused, Unknown
from jobs.stripe.facts import Json, Origin, failure, id_of, redacted, refund_facts
from jobs.worker import Batch, Worker


class RefundCall(Call, kw_only=True):
    """A row of surety.begin_refunds: what to do about one refund. The amount of the payment is amount_minor."""

    refund_id: str
    refund_minor: int


async def refund(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Make the refunds of these events and record what comes of each."""
    event_ids = await without_held(worker, batch, event_ids)
    if not event_ids:
        return
    calls = await worker.database.rows(
        RefundCall,
        "select event_id, refund_id, refund_minor, payment_id, todo, 'refund:' || refund_id as operation,"
        " idempotency_key, request, account, provider_id, first_sent_at, last_sent_at, amount_minor, currency, livemode"
        " from surety.begin_refunds(%s, %s, %s, %s)",
        batch.batch_id, batch.fence, worker.actor, event_ids,
    )  # fmt: skip
    missing = await without_subject(worker, batch, event_ids, {call.event_id for call in calls})

    async def make(call: RefundCall) -> list[Result]:
        event = {"event_id": call.event_id}
        if call.todo == "skip":
            return [event]
        if batch.is_lost or worker.stopping.is_set():
            return [event | {"release_seconds": 0, "error": "its worker stopped"}]
        if call.account in worker.breaker.blocked:
            return [event | not_sent(call, call.operation)]
        making = create_refund(worker, call)
        read, excuse = partial(answered, call), partial(unanswered, call)
        return [event | await outcome(call, call.operation, making, read=read, excuse=excuse)]

    if missing:
        await record(worker, batch, missing)
    await record_as_they_come(worker, batch, [partial(make, call) for call in calls])


async def create_refund(worker: Worker, call: RefundCall) -> Answer:
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
        key = await worker.database.value("select surety.renew_call(%s, %s)", call.payment_id, call.operation)
    return await worker.stripe.create_refund(call.account, key, call.request)


def answered(call: RefundCall, answer: Answer) -> Result:
    """The refund that was answered, as a fact. Raises Misfit or Unknown if it isn't the one that was asked for."""
    made = answer.body
    check_identity(call, made)
    origin = Origin(call.account, call.livemode, "response", answer.request_id)
    return {
        "outcome": "answered",
        "status": answer.status,
        "snapshot": redacted(made),
        "facts": refund_facts(made, origin),
    }


def check_identity(call: RefundCall, made: Json) -> None:
    """Raises Unknown unless the answer is a refund, and Misfit unless it is this one."""
    metadata = made.get("metadata")
    if made.get("object") != "refund" or not isinstance(made.get("id"), str) or not isinstance(metadata, dict):
        raise Unknown("an answer that is no refund")
    if metadata.get("surety_refund") != call.refund_id or id_of(made.get("payment_intent")) != call.provider_id:
        raise Misfit(f"{made['id']} belongs to {metadata.get('surety_refund')}", kind="foreign")
    if made.get("currency") != call.currency:
        raise Misfit(f"{made['id']} is in {made.get('currency')} instead of {call.currency}", kind="currency")


def unanswered(call: RefundCall, error: ProviderError) -> Result:
    """A call without an answer to believe, by what that means."""
    if isinstance(error, Refused | Declined):
        return {
            "outcome": error.outcome,
            "status": error.status,
            "snapshot": redacted(error.body),
            "refund_id": call.refund_id,
            "refused": failure(error.error),
        }
    return unexplained(call, call.operation, error)
