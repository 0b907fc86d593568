"""The operators' decisions about discrepancies.

GET  /v1/operator/discrepancies[/{id}]
POST /v1/operator/discrepancies/{id}/assign | snooze | resolve
POST /v1/operator/discrepancies/resolve                         all open ones that match, if their number is as expected
"""

from __future__ import annotations

from typing import Any, LiteralString

import msgspec
from psycopg.types.json import Jsonb

from app.api.ids import DISCREPANCY_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.discrepancies import (
    Assignment,
    BulkResolution,
    DiscrepanciesQuery,
    DiscrepancyOutcome,
    DiscrepancyOutcomeList,
    ResolutionRequest,
    Snooze,
)
from app.web.asgi import HttpResponse
from app.web.auth import Caller
from app.web.problems import Problem, RuleViolation, invalid_request

BODY_BYTES_MAX = 16 * 1024
FILTERS = ("kind", "severity", "merchant", "payment", "assignee", "opened_before", "max_delta")


async def list_discrepancies(request: ApiRequest) -> HttpResponse:
    """List discrepancies, the oldest first."""
    operator = request.caller()
    asked = await request.operator_query(operator, DiscrepanciesQuery)
    query = "select body from api.list_discrepancies(%s, %s, %s, %s, %s)"
    chosen = filter_of_request(asked, asked.status)
    return request.respond(await operator.fetch_as_operator(query, chosen, asked.limit, asked.starting_after))


async def get_discrepancy(request: ApiRequest) -> HttpResponse:
    """Read a discrepancy: the differing fields with both values, the ids of both records, how it was closed."""
    query = "select body from api.get_discrepancy(%s, %s, %s)"
    return request.respond(await request.caller().fetch_as_operator(query, id_or_empty(request, DISCREPANCY_ID)))


async def assign_discrepancy(request: ApiRequest) -> HttpResponse:
    """Assign a discrepancy to an active operator, or to none. 409 if it is closed."""
    operator = request.caller()
    given = await request.operator_body(operator, Assignment, BODY_BYTES_MAX)
    query: LiteralString = "select outcome, detail from api.assign_discrepancy(%s, %s, %s, %s, %s, %s)"
    return await change_discrepancy(request, operator, query, given.assignee, given.note)


async def snooze_discrepancy(request: ApiRequest) -> HttpResponse:
    """Keep a discrepancy out of the status report until a time. Other values end the snooze. 409 if it is closed."""
    operator = request.caller()
    given = await request.operator_body(operator, Snooze, BODY_BYTES_MAX)
    query: LiteralString = "select outcome, detail from api.snooze_discrepancy(%s, %s, %s, %s, %s, %s)"
    return await change_discrepancy(request, operator, query, given.until, given.note)


async def resolve_discrepancy(request: ApiRequest) -> HttpResponse:
    """Close a discrepancy with a reason. One that is closed keeps its first reason."""
    operator = request.caller()
    given = await request.operator_body(operator, ResolutionRequest, BODY_BYTES_MAX)
    query: LiteralString = "select outcome, detail from api.resolve_discrepancy(%s, %s, %s, %s, %s, %s, %s)"
    return await change_discrepancy(request, operator, query, given.resolution, given.reason, given.dry_run)


async def resolve_discrepancies(request: ApiRequest) -> HttpResponse:
    """Close all open discrepancies that match, in one transaction. 409, and none is closed, if more or fewer match."""
    operator = request.caller()
    given = await request.operator_body(operator, BulkResolution, BODY_BYTES_MAX)
    if all(getattr(given, name) is None for name in FILTERS):
        detail = "a filter is required, such as kind: a request can't act on all discrepancies"
        raise invalid_request([RuleViolation("/kind", "required", detail)])
    [outcomes] = await operator.row_as_operator(
        "select outcomes from api.resolve_discrepancies(%s, %s, %s, %s, %s, %s, %s, %s)",
        filter_of_request(given, "open"),
        given.expect,
        given.resolution,
        given.reason,
        given.dry_run,
        operator.request_id,
    )
    match outcomes:
        case [{"outcome": "refused", "detail": detail}]:
            raise Problem("wrong-state", detail)
    data = [DiscrepancyOutcome(**done) for done in outcomes]
    return request.respond(msgspec.json.encode(DiscrepancyOutcomeList("list", data, has_more=False)))


async def change_discrepancy(request: ApiRequest, operator: Caller, query: LiteralString, *values: Any) -> HttpResponse:
    """Change one discrepancy. Raises Problem."""
    discrepancy_id = id_or_empty(request, DISCREPANCY_ID)
    outcome, detail = await operator.row_as_operator(query, discrepancy_id, *values, operator.request_id)
    match outcome:
        case "not_found":
            raise Problem("not-found", f"there is no discrepancy {request.path_parameter()[:100]}")
        case "refused":
            raise Problem("wrong-state", f"{discrepancy_id}: {detail}")
    return request.respond(msgspec.json.encode(DiscrepancyOutcome(discrepancy_id, outcome, detail)))


def filter_of_request(asked: DiscrepanciesQuery | BulkResolution, status: str) -> Jsonb:
    """The filter as surety.find_discrepancies takes it."""
    chosen = {name: getattr(asked, name) for name in FILTERS if getattr(asked, name) is not None}
    return Jsonb(msgspec.to_builtins(chosen | {"statuses": [status]}))
