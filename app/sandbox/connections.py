"""The socket's side: reading a request, sending an answer, and the ways a connection can go wrong."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, cast

from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.sandbox.memory import encode

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class SandboxResponse(Struct):
    """What is sent back."""

    status: int
    body: bytes
    headers: Headers = []
    took_effect: bool = False
    """Whether this very request changed something; a replay did not."""


def json_response(told: object) -> SandboxResponse:
    """200 with the told as JSON."""
    return SandboxResponse(200, encode(told), [])


class ProtocolWithTransport(HttpToolsProtocol):
    """Hands the connection to the application, so that it can break it: ASGI has no message for that."""

    def on_message_begin(self) -> None:
        """Begin a request's scope."""
        super().on_message_begin()
        cast("Message", self.scope)["extensions"] = {"sandbox.transport": self.transport}


class ClientConnection:
    """One request's connection."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self._transport: asyncio.Transport = scope["extensions"]["sandbox.transport"]
        self._receive = receive
        self._send = send

    async def read(self) -> str:
        """The request's whole body."""
        body = bytearray()
        while True:
            message = await self._receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                return body.decode(errors="replace")

    async def send(self, answer: SandboxResponse) -> None:
        """Answer, as JSON unless the answer says otherwise."""
        await self._start(answer)
        await self._send({"type": "http.response.body", "body": answer.body})

    async def send_chunks(self, chunks: Iterable[bytes]) -> None:
        """Answer 200 with JSON that is made while it is sent."""
        headers = [(b"content-type", b"application/json")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def hang(self, seconds: float) -> None:
        """Say nothing until the client leaves or the time is over, then cut the connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._client_left()
        await self._cut()

    async def reset_midway(self, answer: SandboxResponse) -> None:
        """Send the head and half of the body, then reset the connection."""
        await self._start(answer)
        half = answer.body[: len(answer.body) // 2]
        await self._send({"type": "http.response.body", "body": half, "more_body": True})
        # What is still in the transport's buffer when it is aborted would not be sent at all.
        await asyncio.sleep(0.02)
        await self._cut()

    async def _start(self, answer: SandboxResponse) -> None:
        headers = [*answer.headers, (b"content-length", b"%d" % len(answer.body))]
        if headers[0][0] != b"content-type":
            headers.append((b"content-type", b"application/json"))
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def _client_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _cut(self) -> None:
        held = self._transport.get_extra_info("socket")
        if held is not None and not self._transport.is_closing():
            # Lingering for zero seconds closes with a reset.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
        await self._client_left()
