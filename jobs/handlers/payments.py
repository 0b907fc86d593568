"""The operations create, confirm, capture and cancel on a payment's intent, and the handlers of settlements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jobs.handlers.calls import (
    CallOperation,
    CallSubject,
    ProviderCall,
    answered_result,
    discrepancy_result,
    error_fields,
)
from jobs.recorder import CallResult
from jobs.stripe.client import ProviderResponse
from jobs.stripe.errors import (
    CallRefused,
    OutcomeUnknown,
    PaymentDeclined,
    ProviderError,
    RequestRejected,
    ResponseMismatch,
)
from jobs.stripe.facts import FactOrigin, Json, decline_fact, intent_facts, required
from jobs.stripe.shown import failure
from jobs.worker import Batch, Worker


async def send_creation(worker: Worker, call: ProviderCall, key: str, request: Json) -> ProviderResponse:
    """The payment's new intent, unconfirmed: nothing is charged yet."""
    return await worker.stripe.create_intent(call.account, key, request)


async def find_intent(worker: Worker, call: ProviderCall) -> ProviderResponse | None:
    """The intent that an earlier send created."""
    assert call.first_sent_at is not None
    assert call.last_sent_at is not None
    sent = call.first_sent_at, call.last_sent_at
    return await worker.stripe.find_intent(call.account, call.payment_id, *sent, call.begun_at)


def intent_result(subject: CallSubject, answer: ProviderResponse, source: str = "response") -> CallResult:
    """The answered intent, as facts. Raises ResponseMismatch or OutcomeUnknown if it isn't the payment's."""
    intent = answer.body
    check_intent(subject, intent)
    origin = FactOrigin(subject.account, subject.livemode, source, answer.request_id)
    result = answered_result(answer, intent_facts(intent, origin))
    if intent["amount"] == subject.amount_minor:
        return result
    detail = f"{intent['id']} is about {intent['amount']} instead of {subject.amount_minor}"
    if subject.provider_id is None:
        raise ResponseMismatch(
            detail,
            kind="amount",
            differs=("amount", subject.amount_minor, intent["amount"]),
            object_id=intent["id"],
        )
    # The intent may be charged already: the charged amount is recorded, even if another was requested.
    return result | {
        "discrepancy": {
            "kind": "amount",
            "subject": intent["id"],
            "detail": detail,
            "fields": [{"field": "amount", "here": subject.amount_minor, "there": intent["amount"]}],
            "source_there": intent["id"],
        }
    }


def check_intent(subject: CallSubject, intent: Json) -> None:
    """Raises OutcomeUnknown unless the answer is a payment intent, and ResponseMismatch unless it is this payment's.

    An answer that lacks a field is no mismatch: ObjectUnreadable.
    """
    if intent.get("object") != "payment_intent":
        raise OutcomeUnknown("an answer that is no payment intent")
    metadata = required(intent, "metadata")
    for name in ("id", "amount", "currency", "livemode"):
        required(intent, name)
    if subject.provider_id not in (None, intent["id"]):
        raise ResponseMismatch(
            f"{intent['id']} was answered about {subject.provider_id}",
            kind="foreign",
            differs=("intent", subject.provider_id, intent["id"]),
            object_id=intent["id"],
        )
    if (owner := metadata.get("surety_payment")) != subject.payment_id:
        raise ResponseMismatch(
            f"{intent['id']} belongs to {owner}",
            kind="foreign",
            differs=("payment", subject.payment_id, owner),
            object_id=intent["id"],
        )
    for name, ours in (("currency", subject.currency), ("livemode", subject.livemode)):
        if (theirs := intent.get(name)) != ours:
            raise ResponseMismatch(
                f"{intent['id']} has {name} {theirs} instead of {ours}",
                kind=name,
                differs=(name, ours, theirs),
                object_id=intent["id"],
            )


def intent_error_result(subject: CallSubject, error: ProviderError, operation: str) -> CallResult:
    """A call without a usable response: a refusal, a declined attempt, a discrepancy or an error."""
    is_cancel = operation.partition(":")[0] == "cancel"
    if is_cancel or not isinstance(error, CallRefused | PaymentDeclined):
        return discrepancy_result(subject, operation, error)
    if subject.provider_id is None or operation == "capture":
        return error_fields(error) | {"refused": failure(error.error)}
    origin = FactOrigin(subject.account, subject.livemode, "response")
    return error_fields(error) | {"facts": [decline_fact(error.error, origin, subject.provider_id, subject.currency)]}


def explain_intent_error(call: ProviderCall, error: ProviderError) -> CallResult:
    """Adapt intent_error_result to the calls of handlers."""
    return intent_error_result(call, error, call.operation)


def intent_operation(action: Literal["confirm", "capture", "cancel"], is_over: Callable[[Any], bool]) -> CallOperation:
    """An operation on an existing intent. `is_over` tests whether its status leaves nothing to do."""

    async def find(worker: Worker, call: ProviderCall) -> ProviderResponse | None:
        assert call.provider_id is not None
        found = await worker.stripe.fetch_intent(call.account, call.provider_id, urgent=True)
        return found if is_over(found.body.get("status")) else None

    async def send(worker: Worker, call: ProviderCall, key: str, request: Json) -> ProviderResponse:
        assert call.provider_id is not None
        try:
            return await worker.stripe.change_intent(call.account, key, call.provider_id, action, request)
        except RequestRejected as error:
            if error.error.get("code") != "payment_intent_unexpected_state":
                raise
            # The intent's state prevented the operation, so the fetched intent is the response.
            return await worker.stripe.fetch_intent(call.account, call.provider_id, urgent=True)

    return CallOperation(name=action, send=send, find=find, read=intent_result, explain=explain_intent_error)


CREATE = CallOperation(
    name="create", send=send_creation, find=find_intent, read=intent_result, explain=explain_intent_error
)
# An intent succeeds once and is captured once, so neither confirming nor capturing it again can charge twice.
CONFIRM = intent_operation("confirm", lambda status: status != "requires_confirmation")
CAPTURE = intent_operation("capture", lambda status: status != "requires_capture")
CANCEL = intent_operation("cancel", lambda status: status in {"succeeded", "canceled", "processing"})


async def expect_settlement(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.confirmed: a settlement is expected."""
    query = "select surety.expect_settlement(%s, %s, %s)"
    batch.is_lost = not await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids)


async def meet_expected_settlement(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """payment.settled, payment.money_available: the expected settlement has arrived."""
    query = "select surety.meet_expected_settlement(%s, %s, %s)"
    batch.is_lost = not await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids)
