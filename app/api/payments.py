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
from app.web.problems import Problem, RuleViolation, invalid_request


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
    try:
        labels = labels_of(asked)
    except Problem:
        await caller.require_valid_key()
        raise
    document = await caller.fetch(
        "select body from api.list_payments(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        asked.state,
        asked.status,
        asked.reference,
        asked.created_from,
        asked.created_before,
        asked.limit,
        asked.starting_after,
        msgspec.json.encode(labels).decode(),
    )
    return request.respond(document)


def labels_of(asked: PaymentsQuery) -> dict[str, str]:
    """The labels that payments must have, by name, as surety.labels_of_payment names them.

    Raises Problem if a key of metadata is given twice.
    """
    labels = {f"metadata.{key}": value for key, value in asked.metadata.items()}
    for text in asked.metadata_is:
        key, _, value = text.partition("=")
        if labels.setdefault(f"metadata.{key}", value) != value:
            broken = RuleViolation("metadata_is", "once", "metadata_is must give each key once, with one text")
            broken.place = "query"
            raise invalid_request([broken])
    if asked.customer_email is not None:
        labels["customer.email"] = asked.customer_email
    if asked.customer_id is not None:
        labels["customer.id"] = asked.customer_id
    return labels
