"""Delivering events: signed POSTs over kept-alive connections, retried until they are answered with 2xx."""

import asyncio
import hmac
import time
from contextlib import suppress
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
        connection = ReceiverConnection(url) if url else None
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
            async with asyncio.timeout(settings.webhook_timeout_seconds):
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

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"webhooks go to http://host:port/path, not to {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._head = (
            f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: Stripe/1.0\r\nAccept: */*\r\n"
            "Content-Type: application/json; charset=utf-8\r\n"
        )
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, payload: bytes, signature: str) -> int:
        """Send it and return the answer's status."""
        request = f"{self._head}Stripe-Signature: {signature}\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        kept_alive = self._writer is not None
        try:
            return await self._exchange(request + payload)
        except ConnectionError:
            self.close()
            if not kept_alive:
                raise
            # The receiver may close an idle connection at any time; the request is sent again.
            return await self._exchange(request + payload)

    async def _exchange(self, request: bytes) -> int:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(request)
        answer = DeliveryResponse()
        while not answer.complete:
            data = await self._reader.read(65536)
            if not data:
                raise ConnectionResetError("the receiver hung up before it answered")
            answer.parser.feed_data(data)
        if not answer.keeps_alive:
            self.close()
        return answer.parser.get_status_code()

    def close(self) -> None:
        """Hang up; the next request opens another."""
        if self._writer is not None:
            with suppress(OSError, RuntimeError):
                self._writer.close()
        self._reader = self._writer = None


class DeliveryResponse:
    """The status of an answer, whether it is complete, and whether the connection stays open."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.complete = False
        self.keeps_alive = False

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.complete = True
        self.keeps_alive = self.parser.should_keep_alive()
