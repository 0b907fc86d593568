"""The examples of the API's description: `python -m tests.support.api_examples` records them in app/api/examples.json.

Each is a request that a running API accepted, or its answer: `requests` by operation, `answers` by operation and
status, `problems` by type. Ids, times and cursors are replaced by others of their form; a list is cut to two elements.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import httpx
import msgspec
import psycopg

from app.api.openapi import operation_id
from app.api.routes import ROUTES
from app.web.routing import Route
from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.support.dead_letters import never_sent_letter
from tests.support.http_client import SECRETS, Merchant, running_server
from tests.support.operators import admin_key
from tests.support.payments import Connection, add_merchant, fact, pay, record
from tests.support.sandbox_process import eventually, running_sandbox
from tests.support.webhook_examples import record_webhook_endpoints
from tests.support.workers import shorten_delays, worker_process

Json = dict[str, Any]

WRITTEN = Path(__file__).parent.parent.parent / "app" / "api" / "examples.json"
ELEMENTS_MAX = 2
WAIT = {"Prefer": "wait=30"}
WITHIN_SECONDS = 60.0
CHALLENGED = "pm_card_threeDSecure2Required"
OUR_ID = re.compile(r"\b(?!sty_)([a-z]{2,4})_[0-9a-f]{24}\b")
THEIR_ID = re.compile(r"\b(pi|ch|py|pm|re|du|dp|evt|txn|acct|req|cus|issfr)_(?![0-9a-f]{24}\b)[0-9A-Za-z]{8,}\b")
TIME = re.compile(r"\b20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
HINT = re.compile(r"sty_…\w{4}")
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


class Recorder:
    """Records the requests and answers of clients."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, Any] = {}

    def record(self, response: httpx.Response, *, is_example: bool = True) -> Any:
        """Keep a request and its answer as examples; returns the answer's document."""
        document = msgspec.json.decode(response.content)
        if response.status_code >= 400:
            self.problems[document["type"].rpartition("/")[2]] = document
            return document
        if is_example:
            name = operation_id(route_of(response.request))
            self.answers.setdefault(name, {})[str(response.status_code)] = document
            if response.request.content:
                self.requests[name] = msgspec.json.decode(response.request.content)
        return document

    def document(self) -> Json:
        """All examples, with replaced ids and times."""
        found = {"requests": self.requests, "answers": self.answers, "problems": self.problems}
        return cast(Json, Replacements().replace(shortened(found)))


class Replacements:
    """Gives each id, time and address another one of its form, the same at each place."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def replace(self, value: Any) -> Any:
        """The value with all its texts replaced, at any depth."""
        if isinstance(value, dict):
            return {self.replace_text(name): self.replace_member(name, part) for name, part in value.items()}
        if isinstance(value, list):
            return [self.replace(part) for part in value]
        return self.replace_text(value) if isinstance(value, str) else value

    def replace_member(self, name: str, value: Any) -> Any:
        """The value of a member: a cursor and a duration differ in each run."""
        if name == "next" and isinstance(value, str) and len(value) > 20 and " " not in value:
            return "MXwxOjE6fC18MHwt"
        if name == "client_secret":
            return "pi_3SYk3a1f0c9e77_secret_Zm9yIFN0cmlwZS5qcw"
        if name == "secret" and isinstance(value, str):
            return f"whsec_{'c3VyZXR5' * 5}c3U="
        if name == "public_keys":
            return [f"whpk_{'a2V5cyEh' * 5}a2U=" for _ in value]
        if name == "duration_ms" and value is not None:
            return 84.1
        if name.endswith("seconds") and isinstance(value, float):
            return 1.5
        return self.replace(value)

    def replace_text(self, text: str) -> str:
        """A text with its ids, times and addresses replaced."""
        text = TIME.sub(lambda _: "2026-11-30T09:30:00.000Z", text)
        text = HINT.sub("sty_…q7Zd", ADDRESS.sub("https://pay.example", text))
        text = OUR_ID.sub(
            lambda found: self._as(found[0], lambda n: f"{found[1]}_{0x19AD3F00000 + n:012x}{digits(n)}"), text
        )
        return THEIR_ID.sub(lambda found: self._as(found[0], lambda n: f"{found[1]}_3SYk{digits(n)[:10]}"), text)

    def _as(self, found: str, make: Callable[[int], str]) -> str:
        return self._given.setdefault(found, make(len(self._given)))


def digits(number: int) -> str:
    """Twelve hex digits that look random and are the same in each run."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:12]


