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
    DeadLetter,
    DeadLetterList,
    DeadLettersQuery,
    Decision,
    DecisionOnAll,
    Done,
    DoneList,
    Standing,
)
from app.status_findings import VERDICTS, judge, verdict_of
from app.web.asgi import Gone, TooLarge, read_body
from app.web.auth import Caller, Doorkeeper
from app.web.frame import request_id_of
from app.web.openapi import body_of, parameters_of, refusals
from app.web.problems import Broken, Problem, invalid
from app.web.validation import checker, parse, read_query

T = TypeVar("T", bound=msgspec.Struct)

LETTER_ID = re.compile("dl_[0-9a-f]{32}")
BODY_BYTES_MAX = 16 * 1024
LETTERS_AT_ONCE = 100

Doing = Literal["replay", "discard"]
STATEMENTS: dict[Doing, LiteralString] = {
    "replay": "select outcome, detail from api.replay_dead_letter(%s, %s, %s, %s, %s, %s)",
    "discard": "select outcome, detail from api.discard_dead_letter(%s, %s, %s, %s, %s, %s)",
}


@get(
    "/dead-letters",
    operation_class=parameters_of(DeadLettersQuery),
    responses=refusals("invalid-request", "unauthenticated", "forbidden", "overloaded"),
)
async def list_dead_letters(request: Request[Any, Any, Any]) -> Response[DeadLetterList]:
    """List events that were given up on, the oldest first."""
    operator = operator_of(request, "GET /v1/operator/dead-letters")
    await operator.must_be_operator()
    asked = read_query(request.scope["query_string"], DeadLettersQuery)
    return json(request, await letters(operator, asked))


@get("/dead-letters/{letter_id:str}", responses=refusals("unauthenticated", "forbidden", "not-found", "overloaded"))
async def get_dead_letter(request: Request[Any, Any, Any], letter_id: str) -> Response[DeadLetter]:
    """Read one: every error, its payment, what the provider was last heard to hold, what can be done."""
    operator = operator_of(request, "GET /v1/operator/dead-letters/{id}")
    query = "select body from api.get_dead_letter(%s, %s)"
    return json(request, await operator.fetch_as_operator(query, well_formed(letter_id)))


DECIDING = refusals(
    "invalid-request",
    "unauthenticated",
    "forbidden",
    "not-found",
    "wrong-state",
    "too-large",
    "not-json",
    "overloaded",
)
DECIDING_ON_ALL = refusals("invalid-request", "unauthenticated", "forbidden", "too-large", "not-json", "overloaded")


@post(
    "/dead-letters/{letter_id:str}/replay",
    status_code=200,
    operation_class=body_of(Decision),
    responses=DECIDING,
)
async def replay_dead_letter(request: Request[Any, Any, Any], letter_id: str) -> Response[Done]:
    """Make the event due again at once. One that was replayed, or whose payment has ended meanwhile, is left alone."""
    return await decide(request, letter_id, "replay")


@post(
    "/dead-letters/{letter_id:str}/discard",
    status_code=200,
    operation_class=body_of(Decision),
    responses=DECIDING,
)
async def discard_dead_letter(request: Request[Any, Any, Any], letter_id: str) -> Response[Done]:
    """Give the event up. What it was to do has failed, where that is sure; 409 where the provider may have done it."""
    return await decide(request, letter_id, "discard")


@post("/dead-letters/replay", status_code=200, operation_class=body_of(DecisionOnAll), responses=DECIDING_ON_ALL)
async def replay_dead_letters(request: Request[Any, Any, Any]) -> Response[DoneList]:
    """Replay all open letters that match, a hundred at a time; each is a transaction of its own."""
    return await decide_on_all(request, "replay")


@post("/dead-letters/discard", status_code=200, operation_class=body_of(DecisionOnAll), responses=DECIDING_ON_ALL)
async def discard_dead_letters(request: Request[Any, Any, Any]) -> Response[DoneList]:
    """Discard all open letters that match, a hundred at a time; what may not be discarded is told and left alone."""
    return await decide_on_all(request, "discard")


