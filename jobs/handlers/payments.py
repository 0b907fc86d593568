"""One function per handler of the outbox; which events each of them gets is written in outbox.handlers.

A handler takes a batch and the ids of those of its events that it is to handle. It finishes them, or raises: then they
are tried again in halves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from jobs.handlers.calls import ProviderCall, make_calls
from jobs.handlers.disputes import evidence
from jobs.handlers.refunds import refund
from jobs.handlers.webhooks import apply
from jobs.stripe.client import PaymentRefused, ProviderResponse, RequestRejected
from jobs.worker import Batch, Worker

HandleEvents = Callable[[Worker, Batch, list[str]], Awaitable[None]]

CANCELED_BEFORE_CREATION = {"code": "canceled", "message": "canceled before the provider held it"}


async def submit(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.initiated: the provider learns of the payment; nothing is charged by that."""
    await make_calls(worker, batch, event_ids, "create", perform_create)


async def perform_create(worker: Worker, call: ProviderCall) -> ProviderResponse:
    """The payment's intent. Where sending again would not tell whether it exists, it is looked for first."""
    assert call.request is not None
    assert call.idempotency_key is not None
    key = call.idempotency_key
    if call.todo in {"ask", "find"}:
        assert call.first_sent_at is not None
        assert call.last_sent_at is not None
        sent = call.first_sent_at, call.last_sent_at
        found = await worker.stripe.find_intent(call.account, call.payment_id, *sent, call.begun_at)
        if found is not None:
            return found
        if call.todo == "find":
            raise PaymentRefused("canceled before the provider held it", body={"error": CANCELED_BEFORE_CREATION})
        key = await renew_key(worker, call)
    return await worker.stripe.create_intent(call.account, key, call.request)


async def confirm(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.provider_submitted: the attempt to charge it. An intent succeeds once, so this can't charge twice."""
    await make_calls(worker, batch, event_ids, "confirm", perform_confirm)


async def perform_confirm(worker: Worker, call: ProviderCall) -> ProviderResponse:
    """The intent after its confirmation; asked about first where an earlier one's outcome is unknown."""
    assert call.request is not None
    assert call.idempotency_key is not None
    assert call.provider_id is not None
    key = call.idempotency_key
    if call.todo == "ask":
        found = await worker.stripe.fetch_intent(call.account, call.provider_id, urgent=True)
        if found.body.get("status") != "requires_confirmation":
            return found
        key = await renew_key(worker, call)
    try:
        return await worker.stripe.confirm_intent(call.account, key, call.provider_id, call.request)
    except RequestRejected as error:
        return await intent_after_rejection(worker, call, error)


async def capture(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.capture_requested: what is held is taken. An intent is captured once, so this can't charge twice."""
    await make_calls(worker, batch, event_ids, "capture", perform_capture)


async def perform_capture(worker: Worker, call: ProviderCall) -> ProviderResponse:
    """The intent after its capture, or as it is if nothing is held any more."""
    assert call.request is not None
    assert call.idempotency_key is not None
    assert call.provider_id is not None
    key = call.idempotency_key
    if call.todo == "ask":
        found = await worker.stripe.fetch_intent(call.account, call.provider_id, urgent=True)
        if found.body.get("status") != "requires_capture":
            return found
        key = await renew_key(worker, call)
    try:
        return await worker.stripe.capture_intent(call.account, key, call.provider_id, call.request)
    except RequestRejected as error:
        return await intent_after_rejection(worker, call, error)


async def cancel(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.cancel_requested, where a payment has ended here, an intent too many: no payer may succeed with it."""
    await make_calls(worker, batch, event_ids, "cancel", perform_cancel)


async def perform_cancel(worker: Worker, call: ProviderCall) -> ProviderResponse:
    """The intent after its cancellation, or as it is if that isn't possible any more."""
    assert call.request is not None
    assert call.idempotency_key is not None
    assert call.provider_id is not None
    key = call.idempotency_key
    if call.todo == "ask":
        found = await worker.stripe.fetch_intent(call.account, call.provider_id, urgent=True)
        if found.body.get("status") in {"succeeded", "canceled", "processing"}:
            return found
        key = await renew_key(worker, call)
    try:
        return await worker.stripe.cancel_intent(call.account, key, call.provider_id, call.request)
    except RequestRejected as error:
        return await intent_after_rejection(worker, call, error)


async def intent_after_rejection(worker: Worker, call: ProviderCall, error: RequestRejected) -> ProviderResponse:
    """The intent as it is, where its state was what stood in the way; else the error."""
    if error.error.get("code") != "payment_intent_unexpected_state" or call.provider_id is None:
        raise error
    return await worker.stripe.fetch_intent(call.account, call.provider_id, urgent=True)


async def renew_key(worker: Worker, call: ProviderCall) -> str:
    """A fresh idempotency key: what the old one would replay is known, and is no answer."""
    key: str = await worker.database.value("select surety.renew_call_key(%s, %s)", call.payment_id, call.operation)
    return key


async def settle(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.confirmed: money is expected."""
    query = "select surety.open_settlement_expectation(%s, %s, %s)"
    batch.is_lost = not await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids)


async def close(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.settled: it has come."""
    query = "select surety.close_settlement_expectation(%s, %s, %s)"
    batch.is_lost = not await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids)


HANDLERS: dict[str, HandleEvents] = {
    "submit": submit,
    "confirm": confirm,
    "capture": capture,
    "cancel": cancel,
    "refund": refund,
    "evidence": evidence,
    "settle": settle,
    "close": close,
    "apply": apply,
}