def shortened(value: Any) -> Any:
    """The value with its lists cut, at any depth."""
    if isinstance(value, list):
        return [shortened(part) for part in value[:ELEMENTS_MAX]]
    return {name: shortened(part) for name, part in value.items()} if isinstance(value, dict) else value


def route_of(request: httpx.Request) -> Route:
    """The route of a request."""
    path = request.url.path
    matching = [row for row in ROUTES if row.method == request.method and pattern_of(row).fullmatch(path)]
    # A path without parameters comes before one with them.
    return min(matching, key=lambda row: row.path.count("{"))


def pattern_of(row: Route) -> re.Pattern[str]:
    """The paths of a route."""
    return re.compile(re.sub(r"\{[^}]*\}", "[^/]+", row.path))


class ExampleClient:
    """A merchant's system, whose requests are recorded."""

    def __init__(self, merchant: Merchant, recorder: Recorder) -> None:
        self.client, self.recorder = merchant.client, recorder
        self._keys = 0

    def get(self, path: str, *, is_example: bool = True, headers: Json | None = None, **query: Any) -> Any:
        """The document of a GET."""
        answer = self.client.get(path, params=query, headers=headers or {})
        return self.recorder.record(answer, is_example=is_example)

    def post(self, path: str, body: Json | None = None, *, is_example: bool = True, key: str | None = None) -> Any:
        """The document of a POST, under a key of its own unless one is given."""
        self._keys += 1
        sent = {"Idempotency-Key": key or f"example-{self._keys}"}
        return self.recorder.record(self.client.post(path, json=body or {}, headers=sent), is_example=is_example)

    def delete(self, path: str) -> Any:
        """The document of a DELETE, under a key of its own."""
        self._keys += 1
        return self.recorder.record(self.client.delete(path, headers={"Idempotency-Key": f"example-{self._keys}"}))

    def wait_for(self, path: str, *statuses: str, member: str = "status") -> Any:
        """The object at a path, once it has one of the statuses."""

        def look() -> Any:
            document = self.client.get(path).json()
            return document if document[member] in statuses else None

        return eventually(look, WITHIN_SECONDS)

    def wait_for_card(self, payment_id: str) -> None:
        """Return once a payment is authorized and shows its card."""

        def look() -> bool:
            document = self.client.get(f"/v1/payments/{payment_id}").json()
            return document["status"] == "requires_capture" and document["payment_method"]["brand"] is not None

        eventually(look, WITHIN_SECONDS)


def payment(**fields: Any) -> Json:
    """A payment's request."""
    return {
        "amount": 4999,
        "currency": "usd",
        "payment_method": {"type": "card", "token": "pm_card_visa"},
        "return_url": "https://shop.example/orders/1001",
        **fields,
    }


