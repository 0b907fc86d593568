"""A sandbox process, a receiver for its webhooks, and `eventually`, which polls a condition."""

import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
import msgspec

from tests.support.stripe_description import check_answer, check_request

Json = dict[str, Any]
T = TypeVar("T")

KEY = "sk_test_surety"
LIVE_KEY = "sk_live_sandbox"
SECRET = "whsec_of_this_test"
VERSION = "2026-10-28.endive"
CARD_PAYMENT = {
    "amount": 4999,
    "currency": "usd",
    "automatic_payment_methods[enabled]": "true",
    "automatic_payment_methods[allow_redirects]": "never",
}
"""Parameters of a payment of 49.99 USD by card, without redirects to other methods' pages."""
SHORT_DELAYS = (
    "--transaction-seconds=0.05",
    "--available-seconds=0.1",
    "--payer-seconds=0.05",
    "--refund-seconds=0.05",
    "--dispute-seconds=0.05",
    "--decision-seconds=0.05",
    "--webhook-retry-seconds=0.05",
)


SLOWDOWN_FACTOR = 4
"""How many times as long as on an idle machine something may take on a busy one."""
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.005, 0.1


def eventually(check: Callable[[], T | None], within_seconds: float = 5.0) -> T:
    """The first true result of `check`. Fails after a time that is given for an idle machine.

    The pauses grow: most checks ask a process, and asked too often they would be most of the load.
    """
    deadline = time.monotonic() + SLOWDOWN_FACTOR * within_seconds
    pause = PAUSE_SECONDS_MIN
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {SLOWDOWN_FACTOR} times {within_seconds} s"
        time.sleep(pause)
        pause = min(1.5 * pause, PAUSE_SECONDS_MAX)
    return found


