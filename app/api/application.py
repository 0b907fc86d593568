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

from app.api.commands import Commands
from app.api.create_payment import BODY_BYTES_MAX, JSON, STATEMENT, Acceptance
from app.api.operators import OPERATORS
from app.api.payment_actions import AFTERWARDS, KICK
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
from app.web.asgi import Answer, new_request_id, read_body
from app.web.auth import Doorkeeper
from app.web.batching import Kicker, Lanes
from app.web.database import Database
from app.web.frame import Asgi, answer_error, name_request, request_id_of, with_head
from app.web.load_shedding import GATES
from app.web.openapi import OPENAPI, assets, parameters_of, refusals, tell_truly
from app.web.problems import TYPES, Problem
from app.web.requests import Key, caller_of, json, query_of, well_formed
from db.connect import connect_async
from db.settings import Settings, load


@route("/v1/payments", http_method=[HttpMethod.OPTIONS], include_in_schema=False)
async def allow_payments() -> Response[None]:
    """What is allowed here. Litestar's own answer knows one of the two routes on this path."""
    return Response(None, status_code=204, headers={"allow": "GET, HEAD, OPTIONS, POST"})


def at_the_lanes(app: ASGIApp) -> ASGIApp:
    """Answers in Litestar's stead, which would read the body by its own rules."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["litestar_app"].state.acceptance(scope, receive, send)

    return answer


@post(
    "/v1/payments",
    middleware=[at_the_lanes],
    responses=refusals(
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
async def create_payment(data: NewPayment, idempotency_key: Key) -> Payment:
    """Take a payment.

    201 means: stored for good, and on its way to the provider. The same key with the same body gets the first answer
    again, byte for byte, with `Idempotency-Replayed: true`.
    """
    raise AssertionError("at_the_lanes has answered")


@get(
    "/v1/payments/{payment_id:str}",
    responses=refusals("unauthenticated", "not-found", "overloaded"),
)
async def get_payment(request: Request[Any, Any, Any], payment_id: str) -> Response[Payment]:
    """Read a payment."""
    caller = caller_of(request, "GET /v1/payments/{id}")
    return json(request, await caller.fetch("select body from api.get_payment(%s, %s)", well_formed(payment_id)))


@get(
    "/v1/payments/{payment_id:str}/trace",
    responses=refusals("unauthenticated", "not-found", "overloaded"),
)
async def get_trace(request: Request[Any, Any, Any], payment_id: str) -> Response[Trace]:
    """Read all that happened to a payment: requests, steps, calls to the provider, webhooks, transfers."""
    caller = caller_of(request, "GET /v1/payments/{id}/trace")
    return json(request, await caller.fetch("select body from api.get_trace(%s, %s)", well_formed(payment_id)))


@get(
    "/v1/payments",
    operation_class=parameters_of(PaymentsQuery),
    responses=refusals("invalid-request", "unauthenticated", "overloaded"),
)
async def list_payments(request: Request[Any, Any, Any]) -> Response[PaymentList]:
    """List payments, newest first."""
    caller = caller_of(request, "GET /v1/payments")
    asked = await query_of(request, caller, PaymentsQuery)
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
    return json(request, document)


@get(
    "/v1/events",
    operation_class=parameters_of(EventsQuery),
    responses=refusals("invalid-request", "unauthenticated", "overloaded"),
)
async def list_events(request: Request[Any, Any, Any]) -> Response[EventList]:
    """List events, oldest first. A reader that always asks on with `next` misses none."""
    caller = caller_of(request, "GET /v1/events")
    asked = await query_of(request, caller, EventsQuery)
    return json(request, await caller.fetch("select body from api.list_events(%s, %s, %s)", asked.after, asked.limit))


@get("/problems", security=[{}])
async def list_problems() -> list[ProblemType]:
    """Explain all types of problems."""
    return [explained(name) for name in TYPES]


@get("/problems/{name:str}", security=[{}], responses=refusals("not-found"))
async def explain_problem(name: str) -> ProblemType:
    """Explain a type of problem."""
    if name not in TYPES:
        raise Problem("not-found", f"there is no problem of the type {name[:100]}")
    return explained(name)


@get("/health", security=[{}], responses=refusals("overloaded"))
async def get_health(request: Request[Any, Any, Any]) -> Health:
    """Tell whether this process can take payments."""
    await request.app.state.doorkeeper.database.row("select from api.identify('')")
    return Health("ok")


@post("/noop", include_in_schema=False)
async def noop(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Read the body and answer, as an ordinary route: what a request costs before anything is done for it."""
    await request.body()
    return Response(b"{}", media_type="application/json", headers={"request-id": request_id_of(request)})


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body and answer, without Litestar: the least that a request can cost this server."""
    await read_body(receive, BODY_BYTES_MAX)
    await Answer(201, b"{}", new_request_id(), [JSON])(scope, receive, send)


def explained(name: str) -> ProblemType:
    """A type of problem as its page tells it."""
    return ProblemType(f"/problems/{name}", TYPES[name].title, TYPES[name].status, TYPES[name].explanation)


def create_app(
    settings: Settings | None = None, *, lanes: int = 2, batch_max: int = 200, benchmark: bool = False
) -> Asgi:
    """The API as an ASGI application. `benchmark` adds POST /noop and /bare, which do nothing."""
    settings = settings or load()

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        tell_truly(app)
        database = Database("api", settings)
        line = Lanes(lambda: connect_async("api", settings), STATEMENT, lanes=lanes, batch_max=batch_max)
        # What can't be closed keeps nothing else open.
        async with AsyncExitStack() as closing:
            closing.push_async_callback(database.close)
            await database.open()
            kicker = Kicker(partial(database.row, "select outbox.kick('{submit}')"))
            commands_kicker = Kicker(partial(database.row, KICK))
            closing.push_async_callback(kicker.close)
            closing.push_async_callback(commands_kicker.close)
            closing.push_async_callback(line.close)
            await line.open()
            app.state.doorkeeper = Doorkeeper(database)
            app.state.acceptance = Acceptance(app.state.doorkeeper, line, kicker)
            app.state.bare = bare
            app.state.commands = Commands(app.state.doorkeeper, commands_kicker)
            GATES[b"POST", b"/v1/payments"] = line.is_full
            closing.callback(GATES.pop, (b"POST", b"/v1/payments"))
            yield

    return with_head(
        Litestar(
            [
                allow_payments,
                create_payment,
                list_payments,
                get_payment,
                get_trace,
                list_events,
                *AFTERWARDS,
                list_problems,
                explain_problem,
                get_health,
                OPERATORS,
                assets(),
                *([noop] if benchmark else []),
            ],
            lifespan=[lifespan],
            openapi_config=OPENAPI,
            exception_handlers={Exception: answer_error},
            after_request=name_request,
            logging_config=None,
        ),
        {("POST", "/v1/payments"): "acceptance"} | ({("POST", "/bare"): "bare"} if benchmark else {}),
    )
