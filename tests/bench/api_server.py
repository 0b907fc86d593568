"""The API as `accept` measures it, and two routes that do nothing, to compare with.

`python -m tests.bench.api_server PORT CONNECTIONS BATCH_MAX` serves the product's application with

    POST /noop  an ordinary route of the framework: it reads the body and answers
    POST /bare  HTTP read and written before the framework begins: the least that an answer costs this server
"""

from __future__ import annotations

import os
import sys
from typing import Any, cast

from litestar import Litestar, Request, Response, post

from app.api.application import create_app
from app.web.asgi import HttpResponse, Receive, Scope, Send, new_request_id
from app.web.routing import AsgiApplication
from app.web.serving import serve

SHAPE = "BENCH_CONNECTIONS_AND_BATCH"


@post("/noop")
async def noop(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Read the body and answer."""
    await request.body()
    return Response(b"{}", media_type="application/json", headers={"request-id": new_request_id()})


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body and answer."""
    assert (await receive())["type"] == "http.request"
    await HttpResponse(201, b"{}", new_request_id(), [(b"content-type", b"application/json")])(scope, receive, send)


def benchmark_app() -> AsgiApplication:
    """The product's application, its batching connections as the environment says, beside /noop and /bare."""
    connections, batch_max = os.environ[SHAPE].split()
    product = create_app(connections=int(connections), batch_max=int(batch_max))
    framework = cast(AsgiApplication, Litestar([noop], openapi_config=None, logging_config=None))

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"], scope.get("path"):
            case "http", "/noop":
                await framework(scope, receive, send)
            case "http", "/bare":
                await bare(scope, receive, send)
            case _:
                await product(scope, receive, send)

    return answer


if __name__ == "__main__":
    os.environ[SHAPE] = f"{sys.argv[2]} {sys.argv[3]}"
    serve("tests.bench.api_server:benchmark_app", name="api", host="127.0.0.1", port=int(sys.argv[1]))
