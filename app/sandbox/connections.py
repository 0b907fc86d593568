"""HTTP connections: requests are read, answers sent, connections broken."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, cast

from msgspec import Struct

from app.bounded_http import BoundedProtocol
from app.connection_limits import Refusal, RefusalResponse
from app.sandbox.memory import encode

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class SandboxResponse(Struct):
    """An HTTP answer."""

    status: int
    body: bytes
    headers: Headers = []
    took_effect: bool = False
    """Whether this request changed something; a replayed answer did not."""


def json_response(document: object) -> SandboxResponse:
    """200 with a document as JSON."""
    return SandboxResponse(200, encode(document), [])


class IncompleteRequest(Exception):
    """The client left, or was too slow, before its request was complete."""


class ProtocolWithTransport(BoundedProtocol):
    """Passes the transport to the application, which breaks connections: ASGI has no message for that."""

    def refusal_response(self, refusal: Refusal) -> RefusalResponse:
        """A refusal as an error in the provider's shape."""
        error = {"error": {"message": refusal.detail, "type": "invalid_request_error"}}
        return RefusalResponse([(b"content-type", b"application/json")], encode(error))

    def on_message_begin(self) -> None:
        """Begin a request's scope."""
        super().on_message_begin()
        cast("Message", self.scope)["extensions"] = {"sandbox.transport": self.transport}


class ClientConnection:
    """The connection of one request."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self._transport: asyncio.Transport = scope["extensions"]["sandbox.transport"]
        self._receive = receive
        self._send = send

    async def read(self) -> str:
        """The whole body of the request. Raises IncompleteRequest."""
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise IncompleteRequest
            body += message.get("body", b"")
            if not message.get("more_body"):
                return body.decode(errors="replace")

    async def send(self, answer: SandboxResponse) -> None:
        """Send an answer, as JSON unless it names another content type."""
        await self._start(answer)
        await self._send({"type": "http.response.body", "body": answer.body})

    async def send_chunks(self, chunks: Iterable[bytes]) -> None:
        """Send 200 with JSON that is produced while it is sent."""
        headers = [(b"content-type", b"application/json")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def hang(self, seconds: float) -> None:
        """Send nothing until the client disconnects or the time is over, then reset the connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._client_left()
        await self._cut()

    async def reset_midway(self, answer: SandboxResponse) -> None:
        """Send the head and half of the body, then reset the connection."""
        await self._start(answer)
        half = answer.body[: len(answer.body) // 2]
        await self._send({"type": "http.response.body", "body": half, "more_body": True})
        # An aborted transport discards its buffer.
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
