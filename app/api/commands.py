"""Commands about a payment: POST /v1/payments/{id}/capture and the like, from bytes to bytes.

One SQL function each, one transaction each; the function keeps the answer beside its effect under the Idempotency-Key,
as for payments. They answer before Litestar's machinery begins, which knows them for the documentation only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, LiteralString

import msgspec
import psycopg
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Struct

from app.api.create_payment import (
    BODY_BYTES_MAX,
    IDEMPOTENCY_KEY,
    IDEMPOTENCY_REPLAYED,
    JSON_CONTENT_TYPE,
    amount_violation,
    is_json,
)
from app.api.schemas import NewCancellation, NewCapture, NewRefund, SubmittedEvidence
from app.web.asgi import BodyTooLarge, ClientDisconnected, HttpResponse, new_request_id, read_body
from app.web.auth import Authenticator, Caller
from app.web.batching import Unavailable, WorkerScheduler
from app.web.problems import Problem, RuleViolation, invalid_request, overloaded, problem_from_database_error
from app.web.requests import DISPUTE_ID, PAYMENT_ID
from app.web.validation import parse, violation_checker

encode = msgspec.json.Encoder(order="deterministic").encode


class Command(Struct, frozen=True):
    """One of them: what it is called, what it takes."""

    route: str
    """As the audit trail and the Idempotency-Key's scope name it."""
    statement: LiteralString
    """One call: a request as JSON in, api.outcome out."""
    subject: str
    """What the path's id is called in the request."""
    ids: re.Pattern[str]
    body: type[Struct]
    location: str = ""
    """Where what was made can be read, up to its id."""


class CommandEndpoint:
    """Takes commands, as CreatePaymentEndpoint takes payments."""

    def __init__(self, authenticator: Authenticator, worker_scheduler: WorkerScheduler) -> None:
        self._authenticator = authenticator
        self._worker_scheduler = worker_scheduler

    async def execute(self, command: Command, subject: str, scope: Scope, receive: Receive) -> HttpResponse:
        """The answer to one command. Raises ClientDisconnected if nobody waits for it."""
        request_id = new_request_id()
        try:
            return await self._execute(command, subject, scope, receive, request_id)
        except Problem as problem:
            return problem.response(request_id)
        except Unavailable:
            return overloaded().response(request_id)
        except psycopg.Error as error:
            return problem_from_database_error(error).response(request_id)

    async def _execute(
        self, command: Command, subject: str, scope: Any, receive: Receive, request_id: str
    ) -> HttpResponse:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        caller = self._authenticator.read_caller(scope, headers, request_id, command.route)
        try:
            body = await read_body(receive, BODY_BYTES_MAX)
        except BodyTooLarge:
            await caller.require_active_merchant()
            detail = f"the body has more than {BODY_BYTES_MAX} bytes"
            raise Problem("too-large", detail, limit=BODY_BYTES_MAX, headers=[(b"connection", b"close")]) from None
        try:
            asked = read_command_body(headers, body, command.body)
        except Problem:
            await caller.require_active_merchant()
            raise
        if not command.ids.fullmatch(subject):
            await caller.require_known_key()
            raise await caller.audit_denial("not-found")
        instruction = subject.encode() + encode(asked)
        request = msgspec.to_builtins(asked) | {
            "key_hash": caller.key_hash.hex(),
            "request_id": request_id,
            "address": caller.address,
            "idempotency_key": headers[b"idempotency-key"].decode(),
            "request_hash": hashlib.sha256(instruction).hexdigest(),
            command.subject: subject,
        }
        row = await self._authenticator.database.fetch_row(command.statement, encode(request).decode())
        assert row is not None
        return await self._answer(command, row, caller, request_id)

    async def _answer(self, command: Command, row: tuple[Any, ...], caller: Caller, request_id: str) -> HttpResponse:
        status, problem, detail, body, is_replayed = row
        if problem is None:
            headers = [JSON_CONTENT_TYPE]
            if command.location:
                headers.append((b"location", f"{command.location}{msgspec.json.decode(body)['id']}".encode()))
            if is_replayed:
                headers.append(IDEMPOTENCY_REPLAYED)
            else:
                self._worker_scheduler.schedule()
            return HttpResponse(status, body.encode(), request_id, headers)
        match problem:
            case "unauthenticated" | "forbidden" | "not-found":
                raise await caller.audit_denial(problem)
            case "invalid-request":
                raise invalid_request([amount_violation(detail)])
            case "wrong-state":
                reason = f": {detail['reason']}" if detail.get("reason") else ""
                raise Problem(problem, f"it is {detail['state']}{reason}", state=detail["state"])
            case "balance-too-low":
                detail_text = f"{detail['needed']} is needed, the balance is {detail['balance']} {detail['currency']}"
                raise Problem(problem, detail_text, **detail)
        raise Problem(problem, "this Idempotency-Key was sent before with another body or for another object")


def read_command_body(headers: dict[bytes, bytes], body: bytes, struct: type[Struct]) -> Struct:
    """The body as its struct; none at all is an empty one. Raises Problem with every rule that the request breaks."""
    key = headers.get(b"idempotency-key")
    if body and not is_json(headers):
        raise Problem("not-json", "the header Content-Type must be application/json")
    if not key:
        raise Problem("idempotency-key-missing", "the header Idempotency-Key is missing")
    given = parse(body) if body else {}
    errors = violation_checker(struct)(given)
    if not IDEMPOTENCY_KEY.fullmatch(key):
        message = "Idempotency-Key must have 1 to 255 printable ASCII characters"
        errors.append(RuleViolation("Idempotency-Key", "pattern", message, place="header"))
    if errors:
        raise invalid_request(errors)
    return msgspec.convert(given, struct)


CAPTURE = Command(
    "POST /v1/payments/{id}/capture",
    "select status, problem, detail, body, is_replayed from api.capture_payment(%s)",
    "payment_id",
    PAYMENT_ID,
    NewCapture,
)
CANCEL = Command(
    "POST /v1/payments/{id}/cancel",
    "select status, problem, detail, body, is_replayed from api.cancel_payment(%s)",
    "payment_id",
    PAYMENT_ID,
    NewCancellation,
)

REFUND = Command(
    "POST /v1/payments/{id}/refunds",
    "select status, problem, detail, body, is_replayed from api.create_refund(%s)",
    "payment_id",
    PAYMENT_ID,
    NewRefund,
    "/v1/refunds/",
)

EVIDENCE = Command(
    "POST /v1/disputes/{id}/evidence",
    "select status, problem, detail, body, is_replayed from api.submit_evidence(%s)",
    "dispute_id",
    DISPUTE_ID,
    SubmittedEvidence,
)


def answered_by(command: Command) -> Callable[[ASGIApp], ASGIApp]:
    """Middleware of the route that documents a command, answering in its place."""

    def answering(app: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            commands: CommandEndpoint = scope["litestar_app"].state.commands
            (subject,) = scope["path_params"].values()
            try:
                taken = await commands.execute(command, subject, scope, receive)
            except ClientDisconnected:
                return
            await taken(scope, receive, send)

        return answer

    return answering
