"""Saved payment methods: GET /v1/customers/{customer_id}/payment_methods, DELETE …/payment_methods/{method_id}."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.ids import CUSTOMER_ID, METHOD_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.customers import MethodRemoval, PaymentMethodsQuery
from app.web.asgi import HttpResponse


async def list_payment_methods(request: ApiRequest) -> HttpResponse:
    """List a customer's saved payment methods, newest first, without those that were removed."""
    caller = request.caller()
    asked = await request.merchant_query(caller, PaymentMethodsQuery)
    query = "select body from api.list_payment_methods(%s, %s, %s, %s, %s)"
    customer_id = id_or_empty(request, CUSTOMER_ID, "customer_id")
    return request.respond(await caller.fetch(query, customer_id, asked.limit, asked.starting_after))


async def detach_payment_method(request: ApiRequest) -> HttpResponse:
    """Remove a saved payment method. No payment can name it any more, and a worker detaches it at the provider."""
    customer_id = id_or_empty(request, CUSTOMER_ID, "customer_id")
    method_id = id_or_empty(request, METHOD_ID, "payment_method_id")
    return await execute_command(
        request,
        MethodRemoval,
        "select status, problem, detail, body, is_replayed from api.detach_payment_method(%s)",
        subject="payment_method_id",
        subject_id=f"{customer_id}/{method_id}" if customer_id and method_id else "",
    )
