"""Disputes: GET /v1/disputes, GET /v1/disputes/{dispute_id}, POST /v1/disputes/{dispute_id}/evidence."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.expansion import part_with_payment
from app.api.ids import DISPUTE_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.disputes import DisputesQuery, SubmittedEvidence
from app.api.schemas.expanded import PartQuery
from app.web.asgi import HttpResponse


async def get_dispute(request: ApiRequest) -> HttpResponse:
    """Read a dispute."""
    caller = request.caller()
    asked = await request.merchant_query(caller, PartQuery)
    query = "select body from api.get_dispute(%s, %s, %s)"
    answer = request.respond(await caller.fetch(query, id_or_empty(request, DISPUTE_ID)))
    return await part_with_payment(caller, answer, asked.expand)


async def list_disputes(request: ApiRequest) -> HttpResponse:
    """List disputes and inquiries, newest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, DisputesQuery)
    query = "select body from api.list_disputes(%s, %s, %s, %s, %s)"
    return request.respond(await caller.fetch(query, asked.payment, asked.limit, asked.starting_after))


async def submit_evidence(request: ApiRequest) -> HttpResponse:
    """Add evidence against a dispute. `submit` sends it to the network, which can be done once."""
    return await execute_command(
        request,
        SubmittedEvidence,
        "select status, problem, detail, body, is_replayed from api.submit_evidence(%s)",
        subject="dispute_id",
        subject_id=id_or_empty(request, DISPUTE_ID),
    )
