"""Routes as rows of a table, and the application that serves them.

A row names the endpoint that answers. Litestar matches the path, except for rows marked `is_fast`, which a dictionary
matches first: a payment costs this process 18 µs by the dictionary and 53 µs by Litestar. Other spellings of a fast
path (a trailing slash) are matched by Litestar and reach the same endpoint.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

from litestar import HttpMethod, Litestar, Request, Response, Router, route
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import Struct

from app.web.asgi import ClientDisconnected, HttpResponse, Receive, Scope, Send, new_request_id
from app.web.problems import Problem, allowed_methods, overloaded, problem_from_error

Endpoint = Callable[[Any], Awaitable[HttpResponse]]
"""Answers a request, or raises Problem."""
AsgiApplication = Callable[[Scope, Receive, Send], Awaitable[None]]
# Litestar keeps the last 1,024 paths in each of two caches, so their length is bounded.
PATH_CHARACTERS_MAX = 512
PATH_PARAMETER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Route:
    """A method and a path, the endpoint that answers, and the types of its query, body and answers."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    endpoint: Endpoint
    answers: Mapping[int, Any] = field(default_factory=dict)
    """The type of the body by status, where the request succeeds."""
    problems: tuple[str, ...] = ()
    """Names of the problem types that it may answer."""
    query: type[Struct] | None = None
    body: type[Struct] | None = None
    is_public: bool = False
    """No API key is needed."""
    scope: str = ""
    """The scope that a key needs, which the route's SQL function requires."""
    tag: str | None = None
    takes_wait: bool = False
    """`Prefer: wait=N` holds the answer (app/api/held_answers.py)."""
    is_secret: bool = False
    """The answer must not be cached."""
    is_fast: bool = False
    """Matched before Litestar."""

    @cached_property
    def name(self) -> str:
        """The route as the audit trail and the scope of Idempotency-Keys name it."""
        return f"{self.method} {PATH_PARAMETER.sub('{id}', self.path)}"


class HttpApplication:
    """An ASGI application: a table of routes, and the services that its endpoints use.

    `open_services` is entered when the server starts; `new_request` makes what an endpoint gets from a route's row, the
    services, and ASGI's scope and receive. HEAD is answered as GET; the server leaves out the body.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        new_request: Callable[[Route, Any, Scope, Receive], Any],
        open_services: Callable[[], AbstractAsyncContextManager[Any]],
        assets: Sequence[Router] = (),
    ) -> None:
        self._new_request = new_request
        self._open_services = open_services
        self._services: Any = None
        self._fast_routes = {(row.method, row.path): row for row in routes if row.is_fast}
        methods: dict[str, set[str]] = {}
        for row in routes:
            methods.setdefault(row.path, set()).add(row.method)
        self._litestar = Litestar(
            [
                # First, because Litestar adds an OPTIONS of its own, which knows one of a path's methods.
                *(options_handler(path, allowed_methods(known)) for path, known in methods.items()),
                *(self._handler_of(row) for row in routes),
                *assets,
            ],
            lifespan=[self._lifespan],
            openapi_config=None,
            exception_handlers={Exception: problem_response},
            logging_config=None,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._respond(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            # Raises if a response has begun; then the server closes the connection.
            problem = problem_from_error(error, request_id := new_request_id(), scope["path"])
            await problem.response(request_id)(scope, receive, send)
        except asyncio.CancelledError:
            # The server ends, and this request took longer than it waits.
            if scope["type"] == "http":
                await overloaded().response(new_request_id())(scope, receive, send)
            raise

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._litestar(cast(Any, scope), receive, cast(Any, send))
            return
        row = self._fast_routes.get((scope["method"], scope["path"]))
        if row is not None:
            answer = await self._answer(row, scope, receive)
            await answer(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        if len(scope["path"]) > PATH_CHARACTERS_MAX:
            detail = f"no path has more than {PATH_CHARACTERS_MAX} characters"
            refusal = Problem("not-found", detail).response(new_request_id())
            await refusal(scope, receive, send)
            return
        await self._litestar(cast(Any, scope), receive, cast(Any, send))

    @asynccontextmanager
    async def _lifespan(self, _: Litestar) -> AsyncGenerator[None]:
        async with self._open_services() as services:
            self._services = services
            yield

    async def _answer(self, row: Route, scope: Scope, receive: Receive) -> AsgiApplication:
        request = self._new_request(row, self._services, scope, receive)
        response: HttpResponse
        try:
            if not row.is_public:
                await request.admit()
            response = await row.endpoint(request)
        except ClientDisconnected:
            return no_response
        except Exception as error:  # noqa: BLE001  problem_from_error logs unexpected errors
            response = problem_from_error(error, request.request_id, scope["path"]).response(request.request_id)
        return cast(AsgiApplication, request.complete(response))

    def _handler_of(self, row: Route) -> HTTPRouteHandler:
        async def handler(request: Request[Any, Any, Any]) -> ASGIApp:
            return cast(ASGIApp, await self._answer(row, request.scope, request.receive))

        # Litestar's own status is not used; that of DELETE would allow no body.
        return route(litestar_path(row.path), http_method=HttpMethod(row.method), name=row.name, status_code=200)(
            handler
        )


def litestar_path(path: str) -> str:
    """A path as Litestar spells it: {id:str} for {id}."""
    return PATH_PARAMETER.sub(r"{\1:str}", path)


def options_handler(path: str, allowed: str) -> HTTPRouteHandler:
    """Answers OPTIONS for a path."""

    async def handler() -> Response[None]:
        return Response(None, status_code=204, headers={"allow": allowed, "request-id": new_request_id()})

    return route(litestar_path(path), http_method=HttpMethod.OPTIONS)(handler)


async def no_response(scope: Scope, receive: Receive, send: Send) -> None:
    """The client is gone."""


def problem_response(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """A problem document for what Litestar raises: no such path, no such method."""
    answer = problem_from_error(error, request_id := new_request_id(), request.scope["path"]).response(request_id)
    headers = {name.decode(): value.decode() for name, value in answer.headers} | {"request-id": request_id}
    return Response(answer.body, status_code=answer.status, headers=headers, media_type=headers["content-type"])


async def complete_asset_response(response: Response[Any]) -> Response[Any]:
    """Give a static file's response its Request-Id, and one to OPTIONS all methods. Litestar's own lacks HEAD.

    A coroutine, because Litestar runs plain functions in a thread.
    """
    response.headers.setdefault("request-id", new_request_id())
    if "Allow" in response.headers:
        response.headers["Allow"] = allowed_methods(response.headers["Allow"].split(", "))
    return response
