"""POST /v1/payments, from bytes to bytes: decoded at once into its struct, answered by a lane.

What doesn't decode, or might hold what a struct can't see (a key given twice, NUL), goes the careful way: who asks is
looked at first, then all rules that the request breaks are told at once.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
from msgspec.structs import replace

from app.api.schemas import NewPayment, PaymentRequest
from app.web.asgi import BodyTooLarge, ClientDisconnected, HttpResponse, Receive, Scope, Send, new_request_id, read_body
from app.web.auth import Authenticator, Caller
from app.web.batching import BatchingConnections, RefusedByDatabase, Row, Unavailable, WorkerScheduler
from app.web.problems import Problem, RuleViolation, invalid_request, overloaded, problem_from_database_error
from app.web.validation import parse, violation_checker

CREATE_PAYMENTS = b"""
select n, status, problem, detail, body, is_replayed, payment_id from api.create_payments(%s)
"""
ROUTE = "POST /v1/payments"
BODY_BYTES_MAX = 64 * 1024
IDEMPOTENCY_KEY = re.compile(rb"[ -~]{1,255}")
CURRENCY = re.compile("[A-Za-z]{3}")
JSON_KEY_PATTERN = re.compile(rb'"\s*:')
JSON_CONTENT_TYPE = (b"content-type", b"application/json")
IDEMPOTENCY_REPLAYED = (b"idempotency-replayed", b"true")
AMOUNT_MAX = 2**63 - 1

decode_payment = msgspec.json.Decoder(NewPayment).decode
encode = msgspec.json.Encoder(order="deterministic").encode
payment_violations = violation_checker(NewPayment)


class CreatePaymentEndpoint:
    """Takes payments. An ASGI application."""

    def __init__(
        self, authenticator: Authenticator, batching: BatchingConnections, worker_scheduler: WorkerScheduler
    ) -> None:
        self._authenticator = authenticator
        self._batching = batching
        self._worker_scheduler = worker_scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        try:
            answer = await self._accept(scope, receive, request_id)
        except ClientDisconnected:
            return
        except Problem as problem:
            answer = problem.response(request_id)
        except Unavailable:
            answer = overloaded().response(request_id)
        except RefusedByDatabase as refused:
            answer = problem_from_database_error(refused.error).response(request_id)
        await answer(scope, receive, send)

    async def _accept(self, scope: Scope, receive: Receive, request_id: str) -> HttpResponse:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        caller = self._authenticator.read_caller(scope, headers, request_id, ROUTE)
        try:
            body = await read_body(receive, BODY_BYTES_MAX)
        except BodyTooLarge:
            await caller.require_active_merchant()
            detail = f"the body has more than {BODY_BYTES_MAX} bytes"
            raise Problem("too-large", detail, limit=BODY_BYTES_MAX, headers=[(b"connection", b"close")]) from None
        key = headers.get(b"idempotency-key", b"")
        payment = None
        if IDEMPOTENCY_KEY.fullmatch(key) and is_json(headers):
            payment = read_fast(body)
        if payment is None:
            await caller.require_active_merchant()
            payment = await self._read_strictly(headers, body)
        instruction = encode(payment)
        row = await self._batching.submit(
            PaymentRequest(
                n=0,
                request_id=request_id,
                key_hash=caller.key_hash.hex(),
                address=caller.address,
                idempotency_key=key.decode(),
                request_hash=hashlib.sha256(instruction).hexdigest(),
                amount=payment.amount,
                currency=payment.currency,
                rail=payment.payment_method.type,
                method_token=payment.payment_method.token,
                capture_method=payment.capture_method,
                reference=payment.reference,
                description=payment.description,
                statement_descriptor_suffix=payment.statement_descriptor_suffix,
                return_url=payment.return_url,
                customer=payment.customer,
                metadata=payment.metadata,
            )
        )
        return await self._answer(row, caller, request_id)

    async def _read_strictly(self, headers: dict[bytes, bytes], body: bytes) -> NewPayment:
        """The payment after all, or Problem with every rule that the request breaks."""
        if not is_json(headers):
            raise Problem("not-json", "the header Content-Type must be application/json")
        key = headers.get(b"idempotency-key")
        if not key:
            raise Problem("idempotency-key-missing", "the header Idempotency-Key is missing")
        given = parse(body)
        errors = await self._amount_violations(given)
        reported_fields = {error.field for error in errors}
        errors += [error for error in payment_violations(given) if error.field not in reported_fields]
        if not IDEMPOTENCY_KEY.fullmatch(key):
            message = "Idempotency-Key must have 1 to 255 printable ASCII characters"
            errors.append(RuleViolation("Idempotency-Key", "pattern", message, place="header"))
        if errors:
            raise invalid_request(errors)
        return with_lowercase_currency(msgspec.convert(given, NewPayment))

    async def _amount_violations(self, given: Any) -> list[RuleViolation]:
        """What the database's table of currencies says about the amount, whatever else is wrong with the request."""
        amount, currency = (given.get("amount"), given.get("currency")) if isinstance(given, dict) else (None, None)
        if type(amount) is not int or not isinstance(currency, str) or not CURRENCY.fullmatch(currency):
            return []
        amount = max(-AMOUNT_MAX, min(amount, AMOUNT_MAX))
        judged = await self._authenticator.database.fetch_row(
            "select api.check_amount_bounds(%s, %s)", amount, currency.lower()
        )
        return [amount_violation(judged[0])] if judged and judged[0] else []

    async def _answer(self, row: Row, caller: Caller, request_id: str) -> HttpResponse:
        _, status, problem, detail, body, is_replayed, payment_id = row
        if problem is None:
            headers = [JSON_CONTENT_TYPE, (b"location", b"/v1/payments/" + payment_id.encode())]
            if is_replayed:
                headers.append(IDEMPOTENCY_REPLAYED)
            else:
                self._worker_scheduler.schedule()
            return HttpResponse(status, body.encode(), request_id, headers)
        match problem:
            case "unauthenticated" | "forbidden":
                raise await caller.audit_denial(problem)
            case "invalid-request":
                raise invalid_request([amount_violation(detail)])
            case "reference-taken":
                taken_by = detail["payment_id"]
                raise Problem(problem, f"{taken_by or 'another payment'} has this reference", payment=taken_by)
        raise Problem(problem, "this Idempotency-Key was sent before with another body")


