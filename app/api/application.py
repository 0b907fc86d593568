"""The HTTP API: every route decodes, calls one SQL function and encodes.

    POST /v1/payments                             app/api/create_payment.py, by the lanes: batches, one commit each
    GET  /v1/payments[/{id}[/trace]], /v1/events  a call each
    what comes after a payment was accepted       app/api/payment_actions.py
    /v1/operator/…                                app/api/operators.py, with operators' keys
    GET  /problems/{type}, /docs, /health         nothing but this process, and for health its database

The SQL functions take the SHA-256 of the API key and find the merchant themselves, so no route can name one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from litestar import HttpMethod, Litestar, Request, Response, get, post, route
from litestar.types import ASGIApp, Receive, Scope, Send

from app.api.commands import CommandEndpoint
from app.api.create_payment import BODY_BYTES_MAX, CREATE_PAYMENTS, JSON_CONTENT_TYPE, CreatePaymentEndpoint
from app.api.operators import OPERATOR_ROUTES
from app.api.payment_actions import PAYMENT_ACTION_ROUTES, SCHEDULE_COMMAND_WORKERS
from app.api.schemas import (
    EventList,
    EventsQuery,
    Health,
    NewPayment,
    Payment,
    PaymentList,
    PaymentsQuery,
    ProblemType,
    Trace,
)
from app.web.asgi import HttpResponse, new_request_id, read_body
from app.web.auth import Authenticator
from app.web.batching import BatchingConnections, WorkerScheduler
from app.web.database import DatabasePool
from app.web.frame import AsgiApplication, problem_response, request_id_of, set_request_id, with_head
from app.web.load_shedding import OVERLOAD_CHECKS
from app.web.openapi import (
    OPENAPI,
    complete_documentation,
    documentation_assets,
    problem_responses,
    query_parameters_of,
)
from app.web.problems import PROBLEM_TYPES, Problem
from app.web.requests import IdempotencyKeyHeader, caller_of, checked_query_of, json_response, valid_id_or_empty
from db.connect import connect_async
from db.settings import Settings, load_settings


@route("/v1/payments", http_method=[HttpMethod.OPTIONS], include_in_schema=False)
async def payments_options() -> Response[None]:
    """What is allowed here. Litestar's own answer knows one of the two routes on this path."""
    return Response(None, status_code=204, headers={"allow": "GET, HEAD, OPTIONS, POST"})


