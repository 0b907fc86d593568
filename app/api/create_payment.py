"""POST /v1/payments: the body is decoded once into its struct and answered by a batching connection.

A body that does not decode, or that may hold a duplicate key or NUL, which a struct can't show, is read strictly: the
caller is looked up first, then all broken rules are listed.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec.structs import replace

from app.api.held_answers import document_after_command
from app.api.mandates import is_acceptable, mandate_violations
from app.api.requests import IDEMPOTENCY_REPLAYED, JSON_HEADERS, ApiRequest, compact
from app.api.schemas.payments import MethodToSave, NewPayment, PaymentRequest
from app.web.asgi import HttpResponse
from app.web.auth import DENIALS, Caller
from app.web.database import DatabasePool
from app.web.fair_queue import sender_of
from app.web.problems import Problem, RuleViolation, invalid_request
from app.web.requests import IDEMPOTENCY_KEY, encode_canonically, hash_of_request, struct_of
from app.web.validation import echo, parse, violation_checker
from app.wording import count_noun

CREATE_PAYMENTS = b"""
select n, status, problem, detail, body, is_replayed, payment_id from api.create_payments(%s)
"""
BODY_BYTES_MAX = 64 * 1024
CURRENCY = re.compile("[A-Za-z]{3}")
JSON_KEY_PATTERN = re.compile(rb'"\s*:')
AMOUNT_MAX = 2**63 - 1
ACTION_FIELDS = frozenset({"/return_url", "/off_session", "/authentication"})
CUSTOMER_FIELDS = {"/customer_id": "customer", "/payment_method/saved": "saved payment method"}
CUSTOMER_RULES = {
    "known": "is no {noun} of yours",
    "erased": "is a {noun} whose data are erased",
    "owner": "is a {noun} of another customer",
    "detached": "is a {noun} that was removed",
    "expired": "is a {noun} whose card has expired",
}
"""What a rule of api.check_customer says."""

decode_payment = msgspec.json.Decoder(NewPayment).decode
payment_violations = violation_checker(NewPayment)


async def create_payment(request: ApiRequest) -> HttpResponse:
    """Create a payment.

    201: the payment is stored durably, and a worker sends it to the provider. A repetition with the same key and body
    gets the first answer again, byte for byte, with `Idempotency-Replayed: true`.
    """
    caller = request.caller()
    try:
        body = await request.read_body(BODY_BYTES_MAX)
    except Problem:
        await caller.require_active_merchant()
        raise
    key = request.headers.get(b"idempotency-key", b"")
    is_plain = request.is_json() and not request.is_encoded()
    accepted = read_fast(body) if is_plain and IDEMPOTENCY_KEY.fullmatch(key) else None
    if accepted is None:
        is_suspended = await caller.require_valid_key()
        try:
            payment = await read_strictly(request, body)
        except Problem:
            if is_suspended:
                raise await caller.audit_denial("merchant-suspended") from None
            raise
        accepted = payment, encode_canonically(payment)
    payment, encoded = accepted
    row = await request.services.payment_batching.submit(
        PaymentRequest(
            n=0,
            request_id=request.request_id,
            key_hash=caller.key_hash.hex(),
            address=caller.address,
            api_version=request.version,
            idempotency_key=key.decode(),
            request_hash=hash_of_request(encoded),
            amount=payment.amount,
            currency=payment.currency,
            rail=payment.payment_method.type,
            method_token=payment.payment_method.token,
            capture_method=payment.capture_method,
            reference=payment.reference,
            description=payment.description,
            statement_descriptor_suffix=payment.statement_descriptor_suffix,
            return_url=payment.return_url,
            off_session=payment.off_session,
            customer=payment.customer,
            metadata=payment.metadata,
            customer_id=payment.customer_id,
            saved_method=payment.payment_method.saved,
            save_method=method_to_save(payment),
            authentication=payment.authentication,
            traceparent=request.traceparent(),
        ),
        sender_of(request.headers[b"authorization"]),
    )
    _, status, problem, detail, document, is_replayed, payment_id = row
    if problem is not None:
        raise await problem_of_refusal(problem, detail, caller, body)
    caller.note_use()
    request.services.authenticator.remember_key(request.headers[b"authorization"], caller.key_hash)
    headers = [*JSON_HEADERS, (b"location", b"/v1/payments/" + payment_id.encode())]
    if is_replayed:
        headers.append(IDEMPOTENCY_REPLAYED)
    else:
        request.services.payment_scheduler.schedule()
    if b"prefer" in request.headers:
        document, applied = await document_after_command(request, caller, "payments", document, is_replayed=is_replayed)
        headers += applied
    headers += await request.position_headers()
    return HttpResponse(status, compact(document), request.request_id, headers)


async def read_strictly(request: ApiRequest, body: bytes) -> NewPayment:
    """Validate the request with all rules, and return the payment. Raises Problem with every broken rule."""
    request.require_json()
    key_violations = request.idempotency_key_violations()
    given = request.parse_json(body)
    violations = await amount_violations(request.services.database, given)
    reported_fields = {violation.field for violation in violations}
    violations += [violation for violation in payment_violations(given) if violation.field not in reported_fields]
    if not any({violation.meant, violation.field} & ACTION_FIELDS for violation in violations):
        violations += action_violations(given)
    violations += customer_violations(given)
    reported_fields = {violation.field for violation in violations}
    mandate = given.get("mandate") if isinstance(given, dict) else None
    violations += [found for found in mandate_violations(mandate) if found.field not in reported_fields]
    return with_lowercase_currency(struct_of(given, NewPayment, violations + key_violations))


async def amount_violations(database: DatabasePool, given: Any) -> list[RuleViolation]:
    """The currency's limits that the amount breaks. The check runs even if other fields are invalid."""
    amount, currency = (given.get("amount"), given.get("currency")) if isinstance(given, dict) else (None, None)
    if type(amount) is not int or not isinstance(currency, str) or not CURRENCY.fullmatch(currency):
        return []
    storable = max(-AMOUNT_MAX, min(amount, AMOUNT_MAX))
    row = await database.fetch_row("select api.check_amount_bounds(%s, %s)", storable, currency.lower())
    return [amount_violation(row[0] | given_in(given, row[0]["field"]))] if row and row[0] else []


