"""The operation evidence: sends a merchant's evidence against a dispute to the provider.

Each request holds all evidence that was given so far, so repeating it does no harm. The dispute is fetched after
each answer, whether the provider took the evidence or not.
"""

from __future__ import annotations

from contextlib import suppress

from jobs.handlers.calls import (
    CallOperation,
    ProviderCall,
    answered_result,
    error_fields,
    failed_call_result,
)
from jobs.handlers.webhooks import fetch_dispute
from jobs.recorder import CallResult
from jobs.stripe.client import ProviderResponse
from jobs.stripe.errors import CallRefused, ProviderError, RequestRejected
from jobs.stripe.facts import FactOrigin, Json
from jobs.stripe.shown import failure
from jobs.stripe.webhook_events import ProviderObject
from jobs.worker import Worker


async def send_evidence(worker: Worker, call: ProviderCall, key: str, request: Json) -> ProviderResponse:
    """Submit the evidence, then fetch the dispute: only numbered fetches are recorded."""
    assert call.provider_id is not None
    dispute = (
        ProviderObject(call.account, call.livemode, "dispute", call.provider_id),
        FactOrigin(call.account, call.livemode, "response"),
    )
    try:
        answer = await worker.stripe.update_dispute(call.account, key, call.provider_id, request)
    except (RequestRejected, CallRefused):
        # A call whose response was lost may have submitted it, or the dispute has ended. Its status shows which.
        with suppress(ProviderError):
            await fetch_dispute(worker, *dispute)
        raise
    await fetch_dispute(worker, *dispute)
    return answer


async def find_nothing(_worker: Worker, _call: ProviderCall) -> None:
    """Return None: evidence is never searched for, because sending it again does no harm."""


def evidence_result(_call: ProviderCall, answer: ProviderResponse) -> CallResult:
    """A result without facts: they were recorded when the dispute was fetched."""
    return answered_result(answer, [])


def explain_evidence_error(call: ProviderCall, error: ProviderError) -> CallResult:
    """The result of a failed call: a refusal opens the evidence again, unless the dispute takes none any more."""
    if isinstance(error, CallRefused):
        return error_fields(error) | {"refused": failure(error.error)}
    return failed_call_result(call.account, error)


EVIDENCE = CallOperation(
    name="evidence", send=send_evidence, find=find_nothing, read=evidence_result, explain=explain_evidence_error
)
