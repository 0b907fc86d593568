"""Responses on a connection with limits (app/bounded_http.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle


class WholeResponse(RequestResponseCycle):
    """A response that the application may give as a whole: head and body are then one write."""

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write the response, unless it needs what only `send` does. `headers` holds Content-Length."""
        if self.response_started or self.disconnected or self.flow.write_paused or self.scope["method"] == "HEAD":
            return False
        lines = b"".join([name + b": " + value + b"\r\n" for name, value in (*self.default_headers, *headers)])
        if lines.count(b"\n") != len(self.default_headers) + len(headers) or b"connection: " in lines:
            return False
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self.response_started = self.response_complete = True
        self.transport.write(b"".join((STATUS_LINE[status], lines, end, body)))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True


class UnaskedResponse(RequestResponseCycle):
    """The response to `Expect: 100-continue`. If the body was not asked for, the connection can't be used again."""

    async def send(self, message: ASGISendEvent) -> None:
        """Send a part of the response."""
        if self.waiting_for_100_continue:
            self.keep_alive = False
        await super().send(message)


class ShedResponse:
    """Stands for the response of a request that was shed: uvicorn drops the body of a request with a response."""

    response_complete = True
    disconnected = False
    message_event = asyncio.Event()