def record_merchant(
    client: ExampleClient, server: ExitStack, start_worker: Callable[[ExitStack], Any], dispute: Callable[[str], Any]
) -> None:
    """The routes of merchants."""
    unsent = client.post("/v1/payments", payment(), is_example=False)
    client.post(f"/v1/payments/{unsent['id']}/cancel")
    start_worker(server)
    order = payment(
        reference="order-1001",
        description="Two books",
        statement_descriptor_suffix="BOOKS",
        customer={"email": "ada@shop.example", "name": "Ada Miller"},
        metadata={"cart": "9"},
    )
    made = client.post("/v1/payments", order)["id"]
    client.get(f"/v1/payments/{made}", is_example=False, headers=WAIT)
    client.wait_for(f"/v1/payments/{made}", "settled", member="state")
    refund = client.post(f"/v1/payments/{made}/refunds", {"amount": 1000, "reason": "requested_by_customer"})["id"]
    client.wait_for(f"/v1/refunds/{refund}", "succeeded")
    client.get(f"/v1/refunds/{refund}")
    client.get("/v1/refunds", limit=1)
    client.wait_for(f"/v1/payments/{made}", "partially_refunded", member="state")
    client.post(f"/v1/payments/{made}", {"metadata": {"cart": "9", "invoice": "2026-114"}})
    client.get(f"/v1/payments/{made}", expand="refunds")
    client.get(f"/v1/payments/{made}/trace")
    client.get("/v1/payments", reference="order-1001", limit=1)
    held = client.post("/v1/payments", payment(capture_method="manual"), is_example=False)["id"]
    client.wait_for_card(held)
    client.post(f"/v1/payments/{held}/capture", {"amount": 4000})
    released = client.post("/v1/payments", payment(capture_method="manual"), is_example=False)["id"]
    client.wait_for_card(released)
    client.post(f"/v1/payments/{released}/cancel")
    by_script = payment(return_url=None, authentication="script", payment_method={"type": "card", "token": CHALLENGED})
    challenged = client.post("/v1/payments", by_script, is_example=False)["id"]
    client.wait_for(f"/v1/payments/{challenged}", "requires_action")
    client.post(f"/v1/payments/{challenged}/client_secret")
    record_dispute(client, dispute)
    record_customer(client)
    client.get("/v1/balance")
    client.get("/v1/balance/transactions", payment=made, limit=2)
    client.get("/v1/statements", month=f"{datetime.now(UTC):%Y-%m}", limit=1)
    client.get("/v1/currencies")
    events = client.get("/v1/events", object=made, limit=2)
    client.get(f"/v1/events/{events['data'][0]['id']}")


def record_dispute(client: ExampleClient, dispute: Callable[[str], Any]) -> None:
    """The routes of disputes."""
    disputed = client.post("/v1/payments", payment(), is_example=False)["id"]
    paid = client.wait_for(f"/v1/payments/{disputed}", "settled", member="state")
    dispute(paid["provider"]["id"])
    client.wait_for(f"/v1/payments/{disputed}", "disputed")
    found = client.get("/v1/disputes", payment=disputed, limit=1)["data"][0]["id"]
    evidence = {"evidence": {"uncategorized_text": "Both books were handed over on 12 November."}, "submit": False}
    client.post(f"/v1/disputes/{found}/evidence", evidence)
    client.get(f"/v1/disputes/{found}")


def record_customer(client: ExampleClient) -> None:
    """The routes of customers."""
    address = {"line1": "1 Main Street", "city": "Springfield", "postal_code": "62701", "country": "US"}
    ada = {
        "email": "ada@shop.example",
        "name": "Ada Miller",
        "shipping": {"name": "Ada Miller", "address": address},
        "metadata": {"tier": "gold"},
    }
    made = client.post("/v1/customers", ada)["id"]
    client.get(f"/v1/customers/{made}")
    client.post(f"/v1/customers/{made}", {"phone": "+1 555 0100", "metadata": {"tier": None}})
    client.get("/v1/customers", email="ada@shop.example", limit=1)
    mandate = {
        "accepted_at": "2026-11-30T09:29:51.000Z",
        "ip_address": "203.0.113.7",
        "user_agent": "Mozilla/5.0",
        "text": "I agree that Acme Books charges this card for my orders.",
    }
    saving = payment(customer_id=made, save_payment_method="off_session", mandate=mandate)
    client.post("/v1/payments", saving, is_example=False)
    path = f"/v1/customers/{made}/payment_methods"
    saved = eventually(lambda: client.client.get(path).json()["data"], WITHIN_SECONDS)[0]["id"]
    client.get(path)
    method = {"type": "card", "saved": saved}
    client.post("/v1/payments", payment(payment_method=method, off_session=True), is_example=False)
    client.delete(f"{path}/{saved}")