def given_in(sent: dict[str, Any], field: str) -> dict[str, Any]:
    """The value of a field as it was sent: the amount in full, the currency in its own letters."""
    return {"given": sent[field.removeprefix("/")]}


def action_violations(given: Any) -> list[RuleViolation]:
    """The rules about how a payer acts that a body of any form breaks."""
    if not isinstance(given, dict):
        return []
    returns, is_absent = given.get("return_url") is not None, bool(given.get("off_session"))
    if given.get("authentication") == "script":
        messages = {
            "return_url": "return_url must not be sent with authentication script: the payer stays on your page",
            "off_session": "off_session must not be true with authentication script: an absent payer can't act",
        }
        broken = [name for name, is_sent in (("return_url", returns), ("off_session", is_absent)) if is_sent]
        return [RuleViolation(f"/{name}", "exclusive", messages[name]) for name in broken]
    if returns or is_absent:
        return []
    message = (
        "return_url is required, as the payer may have to act at the bank; set off_session if no payer is present, or"
        " authentication to script if your page runs the provider's script"
    )
    return [RuleViolation("/return_url", "required", message)]


def method_to_save(payment: NewPayment) -> MethodToSave | None:
    """The use and mandate of a payment method that is to be saved; None if it is not."""
    if payment.save_payment_method is None or payment.mandate is None:
        return None
    return MethodToSave(payment.save_payment_method, payment.mandate)


def customer_violations(given: Any) -> list[RuleViolation]:
    """The rules about a payment's customer and payment method that a body of any form breaks."""
    if not isinstance(given, dict):
        return []
    named = {name for name, value in given.items() if value is not None}
    method = given.get("payment_method")
    named |= (
        {f"payment_method/{name}" for name, value in method.items() if value is not None}
        if isinstance(method, dict)
        else {"payment_method/token"}
    )
    return [
        RuleViolation(f"/{field}", rule, message)
        for is_broken, field, rule, message in (
            (
                {"payment_method/saved", "customer"} <= named, "customer", "exclusive",
                "customer must not be sent with payment_method.saved, which belongs to a stored customer",
            ),
            (
                {"customer_id", "customer"} <= named, "customer", "exclusive",
                "customer must not be sent with customer_id: the payer is one or the other",
            ),
            (
                {"payment_method/token", "payment_method/saved"} <= named, "payment_method/saved", "exclusive",
                "payment_method.saved must not be sent with payment_method.token",
            ),
            (
                not {"payment_method/token", "payment_method/saved"} & named, "payment_method/token", "required",
                "payment_method.token is required, unless payment_method.saved is sent",
            ),
            (
                "save_payment_method" in named and "customer_id" not in named, "customer_id", "required",
                "customer_id is required with save_payment_method: the method is saved for a customer",
            ),
            (
                "save_payment_method" in named and "mandate" not in named, "mandate", "required",
                "mandate is required with save_payment_method: the payer must agree to later payments",
            ),
            (
                "mandate" in named and "save_payment_method" not in named, "mandate", "exclusive",
                "mandate must not be sent without save_payment_method",
            ),
            (
                {"save_payment_method", "payment_method/saved"} <= named, "save_payment_method", "exclusive",
                "save_payment_method must not be sent with payment_method.saved, which is saved already",
            ),
            (
                "save_payment_method" in named and bool(given.get("off_session")), "off_session", "exclusive",
                "off_session must not be true with save_payment_method: an absent payer agrees to nothing",
            ),
        )
        if is_broken
    ]  # fmt: skip


