"""Limits of an HTTP connection, checked before a request costs anything: bytes, fields, seconds, connections.

uvicorn with httptools reads heads of any length for any time. This protocol refuses what exceeds the limits, with a
document of the application's kind, and closes the connection so that the client can still read the refusal.

    opened or idle      closed in silence after head_seconds without a first byte, or after the server's keep-alive time
    head                431, 414 or 400 as soon as a limit is exceeded; 408 after head_seconds
    body                413 above body_bytes; 408 after body_seconds
    response            reset if the client does not read it for write_seconds
    closing             what still arrives is discarded, up to discarded_bytes and close_seconds
    held                a request that waits for an event, as its client wishes: no limit of seconds, and not counted
                        among the connections; it ends at once when the client leaves or the server stops
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.connection_limits import WATCHES, ConnectionLimits, ConnectionWatch, Refusal, RefusalResponse
from app.connection_responses import ShedResponse, UnaskedResponse, WholeResponse

# A second field of such a name leaves open which of the values is meant.
SINGLE_VALUED = frozenset(
    {
        b"authorization", b"content-encoding", b"content-length", b"content-type", b"expect", b"host",
        b"idempotency-key", b"stripe-account", b"stripe-signature", b"stripe-version", b"transfer-encoding",
    }
)  # fmt: skip
HEAD_END = b"\r\n\r\n"


class ClosingTransport(asyncio.Transport):
    """The transport as a request's response uses it: closing leaves the client time to read the response."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.is_closing = protocol.transport.is_closing  # type: ignore[method-assign]
        self.write = protocol.transport.write  # type: ignore[method-assign]

    def close(self) -> None:
        """Close it after the response."""
        self.protocol.close_connection()


