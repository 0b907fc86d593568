"""The operators' part of the API, with keys of their own: dead letters, and how things stand.

    GET  /v1/operator/dead-letters[/{id}]
    POST /v1/operator/dead-letters/{id}/replay | discard     one
    POST /v1/operator/dead-letters/replay | discard          all open ones that match, a hundred at a time
    GET  /v1/operator/status

No Idempotency-Key is needed: what is done twice is done once, and the second answer says so. Whose key it is, the SQL
functions find out by its hash, so no route can name an operator. A merchant's key gets 403.
"""

from __future__ import annotations

import re
from typing import Any, Literal, LiteralString, TypeVar

import msgspec
from litestar import Request, Response, Router, get, post

from app.api.create_payment import is_json
from app.api.operator_schemas import (
    BulkDecision,
    DeadLetter,
    DeadLetterList,
    DeadLettersQuery,
    Decision,
    DecisionResult,
    DecisionResultList,
    StatusReport,
)
from app.status_findings import VERDICTS, find_problems, verdict_of
from app.web.asgi import BodyTooLarge, ClientDisconnected, read_body
from app.web.auth import Authenticator, Caller
from app.web.frame import request_id_of
from app.web.openapi import problem_responses, query_parameters_of, request_body_of
from app.web.problems import Problem, RuleViolation, invalid_request
from app.web.validation import parse, read_query, violation_checker

T = TypeVar("T", bound=msgspec.Struct)

LETTER_ID = re.compile("dl_[0-9a-f]{32}")
BODY_BYTES_MAX = 16 * 1024
BULK_LETTERS_MAX = 100

DeadLetterAction = Literal["replay", "discard"]
API_STATEMENTS: dict[DeadLetterAction, LiteralString] = {
    "replay": "select outcome, detail from api.replay_dead_letter(%s, %s, %s, %s, %s, %s)",
    "discard": "select outcome, detail from api.discard_dead_letter(%s, %s, %s, %s, %s, %s)",
}


@get(
    "/dead-letters",
    operation_class=query_parameters_of(DeadLettersQuery),
    responses=problem_responses("invalid-request", "unauthenticated", "forbidden", "overloaded"),
)
async def list_dead_letters(request: Request[Any, Any, Any]) -> Response[DeadLetterList]:
    """List events that were given up on, the oldest first."""
    operator = operator_of(request, "GET /v1/operator/dead-letters")
    await operator.require_operator()
    asked = read_query(request.scope["query_string"], DeadLettersQuery)
    return operator_json_response(request, await fetch_letters_page(operator, asked))


@get(
    "/dead-letters/{letter_id:str}",
    responses=problem_responses("unauthenticated", "forbidden", "not-found", "overloaded"),
)
async def get_dead_letter(request: Request[Any, Any, Any], letter_id: str) -> Response[DeadLetter]:
    """Read one: every error, its payment, what the provider was last heard to hold, what can be done."""
    operator = operator_of(request, "GET /v1/operator/dead-letters/{id}")
    query = "select body from api.get_dead_letter(%s, %s)"
    return operator_json_response(request, await operator.fetch_as_operator(query, valid_letter_id_or_empty(letter_id)))


DECISION_PROBLEMS = problem_responses(
    "invalid-request",
    "unauthenticated",
    "forbidden",
    "not-found",
    "wrong-state",
    "too-large",
    "not-json",
    "overloaded",
)
BULK_DECISION_PROBLEMS = problem_responses(
    "invalid-request", "unauthenticated", "forbidden", "too-large", "not-json", "overloaded"
)


@post(
    "/dead-letters/{letter_id:str}/replay",
    status_code=200,
    operation_class=request_body_of(Decision),
    responses=DECISION_PROBLEMS,
)
async def replay_dead_letter(request: Request[Any, Any, Any], letter_id: str) -> Response[DecisionResult]:
    """Make the event due again at once. One that was replayed, or whose payment has ended meanwhile, is left alone."""
    return await decide(request, letter_id, "replay")


@post(
    "/dead-letters/{letter_id:str}/discard",
    status_code=200,
    operation_class=request_body_of(Decision),
    responses=DECISION_PROBLEMS,
)
async def discard_dead_letter(request: Request[Any, Any, Any], letter_id: str) -> Response[DecisionResult]:
    """Give the event up. What it was to do has failed, where that is sure; 409 where the provider may have done it."""
    return await decide(request, letter_id, "discard")


@post(
    "/dead-letters/replay",
    status_code=200,
    operation_class=request_body_of(BulkDecision),
    responses=BULK_DECISION_PROBLEMS,
)
async def replay_dead_letters(request: Request[Any, Any, Any]) -> Response[DecisionResultList]:
    """Replay all open letters that match, a hundred at a time; each is a transaction of its own."""
    return await decide_in_bulk(request, "replay")


