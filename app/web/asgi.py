"""Responses as bytes, request ids, and ASGI's types."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from app.connection_responses import WholeResponse

Message = Mapping[str, Any]
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


def new_request_id() -> str:
    """`req_`, 11 hex digits of milliseconds, 13 random ones: unique, but no secret."""
    return f"req_{int(time.time() * 1000):011x}{random.getrandbits(52):013x}"


class HttpResponse:
    """A whole response; itself an ASGI application. Every one carries the Request-Id."""

    __slots__ = ("body", "headers", "request_id", "status")

    def __init__(self, status: int, body: bytes, request_id: str, headers: Headers) -> None:
        self.status = status
        self.body = body
        self.request_id = request_id
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            *self.headers,
            (b"content-length", b"%d" % len(self.body)),
            (b"request-id", self.request_id.encode()),
        ]
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, WholeResponse) and cycle.respond(self.status, headers, self.body):
            return
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class ClientDisconnected(Exception):
    """The client left, or was too slow, before its request was complete."""
