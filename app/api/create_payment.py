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

from app.api.schemas import AskedPayment, NewPayment
from app.web.asgi import Answer, Gone, Receive, Scope, Send, TooLarge, new_request_id, read_body
from app.web.auth import Caller, Doorkeeper
from app.web.batching import Kicker, Lanes, Refused, Row, Unavailable
from app.web.problems import Broken, Problem, from_database, invalid, overloaded
from app.web.validation import checker, parse

STATEMENT = b"""
select n, status, problem, detail, body, is_replayed, payment_id from api.create_payments(%s)
"""
ROUTE = "POST /v1/payments"
BODY_BYTES_MAX = 64 * 1024
IDEMPOTENCY_KEY = re.compile(rb"[ -~]{1,255}")
CURRENCY = re.compile("[A-Za-z]{3}")
KEYS = re.compile(rb'"\s*:')
JSON = (b"content-type", b"application/json")
REPLAYED = (b"idempotency-replayed", b"true")
AMOUNT_MAX = 2**63 - 1

decode = msgspec.json.Decoder(NewPayment).decode
encode = msgspec.json.Encoder(order="deterministic").encode
broken_rules = checker(NewPayment)


class Acceptance:
    """Takes payments. An ASGI application."""

    def __init__(self, doorkeeper: Doorkeeper, lanes: Lanes, kicker: Kicker) -> None:
        self._doorkeeper = doorkeeper
        self._lanes = lanes
        self._kicker = kicker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        try:
            answer = await self._accept(scope, receive, request_id)
        except Gone:
            return
        except Problem as problem:
            answer = problem.answer(request_id)
        except Unavailable:
            answer = overloaded().answer(request_id)
        except Refused as refused:
            answer = from_database(refused.error).answer(request_id)
        await answer(scope, receive, send)

    async def _accept(self, scope: Scope, receive: Receive, request_id: str) -> Answer:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        caller = self._doorkeeper.caller(scope, headers, request_id, ROUTE)
        try:
            body = await read_body(receive, BODY_BYTES_MAX)
        except TooLarge:
            await caller.must_be_active()
            detail = f"the body has more than {BODY_BYTES_MAX} bytes"
            raise Problem("too-large", detail, limit=BODY_BYTES_MAX, headers=[(b"connection", b"close")]) from None
        key = headers.get(b"idempotency-key", b"")
        payment = None
        if IDEMPOTENCY_KEY.fullmatch(key) and is_json(headers):
            payment = read_quickly(body)
        if payment is None:
            await caller.must_be_active()
            payment = await self._read_carefully(headers, body)
        instruction = encode(payment)
        row = await self._lanes.ask(
            AskedPayment(
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

    async def _read_carefully(self, headers: dict[bytes, bytes], body: bytes) -> NewPayment:
        """The payment after all, or Problem with every rule that the request breaks."""
        if not is_json(headers):
            raise Problem("not-json", "the header Content-Type must be application/json")
        key = headers.get(b"idempotency-key")
        if not key:
            raise Problem("idempotency-key-missing", "the header Idempotency-Key is missing")
        given = parse(body)
        errors = await self._beyond_bounds(given)
        told = {error.field for error in errors}
        errors += [error for error in broken_rules(given) if error.field not in told]
        if not IDEMPOTENCY_KEY.fullmatch(key):
            message = "Idempotency-Key must have 1 to 255 printable ASCII characters"
            errors.append(Broken("Idempotency-Key", "pattern", message, place="header"))
        if errors:
            raise invalid(errors)
        return canonical(msgspec.convert(given, NewPayment))

    async def _beyond_bounds(self, given: Any) -> list[Broken]:
        """What the database's table of currencies says about the amount, whatever else is wrong with the request."""
        amount, currency = (given.get("amount"), given.get("currency")) if isinstance(given, dict) else (None, None)
        if type(amount) is not int or not isinstance(currency, str) or not CURRENCY.fullmatch(currency):
            return []
        amount = max(-AMOUNT_MAX, min(amount, AMOUNT_MAX))
        judged = await self._doorkeeper.database.row("select api.judge_amount(%s, %s)", amount, currency.lower())
        return [broken_bound(judged[0])] if judged and judged[0] else []

    async def _answer(self, row: Row, caller: Caller, request_id: str) -> Answer:
        _, status, problem, detail, body, is_replayed, payment_id = row
        if problem is None:
            headers = [JSON, (b"location", b"/v1/payments/" + payment_id.encode())]
            if is_replayed:
                headers.append(REPLAYED)
            else:
                self._kicker.kick()
            return Answer(status, body.encode(), request_id, headers)
        match problem:
            case "unauthenticated" | "forbidden":
                raise await caller.denied(problem)
            case "invalid-request":
                raise invalid([broken_bound(detail)])
            case "reference-taken":
                taken_by = detail["payment_id"]
                raise Problem(problem, f"{taken_by or 'another payment'} has this reference", payment=taken_by)
        raise Problem(problem, "this Idempotency-Key was sent before with another body")


def is_json(headers: dict[bytes, bytes]) -> bool:
    """Whether the body is said to be JSON, whatever its parameters."""
    given = headers.get(b"content-type", b"")
    return given == b"application/json" or given.partition(b";")[0].strip().lower() == b"application/json"


def read_quickly(body: bytes) -> NewPayment | None:
    """The payment, if the body is beyond doubt. The slower look is for what decoding doesn't see: a key given twice
    shows as more keys in the body than in its payment's own encoding, and NUL can only come escaped.
    """
    try:
        payment = canonical(decode(body))
    except (ValueError, RecursionError):
        return None
    if b"\\u" in body or len(KEYS.findall(body)) != len(KEYS.findall(encode(payment))):
        try:
            given = parse(body)
        except Problem:
            return None
        if broken_rules(given):
            return None
    return payment


def canonical(payment: NewPayment) -> NewPayment:
    """The currency in lower case, so that one request has one hash."""
    lower = payment.currency.lower()
    return payment if lower == payment.currency else replace(payment, currency=lower)


def broken_bound(detail: dict[str, Any]) -> Broken:
    """What api.judge_amount says, in words too."""
    if detail["rule"] == "known":
        message = f"currency {detail['given']} is not accepted"
    else:
        bound = "at least" if detail["rule"] == "minimum" else "at most"
        message = f"amount must be {bound} {detail['limit']} for {detail['currency']}"
    return Broken(detail["field"], detail["rule"], message, detail.get("limit", msgspec.UNSET), detail["given"])
