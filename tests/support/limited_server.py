"""A server with limits of the test's choice, and raw requests to it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import uvicorn

from app.connection_limits import ConnectionLimits
from app.web.asgi import HttpResponse, Receive, Scope
from app.web.load_shedding import LoadSheddingProtocol
from app.web.requests import HttpRequest
from app.web.routing import HttpApplication, Route
from db.embedded.processes import wait_until

BODY_BYTES_MAX = 1000
LARGE = 8 * 1024 * 1024
ANSWER_SECONDS = 30


async def echo(request: HttpRequest) -> HttpResponse:
    """The body."""
    return HttpResponse(200, await request.read_body(BODY_BYTES_MAX), request.request_id, [])


async def names(request: HttpRequest) -> HttpResponse:
    """The names of the headers, after the whole body."""
    await request.read_body(BODY_BYTES_MAX)
    return HttpResponse(200, b" ".join(name for name, _ in request.scope["headers"]), request.request_id, [])


async def refuse(request: HttpRequest) -> HttpResponse:
    """An answer without reading the body."""
    return HttpResponse(401, b"no", request.request_id, [])


async def split(request: HttpRequest) -> HttpResponse:
    """An answer whose header has a line break in its value."""
    return HttpResponse(200, b"", request.request_id, [(b"x-given", b"a\r\nx-injected: b")])


async def answer_shortly(request: HttpRequest) -> HttpResponse:
    """An answer of five bytes."""
    return HttpResponse(200, b"short", request.request_id, [])


async def close_after(request: HttpRequest) -> HttpResponse:
    """An answer that ends the connection."""
    return HttpResponse(200, b"last", request.request_id, [(b"connection", b"close")])


async def answer_much(request: HttpRequest) -> HttpResponse:
    """A large answer."""
    return HttpResponse(200, bytes(LARGE), request.request_id, [])


class Served:
    """A server in a thread of its own, with bounds of the test's choice."""

    def __init__(self, limits: ConnectionLimits, keep_alive: int) -> None:
        self.entered = threading.Semaphore(0)
        self.released = threading.Event()

        class Protocol(LoadSheddingProtocol):
            pass

        Protocol.limits = limits

        async def wait(request: HttpRequest) -> HttpResponse:
            self.entered.release()
            await asyncio.to_thread(self.released.wait, ANSWER_SECONDS)
            return HttpResponse(200, b"released", request.request_id, [])

        @asynccontextmanager
        async def no_services() -> AsyncGenerator[None]:
            yield

        routes = [
            Route("POST", "/echo", echo),
            Route("POST", "/names", names),
            Route("POST", "/refuse", refuse),
            Route("GET", "/much", answer_much),
            Route("GET", "/wait", wait),
            Route("GET", "/split", split, is_fast=True),
            Route("GET", "/short", answer_shortly, is_fast=True),
            Route("GET", "/last", close_after, is_fast=True),
            Route("GET", "/broken", refuse, is_fast=True),
            Route("GET", "/things/{thing}", refuse),
        ]

        def new_request(route: Route, services: Any, scope: Scope, receive: Receive) -> HttpRequest:
            if route.path == "/broken":
                raise RuntimeError("broken on purpose")
            return HttpRequest(route, services, scope, receive)

        config = uvicorn.Config(
            HttpApplication(routes, new_request, no_services),
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            server_header=False,
            timeout_keep_alive=keep_alive,
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self.listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]})

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_SECONDS)

    def answer(self, *parts: bytes) -> bytes:
        """Everything that a connection with these bytes gets until the server closes it."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            return read_to_end(connection)


@contextmanager
def serving(limits: ConnectionLimits, *, keep_alive: int = 75) -> Generator[Served]:
    served = Served(limits, keep_alive)
    served.thread.start()
    try:
        assert wait_until(lambda: served.server.started, ANSWER_SECONDS)
        yield served
    finally:
        served.released.set()
        served.server.should_exit = True
        served.thread.join()


def read_to_end(connection: socket.socket) -> bytes:
    said = b""
    while part := connection.recv(65536):
        said += part
    return said


def read_answer(connection: socket.socket) -> bytes:
    """One answer with a Content-Length."""
    said = b""
    while b"\r\n\r\n" not in said:
        part = connection.recv(65536)
        assert part, said
        said += part
    head, _, body = said.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length
    while len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def problem_of(answer: bytes, status: int, name: str) -> dict[str, Any]:
    """The only problem document that an answer holds; the server announces that it closes the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert answer.count(b"HTTP/1.1 4") + answer.count(b"HTTP/1.1 5") == 1
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    document: dict[str, Any] = msgspec.json.decode(body)
    assert document["type"] == f"/problems/{name}"
    assert document["status"] == status
    assert f"request-id: {document['request_id']}".encode() in head
    return document


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *headers, "", ""]).encode() + body
