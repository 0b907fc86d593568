"""A merchant's receiver of webhooks: an HTTP server of the test's own, whose answers the test decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
from standardwebhooks import Webhook

Answer = tuple[int, dict[str, str], bytes]


class ReceivedWebhook(msgspec.Struct):
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """The id by which a receiver knows repetitions."""
        return self.headers["webhook-id"]

    @property
    def document(self) -> dict[str, Any]:
        """The body."""
        found: dict[str, Any] = msgspec.json.decode(self.body)
        return found

    def verify(self, secret: str) -> None:
        """Verify the signature with the published library. Raises WebhookVerificationError."""
        Webhook(secret).verify(self.body, self.headers)


class WebhookReceiver:
    """Receives webhooks on loopback and remembers them. `answer` decides what each gets."""

    def __init__(self) -> None:
        self.received: list[ReceivedWebhook] = []
        self.answer: Callable[[ReceivedWebhook], Answer] = lambda _: (200, {}, b"ok")
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                given = {name.lower(): value for name, value in self.headers.items()}
                webhook = ReceivedWebhook(self.path, given, body)
                receiver.received.append(webhook)
                status, headers, content = receiver.answer(webhook)
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *values: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hooks"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def stop(self) -> None:
        """Receive no more: connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def ids(self) -> list[str]:
        """The ids that arrived, in order."""
        return [webhook.id for webhook in self.received]


@contextmanager
def running_receiver() -> Generator[WebhookReceiver]:
    """A receiver until the end of the block."""
    receiver = WebhookReceiver()
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()