def answer_before_litestar(app: ASGIApp) -> ASGIApp:
    """Answers in Litestar's stead, which would read the body by its own rules."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["litestar_app"].state.create_payment(scope, receive, send)

    return answer


@post(
    "/v1/payments",
    middleware=[answer_before_litestar],
    responses=problem_responses(
        "invalid-request",
        "idempotency-key-missing",
        "unauthenticated",
        "forbidden",
        "reference-taken",
        "too-large",
        "not-json",
        "idempotency-key-reused",
        "overloaded",
    ),
)
async def create_payment(data: NewPayment, idempotency_key: IdempotencyKeyHeader) -> Payment:
    """Take a payment.

    201 means: stored for good, and on its way to the provider. The same key with the same body gets the first answer
    again, byte for byte, with `Idempotency-Replayed: true`.
    """
    raise AssertionError("answer_before_litestar has answered")


@get(
    "/v1/payments/{payment_id:str}",
    responses=problem_responses("unauthenticated", "not-found", "overloaded"),
)
async def get_payment(request: Request[Any, Any, Any], payment_id: str) -> Response[Payment]:
    """Read a payment."""
    caller = caller_of(request, "GET /v1/payments/{id}")
    return json_response(
        request, await caller.fetch("select body from api.get_payment(%s, %s)", valid_id_or_empty(payment_id))
    )


@get(
    "/v1/payments/{payment_id:str}/trace",
    responses=problem_responses("unauthenticated", "not-found", "overloaded"),
)
async def get_trace(request: Request[Any, Any, Any], payment_id: str) -> Response[Trace]:
    """Read all that happened to a payment: requests, steps, calls to the provider, webhooks, transfers."""
    caller = caller_of(request, "GET /v1/payments/{id}/trace")
    return json_response(
        request, await caller.fetch("select body from api.get_trace(%s, %s)", valid_id_or_empty(payment_id))
    )


@get(
    "/v1/payments",
    operation_class=query_parameters_of(PaymentsQuery),
    responses=problem_responses("invalid-request", "unauthenticated", "overloaded"),
)
async def list_payments(request: Request[Any, Any, Any]) -> Response[PaymentList]:
    """List payments, newest first."""
    caller = caller_of(request, "GET /v1/payments")
    asked = await checked_query_of(request, caller, PaymentsQuery)
    document = await caller.fetch(
        "select body from api.list_payments(%s, %s, %s, %s, %s, %s, %s, %s)",
        asked.state,
        asked.status,
        asked.reference,
        asked.created_from,
        asked.created_before,
        asked.limit,
        asked.starting_after,
    )
    return json_response(request, document)


@get(
    "/v1/events",
    operation_class=query_parameters_of(EventsQuery),
    responses=problem_responses("invalid-request", "unauthenticated", "overloaded"),
)
async def list_events(request: Request[Any, Any, Any]) -> Response[EventList]:
    """List events, oldest first. A reader that always asks on with `next` misses none."""
    caller = caller_of(request, "GET /v1/events")
    asked = await checked_query_of(request, caller, EventsQuery)
    return json_response(
        request, await caller.fetch("select body from api.list_events(%s, %s, %s)", asked.after, asked.limit)
    )


@get("/problems", security=[{}])
async def list_problems() -> list[ProblemType]:
    """Explain all types of problems."""
    return [problem_type_document(name) for name in PROBLEM_TYPES]


@get("/problems/{name:str}", security=[{}], responses=problem_responses("not-found"))
async def explain_problem(name: str) -> ProblemType:
    """Explain a type of problem."""
    if name not in PROBLEM_TYPES:
        raise Problem("not-found", f"there is no problem of the type {name[:100]}")
    return problem_type_document(name)


@get("/health", security=[{}], responses=problem_responses("overloaded"))
async def get_health(request: Request[Any, Any, Any]) -> Health:
    """Tell whether this process can take payments."""
    await request.app.state.authenticator.database.fetch_row("select from api.identify_merchant('')")
    return Health("ok")


@post("/noop", include_in_schema=False)
async def noop(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Read the body and answer, as an ordinary route: what a request costs before anything is done for it."""
    await request.body()
    return Response(b"{}", media_type="application/json", headers={"request-id": request_id_of(request)})


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body and answer, without Litestar: the least that a request can cost this server."""
    await read_body(receive, BODY_BYTES_MAX)
    await HttpResponse(201, b"{}", new_request_id(), [JSON_CONTENT_TYPE])(scope, receive, send)


def problem_type_document(name: str) -> ProblemType:
    """A type of problem as its page tells it."""
    return ProblemType(
        f"/problems/{name}", PROBLEM_TYPES[name].title, PROBLEM_TYPES[name].status, PROBLEM_TYPES[name].explanation
    )


def create_app(
    settings: Settings | None = None, *, connections: int = 2, batch_max: int = 200, benchmark: bool = False
) -> AsgiApplication:
    """The API as an ASGI application. `benchmark` adds POST /noop and /bare, which do nothing."""
    settings = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        complete_documentation(app)
        database = DatabasePool("api", settings)
        batching = BatchingConnections(
            lambda: connect_async("api", settings), CREATE_PAYMENTS, connections=connections, batch_max=batch_max
        )
        # What can't be closed keeps nothing else open.
        async with AsyncExitStack() as closing:
            closing.push_async_callback(database.close)
            await database.open()
            worker_scheduler = WorkerScheduler(
                partial(database.fetch_row, "select outbox.schedule_handlers('{submit}')")
            )
            command_scheduler = WorkerScheduler(partial(database.fetch_row, SCHEDULE_COMMAND_WORKERS))
            closing.push_async_callback(worker_scheduler.close)
            closing.push_async_callback(command_scheduler.close)
            closing.push_async_callback(batching.close)
            await batching.open()
            app.state.authenticator = Authenticator(database)
            app.state.create_payment = CreatePaymentEndpoint(app.state.authenticator, batching, worker_scheduler)
            app.state.bare = bare
            app.state.commands = CommandEndpoint(app.state.authenticator, command_scheduler)
            OVERLOAD_CHECKS[b"POST", b"/v1/payments"] = batching.is_full
            closing.callback(OVERLOAD_CHECKS.pop, (b"POST", b"/v1/payments"))
            yield

    return with_head(
        Litestar(
            [
                payments_options,
                create_payment,
                list_payments,
                get_payment,
                get_trace,
                list_events,
                *PAYMENT_ACTION_ROUTES,
                list_problems,
                explain_problem,
                get_health,
                OPERATOR_ROUTES,
                documentation_assets(),
                *([noop] if benchmark else []),
            ],
            lifespan=[lifespan],
            openapi_config=OPENAPI,
            exception_handlers={Exception: problem_response},
            after_request=set_request_id,
            logging_config=None,
        ),
        {("POST", "/v1/payments"): "create_payment"} | ({("POST", "/bare"): "bare"} if benchmark else {}),
    )
