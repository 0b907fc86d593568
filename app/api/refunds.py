"""Refunds: POST /v1/payments/{payment_id}/refunds, GET /v1/refunds, GET /v1/refunds/{refund_id}."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.expansion import part_with_payment
from app.api.held_answers import respond_when_decided
from app.api.ids import PAYMENT_ID, REFUND_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.expanded import PartQuery
from app.api.schemas.refunds import NewRefund, RefundsQuery
from app.api.waiting import AwaitedObject
from app.web.asgi import HttpResponse


async def create_refund(request: ApiRequest) -> HttpResponse:
    """Refund a captured payment: the amount that is left, or a part of it.

    201: the amount is reserved, so no other refund can use it, and a worker sends the refund to the provider.
    """
    return await execute_command(
        request,
        NewRefund,
        "select status, problem, detail, body, is_replayed from api.create_refund(%s)",
        subject="payment_id",
        subject_id=id_or_empty(request, PAYMENT_ID),
        awaits="refunds",
        location="/v1/refunds/",
    )


async def get_refund(request: ApiRequest) -> HttpResponse:
    """Read a refund. `Prefer: wait=N` waits while its status is `pending`."""
    caller = request.caller()
    asked = await request.merchant_query(caller, PartQuery)
    query = "select body from api.get_refund(%s, %s, %s)"
    awaited = AwaitedObject("refunds", id_or_empty(request, REFUND_ID))
    return await part_with_payment(caller, await respond_when_decided(request, awaited, query), asked.expand)


async def list_refunds(request: ApiRequest) -> HttpResponse:
    """List refunds, newest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, RefundsQuery)
    query = "select body from api.list_refunds(%s, %s, %s, %s, %s)"
    return request.respond(await caller.fetch(query, asked.payment, asked.limit, asked.starting_after))
