"""Responses about another object or amount, and a second intent: never a step, never a charge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from jobs.stripe.facts import FactOrigin, intent_facts
from tests.jobs.stripe.test_stripe_client import PIPELINE, charges
from tests.support.payments import Connection, ledger_of, state_of, violations
from tests.support.sandbox_process import SandboxProcess
from tests.support.workers import attempts, due, in_process_worker, run_until_idle


async def test_second_intent_is_a_discrepancy_never_confirmed_and_canceled(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(first,)] = conn.execute("select provider_id from surety.payments").fetchall()
        second = sandbox.read(sandbox.create(amount=10000, **{"metadata[surety_payment]": payment_id}))
        origin = FactOrigin("", livemode=False, source="webhook")
        conn.execute("select surety.record_facts(%s, 'test')", (json.dumps(intent_facts(second, origin)),))
        result = "select kind, subject, closed_because from surety.discrepancies"
        assert conn.execute(result).fetchall() == [("duplicate", second["id"], None)]
        sandbox.order("payment_intents.cancel", "timeout_after", match=payment_id)
        await run_until_idle(worker, "confirm", "cancel")
        due(conn)
        await run_until_idle(worker, "cancel")
    assert conn.execute("select provider_id, state from surety.payments").fetchone() == (first, "confirmed")
    assert conn.execute(result).fetchall() == [("duplicate", second["id"], "it is canceled")]
    assert sandbox.read(second["id"])["status"] == "canceled"
    assert sandbox.read(second["id"])["cancellation_reason"] == "duplicate"
    assert charges(sandbox, payment_id) == 1
    assert not violations(conn)


class AlteringProxy:
    """Stands between us and the sandbox and alters its answers to POSTs."""

    def __init__(self, url: str, alter: Callable[[dict[str, Any]], None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.forward(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def do_GET(self) -> None:
                self.forward(b"")

            def forward(self, content: bytes) -> None:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                result = httpx.request(self.command, url + self.path, content=content, headers=headers)
                body = result.json()
                if self.command == "POST" and result.status_code == 200:
                    alter(body)
                text = json.dumps(body).encode()
                self.send_response(result.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def altering_proxy(sandbox: SandboxProcess, **lies: Any) -> Generator[str]:
    """The address of a provider whose answers say something else."""
    liar = AlteringProxy(sandbox.url, lambda body: body.update(lies))
    try:
        yield liar.url
    finally:
        liar.server.shutdown()
        liar.server.server_close()


@pytest.mark.parametrize(
    ("lies", "kind"),
    [
        ({"amount": 9999}, "amount"),
        ({"currency": "eur"}, "currency"),
        ({"livemode": True}, "livemode"),
        ({"metadata": {"surety_payment": "pay_" + "0" * 24}}, "foreign"),
        ({"metadata": {}}, "foreign"),
    ],
)
async def test_response_about_another_object_is_a_discrepancy_and_never_a_step(
    conn: Connection,
    database: str,
    sandbox: SandboxProcess,
    payment: Callable[..., str],
    lies: dict[str, Any],
    kind: str,
) -> None:
    payment_id = payment()
    with altering_proxy(sandbox, **lies) as url:
        async with in_process_worker(database, url, judged=False) as worker:
            await run_until_idle(worker, *PIPELINE)
    assert state_of(conn, payment_id) == "submitting"
    found = conn.execute("select kind, payment_id, severity from surety.discrepancies").fetchall()
    assert found == [(kind, payment_id, "critical")]
    assert [row[:2] for row in attempts(conn)] == [("submit", 1)]


@pytest.mark.parametrize(
    ("lies", "kind"), [({"id": "pi_another"}, "foreign"), ({"object": "charge"}, None), ({"metadata": None}, None)]
)
async def test_a_confirmation_of_another_intent_confirms_nothing(
    conn: Connection,
    database: str,
    sandbox: SandboxProcess,
    payment: Callable[..., str],
    lies: dict[str, Any],
    kind: str,
) -> None:
    payment_id = payment()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
    with altering_proxy(sandbox, **lies) as url:
        async with in_process_worker(database, url, judged=False) as worker:
            await run_until_idle(worker, "confirm")
    assert state_of(conn, payment_id) == "provider_submitted"
    found = [row[0] for row in conn.execute("select kind from surety.discrepancies").fetchall()]
    assert found == ([kind] if kind else [])
    due(conn)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "confirm")
    assert state_of(conn, payment_id) in {"confirmed", "settled"}, "asked about, it is what it was"
    assert charges(sandbox, payment_id) == 1


async def test_a_captured_amount_that_differs_is_booked_as_it_is(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
    with altering_proxy(sandbox, amount=10500, amount_received=10500) as url:
        async with in_process_worker(database, url, judged=False) as worker:
            await run_until_idle(worker, "confirm")
    assert state_of(conn, payment_id) == "confirmed"
    assert ledger_of(conn, payment_id) == {
        "provider_receivable": 10500,
        "pending": 9625,
        "fee_revenue": 375,
        "suspense": 500,
    }
    kinds = {row[0] for row in conn.execute("select kind from surety.discrepancies").fetchall()}
    assert kinds == {"amount"}