@get("/status", responses=refusals("unauthenticated", "forbidden", "overloaded"))
async def get_status(request: Request[Any, Any, Any]) -> Response[Standing]:
    """Tell how things stand and what to do next, as `surety status` does."""
    operator = operator_of(request, "GET /v1/operator/status")
    state = msgspec.json.decode(await operator.fetch_as_operator("select body from api.read_status(%s)"))
    findings = judge(state)
    verdict = VERDICTS[verdict_of(findings)].lower()
    told = [finding._asdict() for finding in findings]
    return json(request, {"object": "status", "verdict": verdict, "findings": told, "state": state})


async def decide(request: Request[Any, Any, Any], letter_id: str, doing: Doing) -> Response[Done]:
    """Do to one letter what its operator decided. Raises Problem."""
    operator = operator_of(request, f"POST /v1/operator/dead-letters/{{id}}/{doing}")
    await operator.must_be_operator()
    decision = await read_decision(request, Decision)
    done = await do(operator, well_formed(letter_id), doing, decision.reason, decision.dry_run)
    match done.outcome:
        case "not_found":
            raise Problem("not-found", f"there is no dead letter {letter_id[:100]}")
        case "refused":
            raise Problem("wrong-state", f"{done.id}: {done.detail}")
    return json(request, done)


async def decide_on_all(request: Request[Any, Any, Any], doing: Doing) -> Response[DoneList]:
    """Do to a hundred open letters at most what their operator decided. Raises Problem."""
    operator = operator_of(request, f"POST /v1/operator/dead-letters/{doing}")
    await operator.must_be_operator()
    decision = await read_decision(request, DecisionOnAll)
    if decision.handler is None and decision.error is None:
        raise invalid([Broken("/handler", "required", "handler or error is required: all letters at once is too many")])
    page = await letters(
        operator,
        DeadLettersQuery(
            handler=decision.handler,
            error=decision.error,
            limit=LETTERS_AT_ONCE,
            starting_after=decision.starting_after,
        ),
    )
    found = msgspec.json.decode(page, type=DeadLetterList)
    data = [await do(operator, letter.id, doing, decision.reason, decision.dry_run) for letter in found.data]
    return json(request, DoneList("list", data, found.has_more))


async def do(operator: Caller, letter_id: str, doing: Doing, reason: str, dry_run: bool) -> Done:
    """One letter, one transaction, which may be repeated: what is done is not done again."""
    row = await operator.row_as_operator(
        STATEMENTS[doing], letter_id, reason, dry_run, operator.request_id, operator.address
    )
    return Done(letter_id, *row)


async def letters(operator: Caller, asked: DeadLettersQuery) -> str:
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
    except TooLarge:
        detail = f"the body has more than {BODY_BYTES_MAX} bytes"
        raise Problem("too-large", detail, limit=BODY_BYTES_MAX, headers=[(b"connection", b"close")]) from None
    except Gone:
        raise invalid([Broken("", "complete", "the body did not come")]) from None
    if errors := checker(struct)(given):
        raise invalid(errors)
    return msgspec.convert(given, struct)


def operator_of(request: Request[Any, Any, Any], route: str) -> Caller:
    """Who asks; raises Problem for what can't be a key."""
    doorkeeper: Doorkeeper = request.app.state.doorkeeper
    return doorkeeper.caller(request.scope, dict(request.scope["headers"]), request_id_of(request), route)


def well_formed(letter_id: str) -> str:
    """A letter's id, or one that no letter has."""
    return letter_id if LETTER_ID.fullmatch(letter_id) else ""


def json(request: Request[Any, Any, Any], document: Any) -> Response[Any]:
    """A document, rendered by the database or to be rendered."""
    body = document.encode() if isinstance(document, str) else msgspec.json.encode(document)
    return Response(body, media_type="application/json", headers={"request-id": request_id_of(request)})


OPERATORS = Router(
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