@post(
    "/dead-letters/discard",
    status_code=200,
    operation_class=request_body_of(BulkDecision),
    responses=BULK_DECISION_PROBLEMS,
)
async def discard_dead_letters(request: Request[Any, Any, Any]) -> Response[DecisionResultList]:
    """Discard all open letters that match, a hundred at a time; what may not be discarded is told and left alone."""
    return await decide_in_bulk(request, "discard")


@get("/status", responses=problem_responses("unauthenticated", "forbidden", "overloaded"))
async def get_status(request: Request[Any, Any, Any]) -> Response[StatusReport]:
    """Tell how things stand and what to do next, as `surety status` does."""
    operator = operator_of(request, "GET /v1/operator/status")
    state = msgspec.json.decode(await operator.fetch_as_operator("select body from api.get_status(%s)"))
    findings = find_problems(state)
    verdict = VERDICTS[verdict_of(findings)].lower()
    documents = [finding._asdict() for finding in findings]
    return operator_json_response(
        request, {"object": "status", "verdict": verdict, "findings": documents, "state": state}
    )


async def decide(request: Request[Any, Any, Any], letter_id: str, action: DeadLetterAction) -> Response[DecisionResult]:
    """Do to one letter what its operator decided. Raises Problem."""
    operator = operator_of(request, f"POST /v1/operator/dead-letters/{{id}}/{action}")
    await operator.require_operator()
    decision = await read_decision(request, Decision)
    done = await apply_decision(
        operator, valid_letter_id_or_empty(letter_id), action, decision.reason, decision.dry_run
    )
    match done.outcome:
        case "not_found":
            raise Problem("not-found", f"there is no dead letter {letter_id[:100]}")
        case "refused":
            raise Problem("wrong-state", f"{done.id}: {done.detail}")
    return operator_json_response(request, done)


async def decide_in_bulk(request: Request[Any, Any, Any], action: DeadLetterAction) -> Response[DecisionResultList]:
    """Do to a hundred open letters at most what their operator decided. Raises Problem."""
    operator = operator_of(request, f"POST /v1/operator/dead-letters/{action}")
    await operator.require_operator()
    decision = await read_decision(request, BulkDecision)
    if decision.handler is None and decision.error is None:
        raise invalid_request(
            [RuleViolation("/handler", "required", "handler or error is required: all letters at once is too many")]
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
    return operator_json_response(request, DecisionResultList("list", data, found.has_more))


async def apply_decision(
    operator: Caller, letter_id: str, action: DeadLetterAction, reason: str, dry_run: bool
) -> DecisionResult:
    """One letter, one transaction, which may be repeated: what is done is not done again."""
    row = await operator.row_as_operator(
        API_STATEMENTS[action], letter_id, reason, dry_run, operator.request_id, operator.address
    )
    return DecisionResult(letter_id, *row)


async def fetch_letters_page(operator: Caller, asked: DeadLettersQuery) -> str:
    """A page of letters, as the database renders it."""
    return await operator.fetch_as_operator(
        "select body from api.list_dead_letters(%s, %s, %s, %s, %s, %s)",
        asked.status,
        asked.handler,
        asked.error,
        asked.limit,
        asked.starting_after,
    )


async def read_decision(request: Request[Any, Any, Any], struct: type[T]) -> T:
    """The body as a struct. Raises Problem, with every rule that it breaks."""
    if not is_json(dict(request.scope["headers"])):
        raise Problem("not-json", "the header Content-Type must be application/json")
    try:
        given = parse(await read_body(request.receive, BODY_BYTES_MAX))
    except BodyTooLarge:
        detail = f"the body has more than {BODY_BYTES_MAX} bytes"
        raise Problem("too-large", detail, limit=BODY_BYTES_MAX, headers=[(b"connection", b"close")]) from None
    except ClientDisconnected:
        raise invalid_request([RuleViolation("", "complete", "the body did not come")]) from None
    if errors := violation_checker(struct)(given):
        raise invalid_request(errors)
    return msgspec.convert(given, struct)


def operator_of(request: Request[Any, Any, Any], route: str) -> Caller:
    """Who asks; raises Problem for what can't be a key."""
    authenticator: Authenticator = request.app.state.authenticator
    return authenticator.read_caller(request.scope, dict(request.scope["headers"]), request_id_of(request), route)


def valid_letter_id_or_empty(letter_id: str) -> str:
    """A letter's id, or one that no letter has."""
    return letter_id if LETTER_ID.fullmatch(letter_id) else ""


def operator_json_response(request: Request[Any, Any, Any], document: Any) -> Response[Any]:
    """A document, rendered by the database or to be rendered."""
    body = document.encode() if isinstance(document, str) else msgspec.json.encode(document)
    return Response(body, media_type="application/json", headers={"request-id": request_id_of(request)})


OPERATOR_ROUTES = Router(
    "/v1/operator",
    route_handlers=[
        list_dead_letters,
        get_dead_letter,
        replay_dead_letter,
        discard_dead_letter,
        replay_dead_letters,
        discard_dead_letters,
        get_status,
    ],
    tags=["operators"],
)