def record_problems(client: ExampleClient, merchant: Merchant, recorder: Recorder) -> None:
    """Each problem that a client can cause by one request."""
    made = client.post("/v1/payments", payment(reference="order-1002"), is_example=False)["id"]
    client.post("/v1/payments", payment(amount=0, currency="usx"))
    client.post("/v1/payments", payment(reference="order-1002"))
    client.post("/v1/payments", payment(amount=5000), key="order-1003")
    client.post("/v1/payments", payment(amount=6000), key="order-1003")
    client.post(f"/v1/payments/{made}/capture")
    client.get("/v1/payments/pay_0123456789abcdef01234567")
    for answer in (
        client.client.post("/v1/payments", json=payment()),
        client.client.post("/v1/payments", content=b"amount=4999", headers={"Idempotency-Key": "form"}),
        client.client.post(
            "/v1/payments",
            content=b" " * 70_000,
            headers={"Content-Type": "application/json", "Idempotency-Key": "long"},
        ),
        client.client.post(
            "/v1/payments",
            content=b"",
            headers={"Content-Encoding": "gzip", "Content-Type": "application/json", "Idempotency-Key": "gzip"},
        ),
        client.client.get("/v1/payments", headers={"Authorization": "Bearer sty_test_misspelt"}),
        client.client.get("/v1/operator/dead-letters"),
        client.client.delete("/v1/payments"),
        client.client.get("/v1/payments/" + "a" * 20_000),
        client.client.get("/v1/payments", headers={"X-Long": "a" * 100_000}),
    ):
        recorder.record(answer)
    limited = {"Authorization": f"Bearer {merchant.another_key()}"}
    merchant.conn.execute("select surety.set_rate_limit(%s, 1, 1, 'test')", (merchant.key_id,))
    while (answer := client.client.get("/v1/balance", headers=limited)).status_code == 200:
        pass
    recorder.record(answer)
    merchant.conn.execute("select surety.set_money_limit(%s, 'chf', 0, null, 'test')", (merchant.id,))
    client.post("/v1/payments", payment(currency="chf"))
    add_velocity_rule(merchant.conn, "refuse", currency="sek")
    client.post("/v1/payments", payment(currency="sek", customer={"email": "ada@shop.example"}))
    expired, bound, reading, revoked = (
        merchant.another_key(expires_in="1 millisecond"),
        merchant.another_key(networks=["203.0.113.0/24"]),
        merchant.another_key(scopes=["read"]),
        merchant.another_key(),
    )
    merchant.conn.execute("select surety.revoke_api_key(%s, 'test')", (merchant.key_id,))
    for key in (expired, bound, reading, revoked):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "key"}
        recorder.record(client.client.post("/v1/payments", json=payment(), headers=headers))
    merchant.conn.execute("select surety.suspend_merchant(%s, true, 'test')", (merchant.id,))
    client.post("/v1/payments", payment())


def add_velocity_rule(conn: Connection, action: str, *, currency: str | None = None) -> None:
    """A rule that no payment with an e-mail address keeps."""
    conn.execute("select surety.add_velocity_rule(null, 'email', '1 day', 0, null, %s, %s, 'test')", (currency, action))


def held_payments(conn: Connection, count: int) -> list[str]:
    """Payments on hold."""
    add_velocity_rule(conn, "hold")
    return pay(conn, add_merchant(conn)[1], count, customer={"email": "ada@shop.example"})


def differing_payments(conn: Connection, count: int) -> list[str]:
    """The ids of discrepancies: more was captured than was asked for."""
    for payment_id in pay(conn, add_merchant(conn)[1], count):
        record(conn, [fact(payment_id, "captured", "ch", 11000)])
    return [row[0] for row in conn.execute("select id from surety.discrepancies order by id")]


