"""The operators' decisions about payments on hold.

GET  /v1/operator/holds[/{payment_id}]
POST /v1/operator/holds/{payment_id}/release | refuse
"""

from __future__ import annotations

from typing import Literal

import msgspec

from app.api.ids import PAYMENT_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.holds import HoldDecision, HoldDecisionResult, HoldsQuery
from app.web.asgi import HttpResponse
from app.web.problems import Problem

BODY_BYTES_MAX = 16 * 1024


async def list_holds(request: ApiRequest) -> HttpResponse:
    """List payments on hold, the oldest first."""
    operator = request.caller()
    asked = await request.operator_query(operator, HoldsQuery)
    query = "select body from api.list_holds(%s, %s, %s, %s, %s, %s)"
    page = await operator.fetch_as_operator(query, asked.status, asked.merchant, asked.limit, asked.starting_after)
    return request.respond(page)


async def get_hold(request: ApiRequest) -> HttpResponse:
    """Read the hold of a payment."""
    query = "select body from api.get_hold(%s, %s, %s)"
    return request.respond(await request.caller().fetch_as_operator(query, id_or_empty(request, PAYMENT_ID)))


async def release_hold(request: ApiRequest) -> HttpResponse:
    """Release a payment on hold: it is sent to the provider, once. 409 if the hold has ended otherwise."""
    return await decide_hold(request, "released")


async def refuse_hold(request: ApiRequest) -> HttpResponse:
    """Refuse a payment on hold: it ends as failed, and nothing is charged. 409 if the hold has ended otherwise."""
    return await decide_hold(request, "refused")


async def decide_hold(request: ApiRequest, decision: Literal["released", "refused"]) -> HttpResponse:
    """Release or refuse one payment. Raises Problem."""
    operator = request.caller()
    given = await request.operator_body(operator, HoldDecision, BODY_BYTES_MAX)
    payment_id = id_or_empty(request, PAYMENT_ID)
    query = "select outcome, detail from api.decide_hold(%s, %s, %s, %s, %s, %s)"
    outcome, detail = await operator.row_as_operator(query, payment_id, decision, given.reason, operator.request_id)
    match outcome:
        case "not_found":
            raise Problem("not-found", f"no payment on hold has the id {request.path_parameter()[:100]}")
        case "ended":
            raise Problem("wrong-state", f"{payment_id}: {detail}")
    return request.respond(msgspec.json.encode(HoldDecisionResult(payment_id, outcome, detail)))
