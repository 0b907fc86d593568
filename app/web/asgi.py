"""Answers as bytes, and the reading of bodies within bounds: the two ends of every route."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

Message = Mapping[str, Any]
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

DISCARDED_BYTES_MAX = 1 << 20
BODY_SECONDS_MAX = 10.0


def new_request_id() -> str:
    """`req_`, 12 hex digits of milliseconds, 20 random ones: unique, but no secret."""
    return f"req_{int(time.time() * 1000):012x}{random.getrandbits(80):020x}"


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
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class BodyTooLarge(Exception):
    """The body is larger than allowed; what came of it was thrown away."""


class ClientDisconnected(Exception):
    """The client left, or was too slow, before its request was complete."""


async def read_body(receive: Receive, bytes_max: int) -> bytes:
    """The request's body. Raises BodyTooLarge, and ClientDisconnected when there is nobody left to answer."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body") and message["type"] == "http.request":
        if len(body) > bytes_max:
            raise BodyTooLarge
        return body
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            return await read_chunked_body(message, receive, bytes_max)
    except TimeoutError:
        raise ClientDisconnected from None


async def read_chunked_body(message: Message, receive: Receive, bytes_max: int) -> bytes:
    """The rest of a body that comes in parts. One that is too large is read a little further, so that the client is
    ready to hear it.
    """
    parts = bytearray()
    received = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        part = message.get("body", b"")
        received += len(part)
        if received <= bytes_max:
            parts += part
        if not message.get("more_body") or received > bytes_max + DISCARDED_BYTES_MAX:
            break
        message = await receive()
    if received > bytes_max:
        raise BodyTooLarge
    return bytes(parts)