class SandboxProcess:
    """One sandbox process; every request and answer is validated against Stripe's description."""

    def __init__(self, folder: Path, *options: str, webhook_url: str | None = None) -> None:
        self.api_key = LIVE_KEY if "--live" in options else KEY
        self.options = [f"--memory={folder / 'sandbox.sqlite'}", *SHORT_DELAYS, *options]
        if webhook_url:
            self.options += [f"--webhook-url={webhook_url}", f"--webhook-secret={SECRET}"]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.sandbox", *self.options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        announced = self.process.stdout.readline()
        assert announced.startswith("listening on "), announced
        self.url = "http://" + announced.removeprefix("listening on ").strip()
        self.client = httpx.Client(base_url=self.url, timeout=10)

    def kill(self) -> None:
        """SIGKILL."""
        self.client.close()
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.client.close()
        self.process.terminate()
        return self._reap()

    def _reap(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(timeout=5)

    def send(
        self,
        method: str,
        path: str,
        form: Json | None = None,
        *,
        key: str | None = None,
        account: str | None = None,
        is_valid: bool = True,
        timeout: float = 10,
    ) -> httpx.Response:
        """A request to the sandbox's Stripe API. With `is_valid=False` it violates the description on purpose."""
        headers = {"Authorization": f"Bearer {self.api_key}", "Stripe-Version": VERSION}
        if method == "POST":
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        if key is not None:
            headers["Idempotency-Key"] = key
        if account is not None:
            headers["Stripe-Account"] = account
        encoded = urlencode(form or {})
        if method == "GET" and encoded:
            path, encoded = f"{path}?{encoded}", ""
        if is_valid:
            check_request(method, path, {"Idempotency-Key": "given by the SDK"} | headers, encoded)
        response = self.client.request(method, path, content=encoded, headers=headers, timeout=timeout)
        if is_valid or response.status_code != 404:
            check_answer(method, path, response.status_code, response.json())
        return response

    def post(self, path: str, form: Json | None = None, **more: Any) -> Json:
        """The answer to a POST that succeeds."""
        return self._accepted(self.send("POST", path, form, **more))

    def get(self, path: str, form: Json | None = None, **more: Any) -> Json:
        """The answer to a GET that succeeds."""
        return self._accepted(self.send("GET", path, form, **more))

    def refusal(self, method: str, path: str, form: Json | None = None, **more: Any) -> tuple[int, Json]:
        """Status and error of a request that is refused."""
        response = self.send(method, path, form, **more)
        assert response.status_code >= 400, response.text
        error: Json = response.json()["error"]
        return response.status_code, error

    def _accepted(self, response: httpx.Response) -> Json:
        assert response.status_code == 200, response.text
        body: Json = response.json()
        return body

    def create(
        self, card: str = "pm_card_visa", *, key: str | None = None, account: str | None = None, **more: Any
    ) -> str:
        """The id of a new, unconfirmed card payment of 49.99 USD."""
        form = {
            "amount": 4999,
            "currency": "usd",
            "payment_method": card,
            "automatic_payment_methods[enabled]": "true",
            "automatic_payment_methods[allow_redirects]": "never",
            **more,
        }
        intent: str = self.post("/v1/payment_intents", form, key=key, account=account)["id"]
        return intent

    def confirm(self, intent: str, form: Json | None = None, **more: Any) -> Json:
        return self.post(f"/v1/payment_intents/{intent}/confirm", form, **more)

    def pay(self, card: str = "pm_card_visa", **more: Any) -> Json:
        """A confirmed payment."""
        return self.confirm(self.create(card, **more))

    def answer_as_payer(self, intent: str, outcome: str) -> None:
        """Approve or decline on the page that the payer is sent to."""
        self.client.post(self.read(intent)["next_action"]["redirect_to_url"]["url"], data={"outcome": outcome})

    def answer_by_script(
        self, client_secret: str, outcome: str, *, key: str = "pk_test_page", account: str | None = None
    ) -> Json:
        """Act as Stripe.js on a page: read the intent by its client secret, answer its challenge; the intent after."""
        intent = client_secret.partition("_secret_")[0]
        path = f"/v1/payment_intents/{intent}?{urlencode({'client_secret': client_secret})}"
        headers = {"Authorization": f"Bearer {key}", **({"Stripe-Account": account} if account else {})}
        asked = self._accepted(self.client.get(path, headers=headers))
        self.client.post(asked["next_action"]["use_stripe_sdk"]["stripe_js"], data={"outcome": outcome})
        return self._accepted(self.client.get(path, headers=headers))

    def read(self, intent: str, **more: Any) -> Json:
        return self.get(f"/v1/payment_intents/{intent}", **more)

    def control(self, path: str, body: Json | None = None) -> Any:
        """The answer of `/sandbox/…`; a POST if there is a body."""
        response = (
            self.client.get(f"/sandbox/{path}") if body is None else self.client.post(f"/sandbox/{path}", json=body)
        )
        assert response.status_code == 200, response.text
        return response.json()

    def order(self, operation: str, fault: str, **more: Any) -> None:
        """Order a fault for the next call of an operation."""
        self.control("faults", {"next": [{"operation": operation, "fault": fault, **more}]})

    def event_types(self, intent: str) -> list[str]:
        """Types of the events of one payment and its charges, oldest first."""
        page = self.get("/v1/events", {"limit": 100})["data"]
        objects = [(event["type"], event["data"]["object"]) for event in reversed(page)]
        return [type for type, output in objects if intent in (output.get("id"), output.get("payment_intent"))]


class WebhookReceiver:
    """A web server that receives webhooks and answers with the queued statuses, then 200."""

    def __init__(self) -> None:
        self.received: list[tuple[str, Json]] = []
        """Signature and event of each delivery, in order."""
        self.raw: list[bytes] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.raw.append(body)
                receiver.received.append((self.headers["Stripe-Signature"], msgspec.json.decode(body)))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/webhooks/stripe"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def types(self, intent: str) -> list[str]:
        """Types of what was received about one payment, in order of arrival."""
        output = [(event["type"], event["data"]["object"]) for _, event in self.received]
        return [type for type, object in output if intent in (object.get("id"), object.get("payment_intent"))]


@contextmanager
def running_sandbox(folder: Path, *options: str, webhook_url: str | None = None) -> Generator[SandboxProcess]:
    """A running sandbox."""
    sandbox = SandboxProcess(folder, *options, webhook_url=webhook_url)
    try:
        yield sandbox
    finally:
        if sandbox.process.poll() is None:
            sandbox.stop()


@contextmanager
def running_receiver() -> Generator[WebhookReceiver]:
    """A running receiver."""
    receiver = WebhookReceiver()
    try:
        yield receiver
    finally:
        receiver.close()
