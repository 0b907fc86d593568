"""POST /v1/payments/{payment_id}/client_secret: the secret by which Stripe's script lets a payer act.

This process has no key of the provider's. A worker reads the secret and seals it for a public key that is made for one
request, and whose private key is in this process's memory alone. So no table, log or audit entry holds a secret that
can be read, and an answer that was sealed for another request opens nothing (db/sql/provider/client_secrets.sql).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox

from app.api.create_payment import BODY_BYTES_MAX
from app.api.held_answers import waits
from app.api.ids import PAYMENT_ID, id_or_empty
from app.api.requests import JSON_HEADERS, ApiRequest
from app.api.schemas.payments import ClientSecret, NewClientSecret
from app.api.waiting import AwaitedObject
from app.web.asgi import HttpResponse
from app.web.auth import DENIALS, Caller
from app.web.problems import Problem, overloaded
from app.web.requests import struct_of
from app.web.validation import violation_checker

log = logging.getLogger("surety.secrets")

ANSWER_SECONDS_MAX = 10.0
NO_STORE = (b"cache-control", b"no-store")


async def create_client_secret(request: ApiRequest) -> HttpResponse:
    """Get the client secret of a payment whose payer must act by script.

    For a payment with the status `requires_action` whose `next_action` has the type `script`. Pass `client_secret` to
    the payer's page, and there to `stripe.handleNextAction({clientSecret})`. Anyone who has it can act as the payer:
    store and log it nowhere. Each request reads it at the provider, ten in an hour for a payment at most; no other
    answer shows it. No Idempotency-Key is needed.
    """
    caller = request.caller()
    payment_id = id_or_empty(request, PAYMENT_ID)
    try:
        await read_empty_body(request)
    except Problem:
        await caller.require_valid_key()
        raise
    if not payment_id:
        await caller.require_valid_key()
        raise await caller.audit_denial("not-found")
    private_key = PrivateKey.generate()
    asked = {
        "key_hash": caller.key_hash.hex(),
        "request_id": request.request_id,
        "address": caller.address,
        "api_version": request.version,
        "payment_id": payment_id,
        "public_key": private_key.public_key.encode().hex(),
    }
    if traceparent := request.traceparent():
        asked["traceparent"] = traceparent
    row = await request.services.database.fetch_row(
        "select problem, detail, secret_request_id, provider_id, provider_account from api.request_client_secret(%s)",
        msgspec.json.encode(asked).decode(),
    )
    assert row is not None
    problem, detail, secret_request_id, provider_id, provider_account = row
    if problem is not None:
        raise await problem_of_secret(problem, detail, caller)
    caller.note_use()
    request.services.command_scheduler.schedule()
    sealed = await sealed_secret(request, caller, secret_request_id)
    secret = ClientSecret(
        object="client_secret",
        payment=payment_id,
        client_secret=open_secret(private_key, sealed, provider_id),
        provider_account=provider_account or None,
    )
    return HttpResponse(200, msgspec.json.encode(secret), request.request_id, [*JSON_HEADERS, NO_STORE])


async def read_empty_body(request: ApiRequest) -> None:
    """Read the body, which has no fields and may be missing. Raises Problem."""
    body = await request.read_body(BODY_BYTES_MAX)
    if body:
        request.require_json()
        given = request.parse_json(body)
        struct_of(given, NewClientSecret, violation_checker(NewClientSecret)(given))


async def problem_of_secret(name: str, detail: Any, caller: Caller) -> Problem:
    """The refusal of api.request_client_secret as a problem."""
    match name:
        case _ if name in DENIALS:
            return await caller.audit_denial(name)
        case "wrong-state":
            text = f"{detail['reason']} (its state is {detail['state']})"
            return Problem(name, text, state=detail["state"])
        case "rate-limited":
            seconds = detail["retry_after"]
            text = f"the limit of client secrets is {detail['limit']} an hour for a payment; repeat after {seconds} s"
            headers = [(b"retry-after", b"%d" % seconds)]
            return Problem(name, text, headers=headers, rate_limit="payment", retry_after=seconds)
        case _:
            raise AssertionError(f"SQL refused a client secret for an unknown reason: {name}")


async def sealed_secret(request: ApiRequest, caller: Caller, secret_request_id: str) -> bytes:
    """The worker's answer, waited for without a database connection. Raises Problem."""
    until = asyncio.get_running_loop().time() + ANSWER_SECONDS_MAX
    with request.services.waiting.admit(request.receive, caller.key_hash) as waiter:
        if waiter is None or not await waits(waiter, AwaitedObject("secret_requests", secret_request_id), until):
            raise overloaded()
    row = await request.services.database.fetch_row(
        "select sealed, failure, state from api.take_client_secret(%s, %s, %s)",
        caller.key_hash, secret_request_id, caller.address,
    )  # fmt: skip
    if row is None:
        await caller.require_valid_key()
        raise not_read()
    sealed, failure, state = row
    if failure == "ended" or state != "requires_action":
        raise Problem("wrong-state", f"its payer need not act any more (its state is {state})", state=state)
    if sealed is None:
        raise not_read()
    return bytes(sealed)


def open_secret(private_key: PrivateKey, sealed: bytes, provider_id: str) -> str:
    """The secret. Raises Problem unless it was sealed for this key and is of this intent."""
    try:
        secret = SealedBox(private_key).decrypt(sealed).decode()
    except (CryptoError, UnicodeDecodeError):
        secret = ""
    if not secret.startswith(f"{provider_id}_secret_"):
        log.error("a client secret of %s that was not sealed for its request was refused", provider_id)
        raise not_read()
    return secret


def not_read() -> Problem:
    """No worker has read the secret; the request may be repeated."""
    return Problem("provider-unavailable", "the client secret could not be read at the provider at present; repeat")
