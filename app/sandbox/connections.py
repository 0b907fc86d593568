"""HTTP connections: requests are read, answers sent, connections broken.

A request is passed on once it has arrived whole. Most are answered at once, in one write and without a task.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, cast

from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

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


class ClientConnection:
    """The connection of one request that is answered by a task."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self._transport: asyncio.Transport = scope["extensions"]["sandbox.transport"]
        self._receive = receive
        self._send = send

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
        await self._send({"type": "http.response.start", "status": answer.status, "headers": all_headers(answer)})

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


AnswerByTask = Callable[[ClientConnection], Awaitable[None]]


class Application(Protocol):
    """Answers requests."""

    def begin(self, scope: Message, body: str) -> SandboxResponse | AnswerByTask:
        """The answer of a whole request, or a function that sends it."""


class SandboxProtocol(BoundedProtocol):
    """The bounded protocol, which passes on whole requests.

    A scope holds the transport, by which the application breaks connections: ASGI has no message for that.
    """

    __slots__ = ("_arriving",)

    _arriving: RequestResponseCycle | None

    def refusal_response(self, refusal: Refusal) -> RefusalResponse:
        """A refusal as an error in the provider's shape."""
        error = {"error": {"message": refusal.detail, "type": "invalid_request_error"}}
        return RefusalResponse([(b"content-type", b"application/json")], encode(error))

    def on_message_begin(self) -> None:
        """Begin a request's scope."""
        super().on_message_begin()
        self._arriving = None
        cast("Message", self.scope)["extensions"] = {"sandbox.transport": self.transport}

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body; its size has been checked."""
        super().on_body(body)
        if self._arriving is not None:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """The request has arrived whole."""
        super().on_message_complete()
        if self._arriving is not None:
            self._begin(self._arriving)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if not cycle.more_body:
            self._begin(cycle)
            return
        self._arriving = cycle
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _begin(self, cycle: RequestResponseCycle) -> None:
        answer = cast(Application, self.app).begin(cast(Message, cycle.scope), cycle.body.decode(errors="replace"))
        if not isinstance(answer, SandboxResponse):
            send = answer
        elif self.flow.write_paused or cycle.scope["method"] == "HEAD":
            send = partial(send_answer, answer)
        else:
            self._write(cycle, answer)
            return

        async def app(scope: Any, receive: Any, send_message: Any) -> None:
            await send(ClientConnection(scope, receive, send_message))

        super()._start_asgi_task(cycle, app)

    def _write(self, cycle: RequestResponseCycle, answer: SandboxResponse) -> None:
        lines = [STATUS_LINE[answer.status]]
        lines += [b"%b: %b\r\n" % header for header in all_headers(answer)]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (b"\r\n", answer.body)
        cycle.response_started = cycle.response_complete = True
        self.transport.write(b"".join(lines))
        if not cycle.keep_alive:
            self.close_connection()
        self.on_response_complete()


async def send_answer(answer: SandboxResponse, connection: ClientConnection) -> None:
    """Send an answer that needs no more work."""
    await connection.send(answer)


def all_headers(answer: SandboxResponse) -> Headers:
    """An answer's headers with its length, and as JSON unless they name another content type."""
    headers = [*answer.headers, (b"content-length", b"%d" % len(answer.body))]
    if headers[0][0] != b"content-type":
        headers.append((b"content-type", b"application/json"))
    return headers