def is_consistent(payment: NewPayment) -> bool:
    """Whether a body breaks no rule of action_violations, customer_violations and mandate_violations."""
    method = payment.payment_method
    returns_or_is_absent = payment.return_url is not None or payment.off_session
    if returns_or_is_absent is (payment.authentication == "script"):
        return False
    if (method.token is None) is (method.saved is None):
        return False
    if payment.customer is not None and (payment.customer_id or method.saved):
        return False
    if payment.save_payment_method is None and payment.mandate is None:
        return True
    is_complete = None not in (payment.save_payment_method, payment.mandate, payment.customer_id, method.token)
    return is_complete and not payment.off_session and payment.mandate is not None and is_acceptable(payment.mandate)


async def problem_of_refusal(name: str, detail: Any, caller: Caller, body: bytes) -> Problem:
    """The refusal of api.create_payments as a problem."""
    match name:
        case _ if name in DENIALS:
            return await caller.audit_denial(name)
        case "invalid-request":
            if detail["field"] in CUSTOMER_FIELDS:
                return invalid_request([customer_violation(detail)])
            return invalid_request([amount_violation(detail | given_in(parse(body), detail["field"]))])
        case "reference-taken":
            taken_by = detail["payment_id"]
            return Problem(name, f"{taken_by or 'another payment'} has this reference", payment=taken_by)
        case "provider-account-refused":
            return Problem(name, "the provider does not accept payments for this merchant at present")
        case "limit-exceeded":
            return Problem(name, limit_text(detail), **detail)
        case "velocity-exceeded":
            what = f"{detail['subject']}: more than {bound_text(detail)} within {detail['period_seconds']} s"
            return Problem(name, f"rule {detail['rule']} refuses the payment; its {what}", **detail)
        case "idempotency-key-reused":
            return Problem(name, "this Idempotency-Key was sent before with another body")
        case _:
            raise AssertionError(f"SQL refused a payment for an unknown reason: {name}")


def limit_text(detail: dict[str, Any]) -> str:
    """The limit of a day that a request exceeds, the rest of it and when it starts anew."""
    left = f"{detail['remaining']} left on {detail['day']}, anew at {detail['resets_at']}"
    return f"the payment exceeds the limit of {bound_text(detail)} per day: {left}"


def bound_text(detail: dict[str, Any]) -> str:
    """The bound of a limit or a rule: a number of payments, or an amount in minor units."""
    currency = f" in {detail['currency']}" if detail["currency"] else ""
    match detail["exceeded"]:
        case "count":
            return f"{count_noun(detail['maximum'], 'payment')}{currency}"
        case "amount":
            return f"{detail['maximum']} minor units{currency}"
        case other:
            raise AssertionError(f"SQL named an unknown limit: {other}")


def read_fast(body: bytes) -> tuple[NewPayment, bytes] | None:
    """The payment and its canonical encoding, if the body breaks no rule; None sends it to `read_strictly`.

    Decoding hides duplicate keys and NUL. With a duplicate key the body has more keys than the encoding; NUL appears
    only as an escape sequence.
    """
    try:
        payment = with_lowercase_currency(decode_payment(body))
    except (ValueError, RecursionError):
        return None
    if not is_consistent(payment):
        return None
    encoded = encode_canonically(payment)
    if b"\\u" in body or len(JSON_KEY_PATTERN.findall(body)) != len(JSON_KEY_PATTERN.findall(encoded)):
        try:
            given = parse(body)
        except Problem:
            return None
        if payment_violations(given):
            return None
    return payment, encoded


def with_lowercase_currency(payment: NewPayment) -> NewPayment:
    """The currency in lower case, so that one request has one hash."""
    lower = payment.currency.lower()
    return payment if lower == payment.currency else replace(payment, currency=lower)


def amount_violation(detail: dict[str, Any]) -> RuleViolation:
    """The result of api.check_amount_bounds as a violation."""
    if detail["rule"] == "known":
        message = f"currency {detail['given']} is not accepted"
    else:
        bound = {"minimum": "at least", "maximum": "at most", "multiple": "a multiple of"}[detail["rule"]]
        message = f"amount must be {bound} {detail['limit']} for {detail['currency']}"
    limit = detail.get("limit", msgspec.UNSET)
    return RuleViolation(detail["field"], detail["rule"], message, limit, echo(detail["given"]))


def customer_violation(detail: dict[str, Any]) -> RuleViolation:
    """The result of api.check_customer as a violation."""
    field, rule, given = detail["field"], detail["rule"], detail["given"]
    message = f"{given} {CUSTOMER_RULES[rule].format(noun=CUSTOMER_FIELDS[field])}"
    return RuleViolation(field, rule, message, given=given)
