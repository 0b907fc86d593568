"""The merchant's balance: GET /v1/balance, GET /v1/balance/transactions, GET /v1/statements. GET /v1/currencies."""

from __future__ import annotations

from datetime import date

from app.api.requests import ApiRequest
from app.api.schemas.balance import BalanceTransactionsQuery, StatementQuery
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


async def get_statement(request: ApiRequest) -> HttpResponse:
    """Read your statement of a month: the balances at its beginning and end, and the lines between, oldest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, StatementQuery)
    query = "select body from api.get_statement(%s, %s, %s, %s, %s)"
    month = date.fromisoformat(f"{asked.month}-01")
    return request.respond(await caller.fetch(query, month, asked.limit, asked.starting_after))


async def list_currencies(request: ApiRequest) -> HttpResponse:
    """List the currencies accepted, with their minor units and the bounds of an amount."""
    return request.respond(await request.caller().fetch("select body from api.list_currencies(%s, %s)"))
