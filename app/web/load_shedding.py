"""Refusing costs next to nothing: what would only be told to come again later is told so before its request is decoded.

A refusal by way of the application costs a tenth of a millisecond; ten times what a process serves would keep it busy
with refusing. Here it is written as soon as the request has been read, and no task is started for it. A client that
comes again at once all the same, though it was told when to, is not read for a while: else those who don't wait would
take the time in which others are served.
"""

from __future__ import annotations

from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.web.asgi import new_request_id
from app.web.problems import overloaded

IsOverloaded = Callable[[], bool]

# Well within what Retry-After asks for.
READ_PAUSE_SECONDS = 0.25

OVERLOAD_CHECKS: dict[tuple[bytes, bytes], IsOverloaded] = {}
"""By method and path, what says whether a request would be refused now. An application adds its own, and removes it."""


def overload_response(request_id: str) -> bytes:
    """503 with Retry-After, head and body."""
    answer = overloaded().response(request_id)
    headers = [*answer.headers, (b"content-length", b"%d" % len(answer.body)), (b"request-id", request_id.encode())]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + lines + b"\r\n" + answer.body


PLACEHOLDER_ID = new_request_id()
RESPONSE_START, RESPONSE_MIDDLE, RESPONSE_END = overload_response(PLACEHOLDER_ID).split(PLACEHOLDER_ID.encode())
HEAD_END, BODY_BEGIN = RESPONSE_MIDDLE.split(b"\r\n\r\n")


class LoadSheddingProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with gates before it. Whatever is out of the ordinary goes the ordinary way."""

    _is_refused = False

    def on_headers_complete(self) -> None:
        """The head is there: refuse it, or let it in."""
        parser = self.parser
        assert parser is not None
        is_overloaded = OVERLOAD_CHECKS.get((parser.get_method(), self.url))
        self._is_refused = (
            is_overloaded is not None
            and (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.expect_100_continue
            and not parser.should_upgrade()
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and is_overloaded()
        )
        if not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """What is refused is not kept."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there: who refuses answers now."""
        if not self._is_refused:
            super().on_message_complete()
            return
        self._is_refused = False
        if self.flow.write_paused:
            self.transport.close()  # it sends on and on and reads nothing
            return
        request_id = new_request_id().encode()
        date = b"".join(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers)
        self.transport.write(
            b"".join(
                (RESPONSE_START, request_id, HEAD_END, b"\r\n", date, b"\r\n", BODY_BEGIN, request_id, RESPONSE_END)
            )
        )
        self.on_response_complete()
        self.flow.pause_reading()
        self.loop.call_later(READ_PAUSE_SECONDS, self._resume_reading)

    def _resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()
