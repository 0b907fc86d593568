"""Commands that change a payment or a dispute: capture, cancel, refund, submit evidence.

Each is one SQL function and one transaction, which stores the answer under the Idempotency-Key with its effect.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, LiteralString

import msgspec

from app.api.create_payment import BODY_BYTES_MAX, amount_violation
from app.api.held_answers import document_after_command
from app.api.requests import IDEMPOTENCY_REPLAYED, JSON_HEADERS, ApiRequest, compact
from app.api.waiting import AwaitedKind
from app.web.asgi import HttpResponse
from app.web.auth import DENIALS, KEY_PROBLEMS, Caller
from app.web.problems import Problem, RuleViolation, invalid_request
from app.web.requests import encode_canonically, hash_of_request, struct_of
from app.web.validation import violation_checker

WHOLE_UNITS = {"/evidence": "characters", "/metadata": "keys"}
"""Fields that are merged with what was given before; the result is bounded in these units."""
SCHEDULE_COMMAND_WORKERS = (
    "select outbox.schedule_handlers('{capture,cancel,refund,evidence,update_customer,detach_method,seal_secret}')"
)
COMMAND_PROBLEMS = (
    "invalid-request",
    "idempotency-key-missing",
    "unauthenticated",
    *KEY_PROBLEMS,
    "not-found",
    "wrong-state",
    "too-large",
    "not-json",
    "unsupported-encoding",
    "idempotency-key-reused",
    "overloaded",
    "unavailable",
)


async def execute_command(
    request: ApiRequest,
    struct: type[msgspec.Struct],
    statement: LiteralString,
    *,
    subject: str,
    subject_id: str,
    awaits: AwaitedKind | None = None,
    location: str = "",
    needs_worker: bool = True,
    make_sealed: Callable[[], Awaitable[dict[str, Any]]] | None = None,
) -> HttpResponse:
    """The answer to a command. Raises Problem.

    `statement` takes a request as JSON and returns status, problem, detail, body, is_replayed. `subject` is the name of
    the path's id in that JSON; `subject_id` is empty if the path holds no id. `location` plus the new object's id is
    the Location. `awaits` says what a request with `Prefer: wait=N` waits for (app/api/held_answers.py).
    `needs_worker`: the command makes an event that a worker handles. `make_sealed` makes, for a valid request, fields
    for the statement that the request does not have, and that differ in each repetition.
    """
    assert struct is request.route.body
    caller = request.caller()
    try:
        body = await request.read_body(BODY_BYTES_MAX)
        command = read_command(request, body, struct)
    except Problem:
        await caller.require_valid_key()
        raise
    if not subject_id:
        await caller.require_valid_key()
        raise await caller.audit_denial("not-found")
    document = msgspec.to_builtins(command) | {
        "key_hash": caller.key_hash.hex(),
        "request_id": request.request_id,
        "address": caller.address,
        "api_version": request.version,
        "idempotency_key": request.headers[b"idempotency-key"].decode(),
        "request_hash": hash_of_request(encode_canonically(command), subject_id),
        subject: subject_id,
        **(await make_sealed() if make_sealed else {}),
    }
    if traceparent := request.traceparent():
        document["traceparent"] = traceparent
    row = await request.services.database.fetch_row(statement, msgspec.json.encode(document).decode())
    assert row is not None
    status, problem, detail, answer, is_replayed = row
    if problem is not None:
        raise await problem_of_command(problem, detail, caller)
    caller.note_use()
    headers = [*JSON_HEADERS]
    if location:
        headers.append((b"location", f"{location}{msgspec.json.decode(answer)['id']}".encode()))
    if is_replayed:
        headers.append(IDEMPOTENCY_REPLAYED)
    elif needs_worker:
        request.services.command_scheduler.schedule()
    if awaits is not None and b"prefer" in request.headers:
        answer, applied = await document_after_command(request, caller, awaits, answer, is_replayed=is_replayed)
        headers += applied
    headers += await request.position_headers()
    return HttpResponse(status, compact(answer), request.request_id, headers)


def read_command(request: ApiRequest, body: bytes, struct: type[msgspec.Struct]) -> msgspec.Struct:
    """The body as its struct; no body is an empty object. Raises Problem with every rule that the request breaks."""
    if body:
        request.require_json()
    key_violations = request.idempotency_key_violations()
    given = request.parse_json(body) if body else {}
    return struct_of(given, struct, violation_checker(struct)(given) + key_violations)


def command_violation(detail: dict[str, Any]) -> RuleViolation:
    """A rule that only the database can check, broken by a command."""
    if "message" in detail:
        return RuleViolation(detail["field"], detail["rule"], detail["message"], detail["limit"], detail["given"])
    if detail["field"] not in WHOLE_UNITS:
        broken = amount_violation(detail)
        # The bounds of a part are those of its payment, not of the currency.
        if detail["rule"] == "maximum":
            broken.message = f"amount must be at most {detail['limit']}, which is left of the payment"
        return broken
    subject = detail["field"].removeprefix("/")
    message = f"{subject} must have at most {detail['limit']} {WHOLE_UNITS[detail['field']]} with what was given before"
    return RuleViolation(detail["field"], detail["rule"], message, detail["limit"], detail["given"])


async def problem_of_command(name: str, detail: Any, caller: Caller) -> Problem:
    """The refusal of a SQL function as a problem."""
    match name:
        case _ if name in DENIALS:
            return await caller.audit_denial(name)
        case "invalid-request":
            return invalid_request([command_violation(detail)])
        case "wrong-state":
            state = f"its state is {detail['state']}"
            text = f"{detail['reason']} ({state})" if detail.get("reason") else state
            return Problem(name, text, state=detail["state"])
        case "balance-too-low":
            text = f"{detail['needed']} is needed, the balance is {detail['balance']} {detail['currency']}"
            return Problem(name, text, **detail)
        case "idempotency-key-reused":
            return Problem(name, "this Idempotency-Key was sent before with another body or for another object")
        case _:
            raise AssertionError(f"SQL refused a command for an unknown reason: {name}")