def record_discrepancies(client: httpx.Client, differing: list[str], recorder: Recorder) -> None:
    """The operators' routes of discrepancies."""
    path = "/v1/operator/discrepancies"
    until = (datetime.now(UTC) + timedelta(days=2)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for action, body in (
        ("assign", {"assignee": "tester", "note": "Is it a tip?"}),
        ("snooze", {"until": until, "note": "The merchant was asked."}),
        ("resolve", {"reason": "The payer was refunded by hand.", "resolution": "corrected"}),
    ):
        recorder.record(client.post(f"{path}/{differing[0]}/{action}", json=body))
    for place in ("", f"/{differing[0]}"):
        recorder.record(client.get(f"{path}{place}"))
    several = {"kind": "amount", "max_delta": 1000, "expect": len(differing) - 1, "reason": "The agreed tolerance."}
    recorder.record(client.post(f"{path}/resolve", json=several))


def record_operators(client: httpx.Client, letters: list[str], held: list[str], recorder: Recorder) -> None:
    """The routes of operators, and those that need no key."""
    reason = {"reason": "The currency is accepted from today on."}
    for path in ("", f"/{letters[0]}"):
        recorder.record(client.get(f"/v1/operator/dead-letters{path}"))
    recorder.record(
        client.post("/v1/operator/dead-letters/replay", json=reason | {"handler": "submit", "dry_run": True})
    )
    recorder.record(client.post(f"/v1/operator/dead-letters/{letters[0]}/replay", json=reason))
    recorder.record(client.post(f"/v1/operator/dead-letters/{letters[1]}/discard", json=reason))
    recorder.record(client.post("/v1/operator/dead-letters/discard", json=reason | {"error": "parameter_invalid"}))
    reason = {"reason": "The payer is known."}
    for path in ("", f"/{held[0]}"):
        recorder.record(client.get(f"/v1/operator/holds{path}"))
    recorder.record(client.post(f"/v1/operator/holds/{held[0]}/release", json=reason))
    recorder.record(client.post(f"/v1/operator/holds/{held[1]}/refuse", json=reason))
    recorder.record(client.get("/v1/operator/status"))
    for path in ("/problems", "/problems/reference-taken", "/health"):
        recorder.record(client.get(path))


@contextmanager
def open_database(server: str) -> Generator[tuple[str, Connection]]:
    """A database of its own, and a connection to it."""
    with temporary_database(server, "surety_test") as database:
        deploy(database)
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as conn:
            yield database, conn


def record_examples(server: str) -> Json:
    """All examples, from processes of their own."""
    recorder = Recorder()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        database, conn = stack.enter_context(open_database(server))
        shorten_delays(conn)
        api = stack.enter_context(running_server("api", database))
        webhooks = stack.enter_context(running_server("webhooks", database))
        result = (f"--webhook-url={webhooks.url}/stripe", f"--webhook-secret={SECRETS[0]}")
        sandbox = stack.enter_context(running_sandbox(folder, *result))
        merchant = Merchant(conn, api.url)
        stack.enter_context(merchant.client)
        client = ExampleClient(merchant, recorder)
        record_merchant(
            client,
            stack,
            lambda opened: opened.enter_context(worker_process(database, sandbox.url, STRIPE_API_KEY=sandbox.api_key)),
            lambda intent: sandbox.control("disputes", {"payment_intent": intent}),
        )
        record_webhook_endpoints(client, conn)
        record_problems(client, merchant, recorder)
    with ExitStack() as stack:
        database, conn = stack.enter_context(open_database(server))
        letters = [never_sent_letter(conn)[0] for _ in range(ELEMENTS_MAX)]
        api = stack.enter_context(running_server("api", database))
        headers = {"Authorization": f"Bearer {admin_key(database)}"}
        operators = stack.enter_context(httpx.Client(base_url=api.url, headers=headers, timeout=30))
        record_operators(operators, letters, held_payments(conn, ELEMENTS_MAX), recorder)
        record_discrepancies(operators, differing_payments(conn, ELEMENTS_MAX + 1), recorder)
    return recorder.document()


def main() -> None:
    """Write the examples."""
    with EmbeddedServer() as server:
        WRITTEN.write_bytes(msgspec.json.format(msgspec.json.encode(record_examples(server.url)), indent=2) + b"\n")


if __name__ == "__main__":
    main()
