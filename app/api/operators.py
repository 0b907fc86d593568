"""The operators' part of the API, with keys of their own: dead letters and the status report.

    GET  /v1/operator/dead-letters[/{id}]
    POST /v1/operator/dead-letters/{id}/replay | discard     one
    POST /v1/operator/dead-letters/replay | discard          all open ones that match, a hundred at a time
    GET  /v1/operator/status

No Idempotency-Key is needed: a repeated decision has no second effect, and its answer says so. The SQL functions find
the operator by the key's hash, so no route can name one. A merchant's key gets 403.
"""

from __future__ import annotations

from typing import LiteralString

import msgspec

from app.api.ids import LETTER_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.operators import (
    BulkDecision,
    DeadLetterAction,
    DeadLetterList,
    DeadLettersQuery,
    Decision,
    DecisionResult,
    DecisionResultList,
)
from app.status_findings import VERDICTS, find_problems, verdict_of
from app.web.asgi import HttpResponse
from app.web.auth import Caller
from app.web.problems import Problem, RuleViolation, invalid_request

BODY_BYTES_MAX = 16 * 1024
BULK_LETTERS_MAX = 100

API_STATEMENTS: dict[DeadLetterAction, LiteralString] = {
    "replay": "select outcome, detail from api.replay_dead_letter(%s, %s, %s, %s, %s, %s)",
    "discard": "select outcome, detail from api.discard_dead_letter(%s, %s, %s, %s, %s, %s)",
}


async def list_dead_letters(request: ApiRequest) -> HttpResponse:
    """List dead letters (events whose handler gave up), the oldest first."""
    operator = request.caller()
    asked = await request.operator_query(operator, DeadLettersQuery)
    return request.respond(await fetch_letters_page(operator, asked))


async def get_dead_letter(request: ApiRequest) -> HttpResponse:
    """Read a dead letter: its errors, its payment, the last known state at the provider, the possible actions."""
    operator = request.caller()
    query = "select body from api.get_dead_letter(%s, %s, %s)"
    return request.respond(await operator.fetch_as_operator(query, id_or_empty(request, LETTER_ID)))


async def replay_dead_letter(request: ApiRequest) -> HttpResponse:
    """Make the event due at once. It stays unchanged if it was replayed before or its payment has ended."""
    return await decide(request, "replay")


async def discard_dead_letter(request: ApiRequest) -> HttpResponse:
    """Discard the event: an operation that was not carried out ends as failed. 409 if the provider may have done it."""
    return await decide(request, "discard")


async def replay_dead_letters(request: ApiRequest) -> HttpResponse:
    """Replay all open dead letters that match, a hundred at a time, each in its own transaction."""
    return await decide_in_bulk(request, "replay")


async def discard_dead_letters(request: ApiRequest) -> HttpResponse:
    """Discard all open dead letters that match, a hundred at a time. Letters that must stay are reported unchanged."""
    return await decide_in_bulk(request, "discard")


async def get_status(request: ApiRequest) -> HttpResponse:
    """Report the state of the service and what to do next, as `surety status` does."""
    state = msgspec.json.decode(await request.caller().fetch_as_operator("select body from api.get_status(%s, %s)"))
    if (replica := request.services.replica) is not None:
        state["replica"] = replica.state or "away"
    findings = find_problems(state)
    document = {
        "object": "status",
        "verdict": VERDICTS[verdict_of(findings)].lower(),
        "findings": [finding._asdict() for finding in findings],
        "state": state,
    }
    return request.respond(msgspec.json.encode(document))


async def decide(request: ApiRequest, action: DeadLetterAction) -> HttpResponse:
    """Replay or discard one letter. Raises Problem."""
    operator = request.caller()
    decision = await request.operator_body(operator, Decision, BODY_BYTES_MAX)
    letter_id = id_or_empty(request, LETTER_ID)
    done = await apply_decision(operator, letter_id, action, decision.reason, decision.dry_run)
    match done.outcome:
        case "not_found":
            raise Problem("not-found", f"there is no dead letter {request.path_parameter()[:100]}")
        case "refused":
            raise Problem("wrong-state", f"{done.id}: {done.detail}")
    return request.respond(msgspec.json.encode(done))


async def decide_in_bulk(request: ApiRequest, action: DeadLetterAction) -> HttpResponse:
    """Replay or discard up to a hundred open letters. Raises Problem."""
    operator = request.caller()
    decision = await request.operator_body(operator, BulkDecision, BODY_BYTES_MAX)
    if decision.handler is None and decision.error is None:
        raise invalid_request(
            [RuleViolation("/handler", "required", "handler or error is required: a request can't act on all letters")]
        )
    page = await fetch_letters_page(
        operator,
        DeadLettersQuery(
            handler=decision.handler,
            error=decision.error,
            limit=BULK_LETTERS_MAX,
            starting_after=decision.starting_after,
        ),
    )
    found = msgspec.json.decode(page, type=DeadLetterList)
    data = [
        await apply_decision(operator, letter.id, action, decision.reason, decision.dry_run) for letter in found.data
    ]
    return request.respond(msgspec.json.encode(DecisionResultList("list", data, found.has_more)))


async def apply_decision(
    operator: Caller, letter_id: str, action: DeadLetterAction, reason: str, dry_run: bool
) -> DecisionResult:
    """Apply the decision to one letter in one transaction. Repeating it has no further effect."""
    row = await operator.row_as_operator(API_STATEMENTS[action], letter_id, reason, dry_run, operator.request_id)
    return DecisionResult(letter_id, *row)


async def fetch_letters_page(operator: Caller, asked: DeadLettersQuery) -> str:
    """A page of letters, as the database renders it."""
    return await operator.fetch_as_operator(
        "select body from api.list_dead_letters(%s, %s, %s, %s, %s, %s, %s)",
        asked.status,
        asked.handler,
        asked.error,
        asked.limit,
        asked.starting_after,
    )
