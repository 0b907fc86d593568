"""Routes to what comes after a payment was accepted: capture, cancel, refunds, disputes, the balance.

What is asked for goes through app/api/commands.py, which answers in these routes' stead; they document it.
"""

from __future__ import annotations

from typing import Any, LiteralString

from litestar import Request, Response, get, post
from litestar.openapi import ResponseSpec

from app.api.commands import CANCEL, CAPTURE, EVIDENCE, REFUND, answered_by
from app.api.schemas import (
    Balance,
    BalanceTransactionList,
    BalanceTransactionsQuery,
    Dispute,
    DisputeList,
    DisputesQuery,
    NewCancellation,
    NewCapture,
    NewRefund,
    Payment,
    Refund,
    RefundList,
    RefundsQuery,
    SubmittedEvidence,
)
from app.web.openapi import problem_responses, query_parameters_of
from app.web.requests import (
    DISPUTE_ID,
    REFUND_ID,
    IdempotencyKeyHeader,
    caller_of,
    checked_query_of,
    json_response,
    valid_id_or_empty,
)

SCHEDULE_COMMAND_WORKERS = "select outbox.schedule_handlers('{capture,cancel,refund,evidence}')"

COMMAND_PROBLEMS = (
    "invalid-request",
    "idempotency-key-missing",
    "unauthenticated",
    "forbidden",
    "not-found",
    "wrong-state",
    "too-large",
    "not-json",
    "idempotency-key-reused",
    "overloaded",
)


async def list_response(
    request: Request[Any, Any, Any],
    route: str,
    query_type: type[RefundsQuery | DisputesQuery | BalanceTransactionsQuery],
    query: LiteralString,
) -> Response[Any]:
    """A page of a list, of one payment's entries if that is asked for."""
    caller = caller_of(request, route)
    asked = await checked_query_of(request, caller, query_type)
    return json_response(request, await caller.fetch(query, asked.payment, asked.limit, asked.starting_after))


@post(
    "/v1/payments/{payment_id:str}/capture",
    status_code=202,
    middleware=[answered_by(CAPTURE)],
    responses=problem_responses(*COMMAND_PROBLEMS),
)
async def capture_payment(payment_id: str, data: NewCapture, idempotency_key: IdempotencyKeyHeader) -> Payment:
    """Capture what an authorized payment holds, or a part of it, once.

    202 means: stored for good, and on its way to the provider. The rest of what is held is let go.
    """
    raise AssertionError("app.api.commands has answered")


@post(
    "/v1/payments/{payment_id:str}/cancel",
    status_code=202,
    middleware=[answered_by(CANCEL)],
    responses=problem_responses(*COMMAND_PROBLEMS)
    | {200: ResponseSpec(Payment, generate_examples=False, description="It is canceled; nothing had been sent.")},
)
async def cancel_payment(payment_id: str, data: NewCancellation, idempotency_key: IdempotencyKeyHeader) -> Payment:
    """Cancel a payment that has not succeeded yet.

    200: it is canceled, nothing had been sent. 202: the provider is asked to call it off; the payment's state will tell
    whether it came in time.
    """
    raise AssertionError("app.api.commands has answered")


@post(
    "/v1/payments/{payment_id:str}/refunds",
    middleware=[answered_by(REFUND)],
    responses=problem_responses(*COMMAND_PROBLEMS, "balance-too-low"),
)
async def create_refund(payment_id: str, data: NewRefund, idempotency_key: IdempotencyKeyHeader) -> Refund:
    """Give back what was captured, all that is left of it or an amount.

    201 means: the amount is taken up, no other refund can have it, and the provider will be told.
    """
    raise AssertionError("app.api.commands has answered")


@get("/v1/refunds/{refund_id:str}", responses=problem_responses("unauthenticated", "not-found", "overloaded"))
async def get_refund(request: Request[Any, Any, Any], refund_id: str) -> Response[Refund]:
    """Read a refund."""
    caller = caller_of(request, "GET /v1/refunds/{id}")
    asked = valid_id_or_empty(refund_id, REFUND_ID)
    return json_response(request, await caller.fetch("select body from api.get_refund(%s, %s)", asked))


@get(
    "/v1/refunds",
    operation_class=query_parameters_of(RefundsQuery),
    responses=problem_responses("invalid-request", "unauthenticated", "overloaded"),
)
async def list_refunds(request: Request[Any, Any, Any]) -> Response[RefundList]:
    """List refunds, newest first."""
    query = "select body from api.list_refunds(%s, %s, %s, %s)"
    return await list_response(request, "GET /v1/refunds", RefundsQuery, query)


@get("/v1/disputes/{dispute_id:str}", responses=problem_responses("unauthenticated", "not-found", "overloaded"))
async def get_dispute(request: Request[Any, Any, Any], dispute_id: str) -> Response[Dispute]:
    """Read a dispute."""
    caller = caller_of(request, "GET /v1/disputes/{id}")
    asked = valid_id_or_empty(dispute_id, DISPUTE_ID)
    return json_response(request, await caller.fetch("select body from api.get_dispute(%s, %s)", asked))


@get(
    "/v1/disputes",
    operation_class=query_parameters_of(DisputesQuery),
    responses=problem_responses("invalid-request", "unauthenticated", "overloaded"),
)
async def list_disputes(request: Request[Any, Any, Any]) -> Response[DisputeList]:
    """List disputes and inquiries, newest first."""
    query = "select body from api.list_disputes(%s, %s, %s, %s)"
    return await list_response(request, "GET /v1/disputes", DisputesQuery, query)


@post(
    "/v1/disputes/{dispute_id:str}/evidence",
    status_code=202,
    middleware=[answered_by(EVIDENCE)],
    responses=problem_responses(*COMMAND_PROBLEMS),
)
async def submit_evidence(dispute_id: str, data: SubmittedEvidence, idempotency_key: IdempotencyKeyHeader) -> Dispute:
    """Say what speaks against a dispute. With `submit` it goes to the network, which can be done once."""
    raise AssertionError("app.api.commands has answered")


@get("/v1/balance", responses=problem_responses("unauthenticated", "overloaded"))
async def get_balance(request: Request[Any, Any, Any]) -> Response[Balance]:
    """Read what you are owed, by currency."""
    caller = caller_of(request, "GET /v1/balance")
    return json_response(request, await caller.fetch("select body from api.get_balance(%s)"))


@get(
    "/v1/balance/transactions",
    operation_class=query_parameters_of(BalanceTransactionsQuery),
    responses=problem_responses("invalid-request", "unauthenticated", "overloaded"),
)
async def list_balance_transactions(request: Request[Any, Any, Any]) -> Response[BalanceTransactionList]:
    """List what changed your balance, newest first."""
    query = "select body from api.list_balance_transactions(%s, %s, %s, %s)"
    return await list_response(request, "GET /v1/balance/transactions", BalanceTransactionsQuery, query)


PAYMENT_ACTION_ROUTES = [
    capture_payment,
    cancel_payment,
    create_refund,
    get_refund,
    list_refunds,
    get_dispute,
    list_disputes,
    submit_evidence,
    get_balance,
    list_balance_transactions,
]
