"""HTTP/1.1 over kept connections to one server: requests in, answers out, each request sent at most once.

A connection carries one request at a time, and an answer belongs to the request before it. So a connection is closed as
soon as anything else happens on it:

    a request is canceled                   its answer would arrive before that of the next request
    an answer is unreadable, or too large   where it ends is unknown
    bytes arrive that no request asked for  they would be taken for the next request's answer
    the server ends the connection          an answer that is incomplete by then is none
"""

from __future__ import annotations

import asyncio
import select
import ssl
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools
from msgspec import Struct

from jobs.stripe.egress_proxy import EgressProxy, ProxyRefusal

CONNECTIONS_KEPT_MAX = 32
IDLE_SECONDS_MAX = 30.0
# For name, TCP and TLS together: shorter than a probe.
CONNECT_SECONDS_MAX = 4.0
ADDRESS_SECONDS = 0.25
RESPONSE_BYTES_MAX = 16 * 1024 * 1024


class OutgoingRequest(Struct, frozen=True):
    """A request to the server; `target` is a path with its query."""

    method: str
    target: str
    headers: Mapping[str, str]
    content: bytes = b""


class RawResponse(Struct, frozen=True):
    """A complete answer; its headers by lower-case names."""

    status: int
    headers: dict[str, str]
    content: bytes


class NoAnswer(Exception):
    """There is no complete and readable answer. The server may have executed the request."""


class RequestSender(Protocol):
    """Sends requests to one server."""

    async def send(self, request: OutgoingRequest) -> RawResponse:
        """Send it once. Raises NoAnswer."""


class KeptConnection(asyncio.Protocol):
    """One connection. The parser calls the methods `on_…`."""

    response_bytes_max = RESPONSE_BYTES_MAX

    def __init__(self) -> None:
        self.is_usable = True
        """Whether it may carry another request."""
        self.idle_since = 0.0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer: asyncio.Future[RawResponse] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._received = 0
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def has_input(self) -> bool:
        """Whether anything has arrived that the event loop has not read yet: if idle, mostly the server's end of it."""
        return bool(self._poll.poll(0))

    async def exchange(self, request: bytes) -> RawResponse:
        """Send a request and return its answer. Raises NoAnswer."""
        if self.lost.done():
            raise NoAnswer("the connection ended")
        self._answer = asyncio.get_running_loop().create_future()
        self._received = 0
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close it at once."""
        self.is_usable = False
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._answer is None:
            self.close()
        elif self._received > self.response_bytes_max:
            self._fail(f"an answer of more than {self.response_bytes_max} bytes")
            self.close()
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                self._fail(f"an unreadable answer: {type(error).__name__}")
                self.close()

    def on_message_begin(self) -> None:
        if self._answer is None:
            self.is_usable = False
        self._headers, self._parts = {}, []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        # After an interim answer (1xx) follows the answer itself.
        if self._answer is None or status < 200:
            return
        self.is_usable &= self._parser.should_keep_alive()
        if not self._answer.done():
            self._answer.set_result(RawResponse(status, self._headers, b"".join(self._parts)))
        self._answer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_usable = False
        self._fail(f"the connection ended: {type(exc).__name__}" if exc else "the connection ended")
        self.lost.set_result(None)

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(NoAnswer(reason))
        self._answer = None


class ConnectionPool:
    """Connections to one server, as many as requests are under way; some are kept for the next requests.

    It has no maximum, and so no queue: its callers bound the requests. It belongs to the event loop that uses it first.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext,
        connect_seconds: float = CONNECT_SECONDS_MAX,
        proxy: EgressProxy | None = None,
    ) -> None:
        address = urlsplit(url)
        self._host, self._netloc = address.hostname or "", address.netloc
        self._port = address.port or {"https": 443, "http": 80}[address.scheme]
        self._tls = tls if address.scheme == "https" else None
        self._connect_seconds = connect_seconds
        self._proxy = proxy
        self._idle: deque[KeptConnection] = deque()
        self._open: set[KeptConnection] = set()

    async def send(self, request: OutgoingRequest) -> RawResponse:
        """Send a request once, and return its answer. Raises NoAnswer; ValueError for a request that is not valid."""
        encoded = encode_request(request, self._netloc)
        connection = self._take_idle() or await self._connect()
        try:
            response = await connection.exchange(encoded)
        except BaseException:
            connection.close()
            raise
        self._keep(connection)
        return response

    async def close(self) -> None:
        """Close all connections. Requests under way raise NoAnswer."""
        for connection in self._open:
            connection.close()
        while self._open:
            await asyncio.wait([connection.lost for connection in self._open])

    def _take_idle(self) -> KeptConnection | None:
        """The connection that was idle for the shortest time, if it is usable."""
        oldest = time.monotonic() - IDLE_SECONDS_MAX
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable and connection.idle_since > oldest and not connection.has_input():
                return connection
            connection.close()
        return None

    def _keep(self, connection: KeptConnection) -> None:
        now = time.monotonic()
        while self._idle and self._idle[0].idle_since < now - IDLE_SECONDS_MAX:
            self._idle.popleft().close()
        if connection.is_usable and len(self._idle) < CONNECTIONS_KEPT_MAX:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self) -> KeptConnection:
        try:
            async with asyncio.timeout(self._connect_seconds):
                connection = await self._open_connection()
        except TimeoutError:
            raise NoAnswer(f"no connection within {self._connect_seconds:g} s") from None
        except ProxyRefusal as error:
            raise NoAnswer(f"no connection: {error}") from None
        except OSError as error:
            raise NoAnswer(f"no connection: {type(error).__name__}") from error
        self._open.add(connection)
        connection.lost.add_done_callback(lambda _: self._open.discard(connection))
        return connection

    async def _open_connection(self) -> KeptConnection:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        if self._proxy is None or self._tls is None:
            _, connection = await loop.create_connection(
                KeptConnection, self._host, self._port, ssl=self._tls, happy_eyeballs_delay=ADDRESS_SECONDS
            )
            return connection
        tunnel = await self._proxy.open_tunnel(self._host, self._port)
        connection = KeptConnection()
        try:
            transport = await loop.start_tls(tunnel, connection, self._tls, server_hostname=self._host)
        except BaseException:
            tunnel.abort()
            raise
        if transport is None:
            raise ConnectionResetError("the connection ended")
        connection.connection_made(transport)
        return connection


def encode_request(request: OutgoingRequest, host: str) -> bytes:
    """The request's bytes. Raises ValueError if a part of it would be read as another part."""
    lines = [f"{request.method} {request.target} HTTP/1.1", f"Host: {host}", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if request.content or request.method == "POST":
        lines.append(f"Content-Length: {len(request.content)}")
    head = "\r\n".join((*lines, "", ""))
    if " " in request.target or not head.count("\r") == head.count("\n") == len(lines) + 1:
        raise ValueError("a request's target or header contains a space or a line break")
    return head.encode("ascii") + request.content