def is_json(headers: dict[bytes, bytes]) -> bool:
    """Whether the body is said to be JSON, whatever its parameters."""
    given = headers.get(b"content-type", b"")
    return given == b"application/json" or given.partition(b";")[0].strip().lower() == b"application/json"


def read_fast(body: bytes) -> NewPayment | None:
    """The payment, if the body is beyond doubt. The slower look is for what decoding doesn't see: a key given twice
    shows as more keys in the body than in its payment's own encoding, and NUL can only come escaped.
    """
    try:
        payment = with_lowercase_currency(decode_payment(body))
    except (ValueError, RecursionError):
        return None
    if b"\\u" in body or len(JSON_KEY_PATTERN.findall(body)) != len(JSON_KEY_PATTERN.findall(encode(payment))):
        try:
            given = parse(body)
        except Problem:
            return None
        if payment_violations(given):
            return None
    return payment


def with_lowercase_currency(payment: NewPayment) -> NewPayment:
    """The currency in lower case, so that one request has one hash."""
    lower = payment.currency.lower()
    return payment if lower == payment.currency else replace(payment, currency=lower)


def amount_violation(detail: dict[str, Any]) -> RuleViolation:
    """What api.check_amount_bounds says, in words too."""
    if detail["rule"] == "known":
        message = f"currency {detail['given']} is not accepted"
    else:
        bound = "at least" if detail["rule"] == "minimum" else "at most"
        message = f"amount must be {bound} {detail['limit']} for {detail['currency']}"
    return RuleViolation(detail["field"], detail["rule"], message, detail.get("limit", msgspec.UNSET), detail["given"])
