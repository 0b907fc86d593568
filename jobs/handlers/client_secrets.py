"""payment.client_secret_requested: a payment's client secret, sealed for the API process that asked for it.

The secret is read at the provider, encrypted for the public key in the request's row, and forgotten. Only the asking
process has the private key. No failure is repeated here: the merchant asks again.
"""

from __future__ import annotations

import asyncio
import logging
import re
from base64 import b64encode
from functools import partial
from typing import Literal

from msgspec import Struct
from nacl.exceptions import CryptoError
from nacl.public import PublicKey, SealedBox
from psycopg.types.json import Jsonb

from jobs.handlers.calls import run_calls
from jobs.recorder import CallResult
from jobs.stripe.errors import ObjectUnreadable, OutcomeUnknown, ProviderError
from jobs.stripe.facts import Json
from jobs.worker import Batch, Worker

log = logging.getLogger("surety.secrets")

# Less than the API waits (app/api/client_secrets.py), so that it gets the answer.
READ_SECONDS_MAX = 8.0
CLIENT_SECRET = re.compile(r"pi_[0-9A-Za-z_]+_secret_[0-9A-Za-z_]+")

SecretFailure = Literal["ended", "unanswered"]
"""Why a request gets no secret: the payer need not act any more; the provider gave none."""


class SecretRequest(Struct):
    """A row of surety.open_secret_requests."""

    event_id: str
    secret_request_id: str
    payment_id: str
    account: str
    provider_id: str
    livemode: bool
    public_key: bytes


async def seal_secrets(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Answer the requests behind these events. One that is too old, or was answered, is only completed."""
    requests = await worker.database.rows(
        SecretRequest,
        "select event_id, secret_request_id, payment_id, account, provider_id, livemode, public_key"
        " from surety.open_secret_requests(%s, %s, %s)",
        batch.batch_id, batch.fence, event_ids,
    )  # fmt: skip
    left = set(event_ids) - {request.event_id for request in requests}
    if left:
        await record_answers(worker, batch, [{"event_id": event_id} for event_id in left])

    async def answer(request: SecretRequest) -> list[CallResult]:
        about = {"event_id": request.event_id, "secret_request_id": request.secret_request_id}
        return [about | await sealed_or_failure(worker, request)]

    await run_calls([partial(answer, request) for request in requests], partial(record_answers, worker, batch))


async def record_answers(worker: Worker, batch: Batch, answers: list[CallResult]) -> None:
    """Store the answers and complete their events, unless the lease is lost."""
    event_ids = [answer["event_id"] for answer in answers]
    query = "select surety.answer_secret_requests(%s, %s, %s, %s)"
    held = await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids, Jsonb(answers))
    batch.is_lost = batch.is_lost or not held


async def sealed_or_failure(worker: Worker, request: SecretRequest) -> dict[str, str]:
    """`sealed`, in base64, or `failure`."""
    unanswered: SecretFailure = "unanswered"
    if request.livemode != worker.stripe.livemode or request.account in worker.circuit_breaker.blocked:
        return {"failure": unanswered}
    try:
        async with asyncio.timeout(READ_SECONDS_MAX):
            answer = await worker.stripe.fetch_intent(request.account, request.provider_id, urgent=True)
        secret = read_client_secret(answer.body, request)
        if secret is None:
            ended: SecretFailure = "ended"
            return {"failure": ended}
        sealed = SealedBox(PublicKey(request.public_key)).encrypt(secret.encode())
    except (ProviderError, TimeoutError, CryptoError) as error:
        # The error's words may come from the provider's answer.
        log.warning("no client secret of %s was read: %s", request.payment_id, type(error).__name__)
        return {"failure": unanswered}
    return {"sealed": b64encode(sealed).decode()}


def read_client_secret(intent: Json, request: SecretRequest) -> str | None:
    """The client secret of the payment's intent; None if its payer need not act. Raises OutcomeUnknown."""
    metadata = intent.get("metadata")
    if (
        (intent.get("object"), intent.get("id")) != ("payment_intent", request.provider_id)
        or not isinstance(metadata, dict)
        or metadata.get("surety_payment") != request.payment_id
    ):
        raise OutcomeUnknown("another object was answered")
    if intent.get("status") != "requires_action":
        return None
    secret = intent.get("client_secret")
    if (
        not isinstance(secret, str)
        or not secret.startswith(f"{request.provider_id}_secret_")
        or not CLIENT_SECRET.fullmatch(secret)
    ):
        raise ObjectUnreadable("the intent shows no client secret")
    return secret
