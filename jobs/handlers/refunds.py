"""The operation refund: money back to the payer, once.

After an unknown outcome the intent's refunds are listed and matched by their metadata. The refund is sent again only if
it isn't among them.
"""

from __future__ import annotations

from jobs.handlers.calls import (
    CallOperation,
    ProviderCall,
    answered_result,
    discrepancy_result,
    error_fields,
)
from jobs.recorder import CallResult
from jobs.stripe.client import ProviderResponse
from jobs.stripe.errors import CallRefused, OutcomeUnknown, PaymentDeclined, ProviderError, ResponseMismatch
from jobs.stripe.facts import FactOrigin, Json, id_of, refund_facts, required
from jobs.stripe.shown import failure
from jobs.worker import Worker


async def send_refund(worker: Worker, call: ProviderCall, key: str, request: Json) -> ProviderResponse:
    """The refund, made at the provider."""
    return await worker.stripe.create_refund(call.account, key, request)


async def find_refund(worker: Worker, call: ProviderCall) -> ProviderResponse | None:
    """The refund that an earlier send made."""
    assert call.provider_id is not None
    return await worker.stripe.find_refund(call.account, call.provider_id, call.subject_id)


def refund_result(call: ProviderCall, answer: ProviderResponse) -> CallResult:
    """The answered refund as a fact. Raises ResponseMismatch or OutcomeUnknown if it is another one."""
    check_refund(call, answer.body)
    origin = FactOrigin(call.account, call.livemode, "response", answer.request_id)
    return answered_result(answer, refund_facts(answer.body, origin))


def check_refund(call: ProviderCall, refund: Json) -> None:
    """Raises OutcomeUnknown unless the answer is a refund, and ResponseMismatch unless it is this one.

    An answer that lacks a field is no mismatch: ObjectUnreadable.
    """
    if refund.get("object") != "refund":
        raise OutcomeUnknown("an answer that is no refund")
    metadata = required(refund, "metadata")
    for name in ("id", "currency"):
        required(refund, name)
    # An intent may be left out: our id in the metadata is proof enough.
    intent = id_of(refund.get("payment_intent"))
    if metadata.get("surety_refund") != call.subject_id or intent not in (None, call.provider_id):
        owner = metadata.get("surety_refund")
        raise ResponseMismatch(
            f"{refund['id']} belongs to {owner}",
            kind="foreign",
            differs=("intent", call.provider_id, intent)
            if owner == call.subject_id
            else ("refund", call.subject_id, owner),
            object_id=refund["id"],
        )
    if (currency := refund.get("currency")) != call.currency:
        raise ResponseMismatch(
            f"{refund['id']} is in {currency} instead of {call.currency}",
            kind="currency",
            differs=("currency", call.currency, currency),
            object_id=refund["id"],
        )


def explain_refund_error(call: ProviderCall, error: ProviderError) -> CallResult:
    """A call without a usable response: a refusal, a discrepancy or an error."""
    if isinstance(error, CallRefused | PaymentDeclined):
        return error_fields(error) | {"refund_id": call.subject_id, "refused": failure(error.error)}
    return discrepancy_result(call, call.operation, error)


REFUND = CallOperation(
    name="refund", send=send_refund, find=find_refund, read=refund_result, explain=explain_refund_error
)