class BoundedProtocol(HttpToolsProtocol, ABC):
    """uvicorn's protocol within limits. A subclass renders refusals and may refuse requests by their heads.

    Nothing is done per header: heads are searched and counted as bytes, before they are parsed.
    """

    limits = ConnectionLimits()

    # Slots, because an instance of 30 and more attributes in its dictionary is slow (CPython's shared keys).
    __slots__ = (
        "_completed",
        "_head_end_max",
        "_is_answered",
        "_is_body_due",
        "_is_closed",
        "_is_discarding",
        "_is_in_head",
        "_is_shed",
        "_is_stopping",
        "_last_bytes",
        "_last_scope",
        "_on_end",
        "_received",
        "_response_transport",
        "_watch",
        "_write_deadline",
        "deadline",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.deadline = self._write_deadline = math.inf
        self._is_in_head = True
        self._is_body_due = False
        self._is_shed = False  # whether `is_shed` refused the current request; its body is dropped
        self._is_answered = False  # whether the response was complete before the body
        self._is_discarding = self._is_closed = False
        self._head_end_max = self.limits.head_bytes + len(HEAD_END)
        self._received = 0  # bytes of the current head or body, or discarded ones
        self._last_bytes = b""  # of an incomplete head
        self._last_scope: object = None  # of the last whole request
        self._completed = 0  # requests that have arrived whole
        self._is_stopping = False
        self._on_end: Callable[[bool], None] | None = None  # of a held request

    @abstractmethod
    def refusal_response(self, refusal: Refusal) -> RefusalResponse:
        """A refusal as the application's clients know it."""

    def is_shed(self) -> bool:
        """Whether the request whose head is complete gets `write_shed_response` instead of the application."""
        return False

    def write_shed_response(self) -> None:
        """Answer a request that `is_shed` refused."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection if there is room."""
        super().connection_made(transport)
        watch = WATCHES.get(self.server_state)
        if watch is None:
            watch = WATCHES[self.server_state] = ConnectionWatch(self.server_state, self.loop, self.limits)
        self._watch = watch
        self._response_transport = ClosingTransport(self)
        self.deadline = self.loop.time() + self.limits.head_seconds
        if not watch.make_room(self):
            watch.refusals["connections"] += 1
            self._is_discarding = True
            if watch.counted > 2 * self.limits.connections:
                transport.abort()
                return
            self._write_refusal(Refusal(503, "overloaded", "this process has no connection to spare"))
            self.close_connection()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a held request: its client has left."""
        super().connection_lost(exc)
        if self._on_end is not None:
            self._on_end(True)

    def shutdown(self) -> None:
        """The server stops: end a held request."""
        self._is_stopping = True
        super().shutdown()
        if self._on_end is not None:
            self._on_end(False)

    def hold(self, on_end: Callable[[bool], None]) -> bool:
        """Hold the current request until `release`; False if the server stops or the client has left.

        `on_end` is called when the client leaves (True) or the server stops (False), possibly both.
        """
        if self._is_stopping or self._on_end is not None or self.transport.is_closing():
            return False
        self._on_end = on_end
        self._watch.held += 1
        return True

    def release(self) -> None:
        """The held request is being answered."""
        self._on_end = None
        self._watch.held -= 1

    @property
    def is_idle(self) -> bool:
        """Whether no request is arriving in its body or being answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self._is_body_due and not self._is_closed

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, within the limits."""
        completed = self._completed
        # The usual case: a whole request on a connection that waits for one.
        is_whole_head = self._is_in_head and not self._received and data.find(HEAD_END, 0, self._head_end_max) > 0
        if not (is_whole_head or self._is_within_limits(data)):
            return
        parser = self.parser
        assert parser is not None
        try:
            parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError) as error:
            if not self._is_parsed_after(error, data):
                return
        if self.scope is not self._last_scope or self._completed == completed:
            self._note_incomplete(data, is_first=self._completed != completed)

    def _note_incomplete(self, data: bytes, *, is_first: bool) -> None:
        """A head or body is incomplete: keep since when, and its size."""
        if self._is_body_due:
            if self.deadline == math.inf:
                self.deadline = self.loop.time() + self.limits.body_seconds
            return
        if is_first or not self._received:
            self.deadline = self.loop.time() + self.limits.head_seconds
        if not is_first:
            self._received += len(data)
            self._last_bytes = (self._last_bytes + data[-3:])[-3:]
            if self._received > self.limits.head_bytes:
                self.refuse(self._head_too_large(data))

    def _is_within_limits(self, data: bytes) -> bool:
        """Whether more of a head or body may be parsed; else the request is refused."""
        if self._is_discarding:
            self._received += len(data)
            if self._received > self.limits.discarded_bytes:
                self.transport.abort()
            else:
                # Reading as fast as the client sends would take time from others.
                self.flow.pause_reading()
                self.loop.call_later(self.limits.discard_pause_seconds, self._resume_reading)
            return False
        try:
            if self._is_in_head:
                self._check_head(data)
            else:
                self._check_body(data)
        except Refusal as refusal:
            self.refuse(refusal)
            return False
        return True

    def _is_parsed_after(self, error: Exception, data: bytes) -> bool:
        """Whether the parser goes on. After an upgrade, which is ignored as a server may, it does."""
        parser = self.parser
        assert parser is not None
        while isinstance(error, httptools.HttpParserUpgrade):
            data = data[error.args[0] :]
            if not data:
                return True
            try:
                parser.feed_data(data)
            except (httptools.HttpParserUpgrade, httptools.HttpParserError) as another:
                error = another
            else:
                return True
        refusal = error.__context__
        if not isinstance(refusal, Refusal):
            refusal = Refusal(400, "malformed-request", f"this is not HTTP/1.1: {error}"[:200])
        self.refuse(refusal)
        return False

    def _resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _check_head(self, data: bytes) -> None:
        """Raises Refusal if a head has too many bytes or fields, before it is parsed."""
        limits = self.limits
        end = data.find(HEAD_END, 0, self._head_end_max)
        if end < 0 and self._received:
            end = (self._last_bytes + data[:4]).find(HEAD_END)
        size = self._received + (end if end >= 0 else len(data))
        if size > limits.head_bytes:
            raise self._head_too_large(data)

    def _head_too_large(self, data: bytes) -> Refusal:
        limits = self.limits
        if not self._received and b"\n" not in data[: limits.head_bytes]:
            return self._target_too_long()
        detail = f"request line and headers have more than {limits.head_bytes} bytes"
        return Refusal(431, "head-too-large", detail, limit=limits.head_bytes)

    def _target_too_long(self) -> Refusal:
        limit = self.limits.target_bytes
        return Refusal(414, "target-too-long", f"path and query have more than {limit} bytes", limit=limit)

    def _check_body(self, data: bytes) -> None:
        """Raises Refusal if a body has too many bytes, with its chunks' framing."""
        limits = self.limits
        self._received += len(data)
        if self.cycle.response_complete and not self._is_answered:
            self._is_answered = True
            self._received += limits.body_bytes - limits.unread_bytes
        if self._received > limits.body_bytes:
            detail = f"the body has more than {limits.body_bytes} bytes"
            raise Refusal(413, "too-large", detail, limit=limits.body_bytes)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value.strip(b" \t"))  # white space around a value is no part of it (RFC 9110)

    def on_headers_complete(self) -> None:
        """Check the whole head, then start the request or shed it."""
        headers, limits = self.headers, self.limits
        names = dict(headers)
        if len(names) != len(headers):
            self._require_single_values()
        if len(headers) > limits.head_fields:
            detail = f"the request has more than {limits.head_fields} headers"
            raise Refusal(431, "head-too-large", detail, limit=limits.head_fields)
        if len(self.url) > limits.target_bytes:
            raise self._target_too_long()
        self._require_path_and_version(has_host=b"host" in names)
        if len(self.pipeline) >= limits.pipelined:
            raise Refusal(400, "malformed-request", f"more than {limits.pipelined} requests wait for a response")
        self._is_in_head = False
        self._is_body_due = True
        self._received = 0
        self._last_bytes = b""
        self.deadline = math.inf
        if self.is_shed():
            self._is_shed = True
            self.cycle = cast(RequestResponseCycle, ShedResponse)
        else:
            super().on_headers_complete()
            self.cycle.transport = self._response_transport
            self.cycle.__class__ = UnaskedResponse if self.expect_100_continue else WholeResponse
        self.headers = []  # for trailers, which are ignored

    def _require_path_and_version(self, *, has_host: bool) -> None:
        """Raises Refusal unless the target is a path or a whole address with one, and the version known.

        RFC 9112 requires the refusal of a request of HTTP/1.1 without Host.
        """
        parser = self.parser
        assert parser is not None
        http_version = parser.get_http_version()
        if http_version not in {"1.1", "1.0"}:
            raise Refusal(400, "malformed-request", "only HTTP/1.1 and HTTP/1.0 are understood")
        if http_version == "1.1" and not has_host:
            raise Refusal(400, "malformed-request", "a request of HTTP/1.1 needs the header Host")
        if not self.url.startswith(b"/"):
            try:
                path = httptools.parse_url(self.url).path
            except httptools.HttpParserInvalidURLError:
                path = None
            if path is None:
                raise Refusal(400, "malformed-request", "the request's target is not a path")

    def _require_single_values(self) -> None:
        """Raises Refusal for a second value of a header that has one."""
        seen: set[bytes] = set()
        for name, _ in self.headers:
            if name in seen and name in SINGLE_VALUED:
                field = name.decode("latin-1").title()
                raise Refusal(400, "repeated-header", f"the header {field} is given twice", field=field)
            seen.add(name)

    def on_message_complete(self) -> None:
        """The request has arrived whole."""
        self._is_body_due = False
        self._is_in_head = True
        self._received = 0
        self._completed += 1
        self._is_answered = False
        self.deadline = math.inf
        self._last_scope = self.scope
        if self._is_shed:
            self._is_shed = False
            self.write_shed_response()
        else:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the next request, or wait for one until the server's keep-alive time is over."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.scope is self._last_scope and not self._received and not self._is_discarding:
            self.deadline = self.loop.time() + self.timeout_keep_alive

    def pause_writing(self) -> None:
        """The client does not read the response."""
        super().pause_writing()
        self._write_deadline = self.loop.time() + self.limits.write_seconds

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._write_deadline = math.inf

    def check_deadlines(self, now: float) -> None:
        """End what takes too long."""
        if now >= self._write_deadline or (self._is_closed and now >= self.deadline):
            self.transport.abort()
        elif now >= self.deadline:
            if self._is_body_due:
                self.refuse(self._too_slow("body", self.limits.body_seconds))
            elif self._received or self.scope is not self._last_scope:
                self.refuse(self._too_slow("head", self.limits.head_seconds))
            else:
                self.close_connection()

    @staticmethod
    def _too_slow(part: str, seconds: float) -> Refusal:
        return Refusal(408, "request-timeout", f"the request's {part} took more than {seconds:g} s")

    def refuse(self, refusal: Refusal) -> None:
        """Answer with the refusal if the client waits for an answer, and close the connection."""
        if self._is_closed or self.transport.is_closing():
            return
        self._watch.refusals[refusal.name] += 1
        self._is_discarding = True
        self._received = 0
        self.deadline = math.inf
        cycle = self.cycle
        is_own = self._is_body_due and not self._is_shed
        if cycle is not None and not cycle.response_complete:
            if not is_own:
                # Earlier requests are answered first.
                cycle.keep_alive = False
                return
            if cycle.response_started or any(cycle is queued for queued, _ in self.pipeline):
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        elif is_own:
            # Its response is complete: a second one would answer the next request.
            self.close_connection()
            return
        self._write_refusal(refusal)
        self.close_connection()

    def _write_refusal(self, refusal: Refusal) -> None:
        if self.flow.write_paused:
            self.transport.abort()
            return
        response = self.refusal_response(refusal)
        headers = [
            *self.server_state.default_headers,
            *response.headers,
            (b"content-length", b"%d" % len(response.body)),
            (b"connection", b"close"),
        ]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + response.body)

    def close_connection(self) -> None:
        """Close after all that was written. A client that still sends gets time to read the response first."""
        if self._is_closed or self.transport.is_closing():
            return
        self._is_closed = True
        self._unset_keepalive_if_required()
        self.deadline = self.loop.time() + self.limits.close_seconds
        if self._is_body_due or self._is_discarding:
            self._is_discarding = True
            self._received = 0
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()


def connection_of(receive: object) -> BoundedProtocol | None:
    """The connection of a request, by its ASGI `receive`; None if another server serves it."""
    cycle = getattr(receive, "__self__", None)
    transport = cycle.transport if isinstance(cycle, RequestResponseCycle) else None
    return transport.protocol if isinstance(transport, ClosingTransport) else None
