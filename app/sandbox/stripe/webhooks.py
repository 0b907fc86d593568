"""Delivering events: signed POSTs over kept-alive connections, retried until they are answered with 2xx."""

import asyncio
import hmac
import time
from typing import cast
from urllib.parse import urlsplit

import httptools

from app.sandbox.memory import ScheduledAction
from app.sandbox.state import Sandbox
from app.sandbox.stripe.variants import changed_event

RETRY_SECONDS_MAX = 16.0


def signature(payload: bytes, secret: str, timestamp: int) -> str:
    """The `Stripe-Signature` header: HMAC-SHA256 over timestamp and raw body."""
    digest = hmac.digest(secret.encode(), b"%d.%s" % (timestamp, payload), "sha256")
    return f"t={timestamp},v1={digest.hex()}"


class WebhookSender:
    """Delivers scheduled webhooks over several connections."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._queue: asyncio.Queue[ScheduledAction] = asyncio.Queue()
        self._delivered: dict[str, asyncio.Future[None]] = {}
        self._latest: dict[str, int] = {}
        """By payment, the newest delivered event; an older one delivered later was overtaken."""

    def post(self, action: ScheduledAction) -> None:
        """Take a delivery that is due."""
        self._queue.put_nowait(action)

    async def delivery(self, event_ids: list[str]) -> None:
        """Wait until each of these committed events was answered with 2xx once."""
        for event_id in event_ids:
            self._delivered[event_id] = asyncio.get_running_loop().create_future()
        await asyncio.gather(*(self._delivered[event_id] for event_id in event_ids))

    async def run(self) -> None:
        """Deliver; never returns."""
        async with asyncio.TaskGroup() as connections:
            for _ in range(self.sandbox.settings.webhook_connections):
                connections.create_task(self._deliver_all())

    async def _deliver_all(self) -> None:
        url = self.sandbox.settings.webhook_url
        connection = ReceiverConnection(url, self.sandbox.settings.webhook_timeout_seconds) if url else None
        while True:
            action = await self._queue.get()
            if connection is not None:
                await self._deliver(connection, action)

    async def _deliver(self, connection: "ReceiverConnection", action: ScheduledAction) -> None:
        sandbox, settings = self.sandbox, self.sandbox.settings
        seq, subject, payload = sandbox.memory.event(action.subject)
        payload = changed_event(action.what, payload, sandbox.faults)
        forged = action.what == "deliver_forged"
        secret = settings.webhook_secret + "?" * forged
        try:
            status = await connection.post(payload, signature(payload, secret, int(time.time())))
        except (OSError, httptools.HttpParserError):
            connection.close()
            status = 0
        sandbox.memory.finish(action)
        sandbox.memory.tally("webhooks:deliveries")
        if 200 <= status < 300:
            sandbox.memory.tally("webhooks:delivered")
            latest = self._latest.get(subject, 0)
            if seq < latest:
                sandbox.memory.tally("webhooks:overtaken")
            self._latest[subject] = max(seq, latest)
            answered = self._delivered.pop(action.subject, None)
            if answered is not None and not answered.done():
                answered.set_result(None)
        elif action.attempt >= settings.webhook_attempts_max:
            sandbox.memory.tally("webhooks:given_up")
        else:
            sandbox.memory.tally("webhooks:refused")
            delay = min(settings.webhook_retry_seconds * 2 ** (action.attempt - 1), RETRY_SECONDS_MAX)
            what = "deliver" if forged else action.what
            sandbox.schedule(0.1 if forged else delay, what, action.subject, action.attempt + 1)
        sandbox.commit_soon()


class ReceiverConnection:
    """One HTTP/1.1 connection to the receiver, opened when needed and kept while it lasts."""

    def __init__(self, url: str, timeout_seconds: float = 10.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"webhooks go to http://host:port/path, not to {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._head = (
            f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: Stripe/1.0\r\nAccept: */*\r\n"
            "Content-Type: application/json; charset=utf-8\r\n"
        )
        self._timeout_seconds = timeout_seconds
        self._exchange: Exchange | None = None

    async def post(self, payload: bytes, signature: str) -> int:
        """Send it and return the answer's status. Raises OSError or httptools.HttpParserError."""
        head = f"{self._head}Stripe-Signature: {signature}\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        kept = self._exchange
        if kept is not None and kept.is_open:
            try:
                return await kept.send(head + payload, self._timeout_seconds)
            except ConnectionError:
                # The receiver may close an idle connection at any time; the request is sent again.
                kept.close()
        async with asyncio.timeout(self._timeout_seconds):
            _, opened = await asyncio.get_running_loop().create_connection(Exchange, self._host, self._port)
        self._exchange = opened
        return await opened.send(head + payload, self._timeout_seconds)

    def close(self) -> None:
        """Hang up; the next request opens another."""
        if self._exchange is not None:
            self._exchange.close()


class Exchange(asyncio.Protocol):
    """A request, its answer, and the next request on the same connection."""

    def __init__(self) -> None:
        self.is_open = False
        self._loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] | None = None

    def send(self, request: bytes, timeout_seconds: float) -> asyncio.Future[int]:
        """The status of the answer, once it is complete; else OSError or httptools.HttpParserError."""
        self._parser = httptools.HttpResponseParser(self)
        self._status = self._loop.create_future()
        self._timer = self._loop.call_later(timeout_seconds, self._fail, TimeoutError("no complete answer in time"))
        self._transport.write(request)
        return self._status

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Parse a part of the answer."""
        if self._status is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)

    def on_message_complete(self) -> None:
        """The answer is complete."""
        if not self._parser.should_keep_alive():
            self.close()
        if self._status is not None and not self._status.done():
            self._status.set_result(self._parser.get_status_code())
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The receiver hung up, or this side closed the connection."""
        self.is_open = False
        self._fail(exc if isinstance(exc, OSError) else ConnectionResetError("closed before the answer was complete"))

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        self._transport.close()

    def _fail(self, error: Exception) -> None:
        if self._status is not None:
            if not self._status.done():
                self._status.set_exception(error)
            self._end()

    def _end(self) -> None:
        self._status = None
        self._timer.cancel()
