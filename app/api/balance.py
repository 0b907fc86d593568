"""The merchant's balance: GET /v1/balance, GET /v1/balance/transactions. GET /v1/currencies."""

from __future__ import annotations

from app.api.requests import ApiRequest
from app.api.schemas.balance import BalanceTransactionsQuery
from app.web.asgi import HttpResponse


async def get_balance(request: ApiRequest) -> HttpResponse:
    """Read your balance, by currency."""
    return request.respond(await request.caller().fetch("select body from api.get_balance(%s, %s)"))


async def list_balance_transactions(request: ApiRequest) -> HttpResponse:
    """List the changes of your balance, newest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, BalanceTransactionsQuery)
    query = "select body from api.list_balance_transactions(%s, %s, %s, %s, %s)"
    return request.respond(await caller.fetch(query, asked.payment, asked.limit, asked.starting_after))


async def list_currencies(request: ApiRequest) -> HttpResponse:
    """List the currencies accepted, with their minor units and the bounds of an amount."""
    return request.respond(await request.caller().fetch("select body from api.list_currencies(%s, %s)"))
