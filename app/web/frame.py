"""What the API and the receiver share as HTTP services: problem documents for whatever goes wrong, a Request-Id on
every answer, HEAD wherever there is GET.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import psycopg
from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException

from app.web.asgi import Receive, Scope, Send, new_request_id
from app.web.batching import Unavailable
from app.web.problems import Problem, overloaded, problem_from_database_error

log = logging.getLogger("surety.http")

AsgiApplication = Callable[[Scope, Receive, Send], Any]


def with_head(app: Litestar, shortcuts: Mapping[tuple[str, str], str] | None = None) -> AsgiApplication:
    """The application, answering HEAD as GET; the server leaves out the body.

    `shortcuts` name, by method and path, what in the application's state answers without Litestar's routing, whose
    8 µs are a tenth of what a payment costs this process. The routes exist all the same: they are described there, and
    other spellings of a path end there.
    """
    shortcuts = shortcuts or {}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if (name := shortcuts.get((scope["method"], scope["path"]))) is not None:
                try:
                    await app.state[name](scope, receive, send)
                except Exception as error:  # noqa: BLE001  as Litestar would; problem_from_error logs what is new to it
                    request_id = new_request_id()
                    await problem_from_error(error, request_id, scope["path"]).response(request_id)(
                        scope, receive, send
                    )
                return
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}
        await app(cast(Any, scope), receive, send)

    return answer


def request_id_of(request: Request[Any, Any, Any]) -> str:
    """The request's id, the same each time it is asked for."""
    request_id: str = request.scope["state"].setdefault("request_id", new_request_id())
    return request_id


async def set_request_id(response: Response[Any]) -> Response[Any]:
    """Give an answer its Request-Id, unless it has one. A coroutine, for what is none would be sent to a thread."""
    response.headers.setdefault("request-id", new_request_id())
    return response


def problem_response(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Whatever a route raises, as a problem document."""
    answer = problem_from_error(error, request_id_of(request), request.url.path).response(request_id_of(request))
    headers = {name.decode(): value.decode() for name, value in answer.headers} | {"request-id": answer.request_id}
    return Response(answer.body, status_code=answer.status, headers=headers, media_type=headers["content-type"])


def problem_from_error(error: Exception, request_id: str, path: str) -> Problem:
    """Which problem an error is; what nobody foresaw is logged."""
    match error:
        case Problem():
            return error
        case Unavailable():
            return overloaded()
        case psycopg.Error():
            log.error("%s failed: %s", request_id, error)
            return problem_from_database_error(error)
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("allow", "").replace("GET", "GET, HEAD")
            return Problem("method-not-allowed", f"here are only {allowed}", headers=[(b"allow", allowed.encode())])
        case HTTPException(status_code=404):
            return Problem("not-found", f"nothing is at {path[:200]}")
        case HTTPException(status_code=status) if status < 500:
            return Problem("invalid-request", error.detail, errors=[])
    log.error("%s failed", request_id, exc_info=error)
    return Problem("internal", "an error of ours; nothing took effect")
