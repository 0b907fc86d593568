"""Customers: POST and GET /v1/customers, GET and POST /v1/customers/{customer_id}."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.ids import CUSTOMER_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.customers import CustomersQuery, CustomerUpdate, NewCustomer
from app.web.asgi import HttpResponse


async def create_customer(request: ApiRequest) -> HttpResponse:
    """Create a customer, for payments that name it by `customer_id`. The provider gets it with its first payment."""
    return await execute_command(
        request,
        NewCustomer,
        "select status, problem, detail, body, is_replayed from api.create_customer(%s)",
        subject="merchant",
        subject_id="customers",
        location="/v1/customers/",
        needs_worker=False,
    )


async def update_customer(request: ApiRequest) -> HttpResponse:
    """Change a customer: the given fields only. A null removes a field, or a key of the metadata."""
    return await execute_command(
        request,
        CustomerUpdate,
        "select status, problem, detail, body, is_replayed from api.update_customer(%s)",
        subject="customer_id",
        subject_id=id_or_empty(request, CUSTOMER_ID),
    )


async def get_customer(request: ApiRequest) -> HttpResponse:
    """Read a customer."""
    caller = request.caller()
    query = "select body from api.get_customer(%s, %s, %s)"
    return request.respond(await caller.fetch(query, id_or_empty(request, CUSTOMER_ID)))


async def list_customers(request: ApiRequest) -> HttpResponse:
    """List customers, newest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, CustomersQuery)
    query = "select body from api.list_customers(%s, %s, %s, %s, %s)"
    return request.respond(await caller.fetch(query, asked.email, asked.limit, asked.starting_after))
