"""Payments read: GET /v1/payments, GET /v1/payments/{payment_id}, GET /v1/payments/{payment_id}/trace."""

from __future__ import annotations

import msgspec

from app.api.expansion import payment_with_lists
from app.api.held_answers import respond_when_decided
from app.api.ids import PAYMENT_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.expanded import PaymentQuery
from app.api.schemas.payments import PaymentsQuery
from app.api.waiting import AwaitedObject
from app.web.asgi import HttpResponse


async def get_payment(request: ApiRequest) -> HttpResponse:
    """Read a payment. `Prefer: wait=N` waits while its status is `pending`."""
    caller = request.caller()
    asked = await request.merchant_query(caller, PaymentQuery)
    payment_id = id_or_empty(request, PAYMENT_ID)
    query = "select body from api.get_payment(%s, %s, %s)"
    answer = await respond_when_decided(request, AwaitedObject("payments", payment_id), query)
    return await payment_with_lists(caller, answer, payment_id, asked.expand)


async def get_trace(request: ApiRequest) -> HttpResponse:
    """Read a payment's history: requests, steps, calls to the provider, webhooks, transfers."""
    caller = request.caller()
    query = "select body from api.get_trace(%s, %s, %s)"
    return request.respond(await caller.fetch(query, id_or_empty(request, PAYMENT_ID)))


async def list_payments(request: ApiRequest) -> HttpResponse:
    """List payments, newest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, PaymentsQuery)
    document = await caller.fetch(
        "select body from api.list_payments(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        asked.state,
        asked.status,
        asked.reference,
        asked.created_from,
        asked.created_before,
        asked.limit,
        asked.starting_after,
        msgspec.json.encode(labels_of(asked)).decode(),
    )
    return request.respond(document)


def labels_of(asked: PaymentsQuery) -> dict[str, str]:
    """The labels that payments must have, by name, as surety.labels_of_payment names them."""
    labels = {f"metadata.{key}": value for key, value in asked.metadata.items()}
    if asked.customer_email is not None:
        labels["customer.email"] = asked.customer_email.lower()
    if asked.customer_id is not None:
        labels["customer.id"] = asked.customer_id
    return labels
