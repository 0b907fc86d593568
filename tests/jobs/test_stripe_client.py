"""The rail to Stripe, against the sandbox: whatever goes wrong on the way, a payment is charged once or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from db.logs import LineFormatter
from jobs.stripe.client import PROVIDER_CONNECTIONS_MAX, StripeHttpClient
from jobs.stripe.facts import FactOrigin, intent_facts
from tests.support.payments import Connection, add_merchant, command, ledger_of, path_of, pay, state_of, violations
from tests.support.postgres_proxy import turn_loop
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, attempts, due, in_process_worker, run_until_idle, shorten_delays

PIPELINE = ("submit", "confirm", "cancel")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("rail"), "--hang-seconds=1", "--slow-seconds=0.1") as sandbox:
        yield sandbox


@pytest.fixture
def payment(conn: Connection) -> Callable[..., str]:
    """A new payment of 100.00 USD by a card."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)

    def make(card: str = "pm_card_visa", **fields: Any) -> str:
        return pay(conn, key_hash, method_token=card, **fields)[0]

    return make


def charges(sandbox: SandboxProcess, payment_id: str) -> int:
    """Successful charges of one payment, by the sandbox's own memory."""
    return sum(charge["metadata"]["surety_payment"] == payment_id for charge in sandbox.control("charges"))


def intents(sandbox: SandboxProcess, payment_id: str) -> list[dict[str, Any]]:
    """Every intent that was made for one payment."""
    page = sandbox.get("/v1/payment_intents", {"limit": 100})["data"]
    return [intent for intent in page if intent["metadata"].get("surety_payment") == payment_id]


async def test_a_payment_is_created_unconfirmed_then_confirmed_by_id(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment(description="a book", statement_descriptor_suffix="BOOKS")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        assert state_of(conn, payment_id) == "provider_submitted"
        [intent] = intents(sandbox, payment_id)
        assert (intent["status"], intent["description"]) == ("requires_confirmation", "a book")
        await run_until_idle(worker, "confirm")
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "confirmed"]
    assert charges(sandbox, payment_id) == 1
    query = "select kind, outcome, snapshot ->> 'operation', duration_ms > 0 from audit.entries"
    result = conn.execute(query + " where kind in ('call', 'answer') order by id").fetchall()
    assert result == [
        ("call", "sent", "create", None),
        ("answer", "answered", "create", True),
        ("call", "sent", "confirm", None),
        ("answer", "answered", "confirm", True),
    ]


OPERATIONS = {"submit": "payment_intents.create", "confirm": "payment_intents.confirm"}
# The fault, whether it may have happened, what the attempt is remembered by.
FAULTS = {
    "timeout_before": "no answer within 1 s",
    "timeout_after": "no answer within 1 s",
    "reset": "no answer: ",
    "error_500_before": "Stripe 500: ",
    "error_500_after": "Stripe 500: ",
    "garbage_200": "Stripe 200: an answer that makes no sense",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("handler", OPERATIONS)
async def test_unknown_outcome_is_never_charged_twice(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], handler: str, fault: str
) -> None:
    payment_id = payment()
    sandbox.order(OPERATIONS[handler], fault, match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        await run_until_idle(worker, "submit")
        await run_until_idle(worker, "confirm")
        [(failed, failures, [error])] = attempts(conn)
        assert (failed, failures) == (handler, 1)
        assert error.startswith(FAULTS[fault])
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    # Who asked may have seen its balance transaction as well.
    assert state_of(conn, payment_id) in {"confirmed", "settled"}
    assert charges(sandbox, payment_id) == 1
    assert len(intents(sandbox, payment_id)) == 1
    assert attempts(conn) == []
    assert not violations(conn)


@pytest.mark.parametrize("fault", ["timeout_before", "timeout_after", "error_500_before", "error_500_after"])
async def test_cancellation_of_unknown_outcome_is_looked_up(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], fault: str
) -> None:
    payment_id = payment("pm_card_visa_chargeDeclined")
    sandbox.order("payment_intents.cancel", fault, match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        await run_until_idle(worker, *PIPELINE)
        assert state_of(conn, payment_id) == "provider_submitted"
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert state_of(conn, payment_id) == "failed"
    assert [intent["status"] for intent in intents(sandbox, payment_id)] == ["canceled"]


@pytest.mark.parametrize("fault", ["conflict_409", "rate_limit_429"])
@pytest.mark.parametrize("handler", OPERATIONS)
async def test_rate_limit_response_is_not_counted_as_a_failure(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], handler: str, fault: str
) -> None:
    payment_id = payment()
    sandbox.order(OPERATIONS[handler], fault, match=payment_id, times=5)
    query = "select failures, due_at - (attempts -> -1 ->> 'at')::timestamptz from outbox.retries"
    async with in_process_worker(database, sandbox.url) as worker:
        for turn in range(5):
            await run_until_idle(worker, *PIPELINE)
            [(failures, wait)] = conn.execute(query).fetchall()
            assert failures == 0
            assert wait.total_seconds() == pytest.approx(2**turn, abs=0.01)
            due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert state_of(conn, payment_id) == "confirmed"
    assert charges(sandbox, payment_id) == 1


@pytest.mark.parametrize("fault", ["timeout_before", "timeout_after"])
async def test_list_is_read_before_another_intent_is_created_after_23_hours(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], fault: str
) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    payment_id = payment()
    sandbox.order("payment_intents.create", fault, match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        await run_until_idle(worker, "submit")
        conn.execute("insert into surety.clock (ahead) values ('23 hours 1 minute')")
        await run_until_idle(worker, "submit")
        asked = conn.execute("select count(*) from audit.entries where outcome = 'asked'").fetchone()
        assert asked == (1,)
        assert state_of(conn, payment_id) == "provider_submitted"
        await run_until_idle(worker, "confirm")
    row = conn.execute("select idempotency_key from surety.calls where operation = 'create'").fetchone()
    key = f"{payment_id}:create"
    assert row == (key if fault == "timeout_after" else f"{key}:2",)
    assert len(intents(sandbox, payment_id)) == 1
    assert charges(sandbox, payment_id) == 1


async def test_same_request_is_sent_under_the_same_key_within_23_hours(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    payment_id = payment()
    sandbox.order("payment_intents.create", "timeout_after", match=payment_id)
    sent: list[tuple[str, bytes]] = []

    async def remember(request: httpx.Request) -> None:
        sent.append((request.headers["idempotency-key"], request.content))

    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        worker.stripe.http.event_hooks["request"].append(remember)
        await run_until_idle(worker, "submit")
        conn.execute("insert into surety.clock (ahead) values ('22 hours 58 minutes')")
        await run_until_idle(worker, "submit")
    assert [key for key, _ in sent] == [f"{payment_id}:create"] * 2
    assert sent[0] == sent[1]
    assert state_of(conn, payment_id) == "provider_submitted"


async def test_a_decline_cancels_the_intent_before_the_payment_has_failed(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment("pm_card_visa_chargeDeclinedInsufficientFunds")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit", "confirm")
        assert state_of(conn, payment_id) == "provider_submitted"
        await run_until_idle(worker, "cancel")
    assert state_of(conn, payment_id) == "failed"
    failure = {
        "code": "card_declined",
        "decline_code": "insufficient_funds",
        "message": "Your card has insufficient funds.",
    }
    assert conn.execute("select failure from surety.payments").fetchone() == (failure,)
    assert [intent["status"] for intent in intents(sandbox, payment_id)] == ["canceled"]
    assert charges(sandbox, payment_id) == 0
    assert attempts(conn) == []


async def test_a_refusal_of_the_card_itself_fails_the_payment_at_once(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment("pm_of_another_account")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
    assert path_of(conn, payment_id) == ["initiated", "submitting", "failed"]
    [(failure,)] = conn.execute("select failure from surety.payments").fetchall()
    assert failure == {"code": "resource_missing", "message": "No such PaymentMethod: 'pm_of_another_account'"}
    assert attempts(conn) == []


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("create", ["initiated", "submitting", "failed"]),
        ("confirm", ["initiated", "submitting", "provider_submitted", "failed"]),
    ],
)
async def test_refusal_without_code_or_parameter_ends_the_payment_with_the_provider_s_words(
    conn: Connection, database: str, sandbox: SandboxProcess, operation: str, path: list[str]
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, reference="order 1")
    sandbox.order(f"payment_intents.{operation}", "refused_400")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
    assert path_of(conn, payment_id) == path
    [(failure,)] = conn.execute("select failure from surety.payments").fetchall()
    assert failure == {"code": "invalid_request_error", "message": "This request cannot be processed."}
    assert attempts(conn) == []
    assert charges(sandbox, payment_id) == 0
    [again] = pay(conn, key_hash, reference="order 1")
    assert state_of(conn, again) == "initiated", "the reference can be used again"


async def test_refusal_of_a_refund_without_code_or_parameter_releases_its_reserve(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, method_token="pm_card_visa")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        refund = command(conn, "create_refund", key_hash, payment_id=payment_id, amount=1000)
        assert refund["problem"] is None, refund
        sandbox.order("refunds.create", "refused_400")
        await run_until_idle(worker, "refund")
    refunds = conn.execute("select state, failure from surety.refunds").fetchall()
    assert refunds == [("failed", {"code": "invalid_request_error", "message": "This request cannot be processed."})]
    assert conn.execute("select refund_pending_minor from surety.payments").fetchall() == [(0,)]
    assert attempts(conn) == []
    assert violations(conn) == {}


@pytest.mark.parametrize("operation", ["create", "list"])
async def test_an_error_that_proves_nothing_is_dead_lettered_and_the_payment_waits(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], operation: str
) -> None:
    payment_id = payment()
    if operation == "list":
        faults = [
            {"operation": "payment_intents.create", "fault": "error_500_after"},
            {"operation": "payment_intents.list", "fault": "refused_400", "times": 10},
        ]
        sandbox.control("faults", {"next": faults})
    else:
        sandbox.order("payment_intents.create", "reused_key_400", times=10)
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        for _ in range(4):
            await run_until_idle(worker, *PIPELINE)
            due(conn)
    [(reason,)] = conn.execute("select reason from outbox.dead_letters").fetchall()
    assert reason == "it failed 3 times"
    assert state_of(conn, payment_id) == "submitting"


async def test_payment_that_requires_action_has_a_redirect_url(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment("pm_card_threeDSecure2Required", return_url="https://shop.example/back")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
    assert state_of(conn, payment_id) == "requires_action"
    [(action,)] = conn.execute("select next_action from surety.payments").fetchall()
    assert action["type"] == "redirect"
    assert action["url"].startswith(sandbox.url + "/3ds/pi_")


async def test_payer_who_is_absent_is_not_asked_to_act(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    absent = {"return_url": None, "off_session": True}
    asked, paid = payment("pm_card_threeDSecure2Required", **absent), payment("pm_card_visa", **absent)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE, "cancel")
    assert (state_of(conn, asked), state_of(conn, paid)) == ("failed", "confirmed")
    [(code,)] = conn.execute("select failure ->> 'code' from surety.payments where id = %s", (asked,)).fetchall()
    assert code == "authentication_required"


async def test_payment_that_asks_for_a_script_of_the_provider_ends(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment("pm_card_threeDSecure2Required")
    # As if the provider had ignored the return URL.
    conn.execute("alter table surety.payments drop constraint payment_returns_its_payer")
    conn.execute("update surety.payments set return_url = null")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE, "cancel")
    [found] = conn.execute("select state, next_action, failure ->> 'code' from surety.payments").fetchall()
    assert found == ("failed", None, "authentication_required")


def rows_that_contain(conn: Connection, schemas: str, text: str) -> list[str]:
    """The tables of these schemas that hold a text."""
    tables = conn.execute(
        "select format('%%I.%%I', schemaname, tablename) from pg_tables where schemaname = any(%s)", (schemas.split(),)
    ).fetchall()
    return [
        name
        for (name,) in tables
        if conn.execute(f"select from {name} as t where t::text ilike %s limit 1".encode(), (f"%{text}%",)).fetchone()
    ]


async def test_payers_name_and_address_reach_the_provider_but_not_the_audit_trail(
    conn: Connection,
    database: str,
    sandbox: SandboxProcess,
    payment: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = payment()
    paid = payment(customer={"email": "Ada@Shop.example", "name": "Ada Lovelace"})
    refused = payment(customer={"email": "grace@nowhere", "name": "Grace Hopper"})
    declined = payment("pm_card_visa_chargeDeclined", customer={"email": "alan@shop.example", "name": "Alan Turing"})
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
    rows = conn.execute("select id, provider_id from surety.payments where provider_id is not null").fetchall()
    intents = {id: sandbox.read(intent) for id, intent in rows}
    names = {id: (one["receipt_email"], one["metadata"].get("customer_name")) for id, one in intents.items()}
    assert names[paid] == ("Ada@Shop.example", "Ada Lovelace")
    assert names[declined] == ("alan@shop.example", "Alan Turing")
    assert names[plain] == (None, None)
    assert refused not in names
    [found] = conn.execute("select state, failure from surety.payments where id = %s", (refused,)).fetchall()
    assert found == (
        "failed",
        {"code": "email_invalid", "message": "Invalid email address: (an e-mail address)"},
    )
    for text in ("@shop.example", "@nowhere", "Lovelace", "Hopper", "Turing"):
        assert rows_that_contain(conn, "audit procrastinate", text) == []
        assert text.lower() not in caplog.text.lower()


async def test_row_that_the_database_refuses_is_not_logged(
    conn: Connection,
    database: str,
    sandbox: SandboxProcess,
    payment: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.handler.setFormatter(LineFormatter("worker"))
    payment(customer={"email": "ada@shop.example", "name": "Ada Lovelace"})
    conn.execute("alter table surety.payments add constraint none_is_confirmed check (state <> 'confirmed')")
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        await run_until_idle(worker, *PIPELINE)
    [(error,)] = conn.execute(
        "select distinct reason from audit.entries where reason like %s", ("%none_is%",)
    ).fetchall()
    assert "CheckViolation" in error
    assert "none_is_confirmed" in caplog.text
    for text in ("@shop.example", "Lovelace", "Failing row"):
        assert rows_that_contain(conn, "audit outbox procrastinate", text) == []
        assert text not in caplog.text


async def test_client_secrets_are_neither_stored_nor_audited(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    for card in ("pm_card_visa", "pm_card_threeDSecure2Required", "pm_card_visa_chargeDeclined"):
        payment(card)
    garbled = payment()
    sandbox.order("payment_intents.create", "garbage_200", match=garbled)
    async with in_process_worker(database, sandbox.url) as worker:
        for _ in range(2):
            await run_until_idle(worker)
            due(conn)
    tables = conn.execute(
        "select format('%I.%I', schemaname, tablename) from pg_tables"
        " where schemaname in ('surety', 'outbox', 'audit', 'ledger', 'procrastinate')"
    ).fetchall()
    # The page that the payer must visit has a secret of its own in its address, which the merchant needs.
    for (table,) in tables:
        query = f"select count(*) from {table} as t where t::text ~ 'pi_[[:alnum:]]+_secret_'"
        assert conn.execute(query.encode()).fetchone() == (0,), table


async def test_slow_call_does_not_delay_results_of_concurrent_calls(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    slow = payment()
    others = [payment() for _ in range(40)]
    sandbox.order("payment_intents.create", "timeout_before", match=slow)
    query = "select count(*) from surety.payments where state = 'provider_submitted'"
    async with in_process_worker(database, sandbox.url, judged=False, timeout_seconds=30) as worker:
        working = asyncio.create_task(run_until_idle(worker, "submit"))
        while conn.execute(query).fetchone() != (len(others),):
            assert not working.done(), "the slow call was waited for"
            await asyncio.sleep(0.005)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    assert state_of(conn, slow) == "submitting"


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
        ({"metadata": {"surety_payment": "pay_" + "0" * 32}}, "foreign"),
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
    found = conn.execute("select kind, payment_id, is_critical from surety.discrepancies").fetchall()
    assert found == [(kind, payment_id, True)]
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


def test_request_slots_are_shared_and_commands_take_precedence(conn: Connection) -> None:
    # One statement, so that its time stands still: 60 commands, then a request that isn't urgent.
    query = "select surety.reserve_request_slot('stripe', '', 50, n <= 60) from generate_series(1, 61) as n"
    *waits, last = [wait for (wait,) in conn.execute(query).fetchall()]
    # A burst of half a second's requests goes at once; the last of 60 waits for the rest.
    assert waits[:25] == [0] * 25
    assert waits[-1] == pytest.approx(0.7)
    assert last is None
    assert conn.execute("select surety.reserve_request_slot('stripe', 'acct_other', 50, false)").fetchone() == (0,)


async def test_a_bounded_rate_holds_for_real_calls(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    for _ in range(12):
        payment()
    async with in_process_worker(database, sandbox.url, per_second=10) as worker:
        began = time.monotonic()
        await run_until_idle(worker, "submit")
        # Five go at once, the last of the other seven 0.7 s after the first.
        assert time.monotonic() - began > 0.69


async def test_calls_that_ended_before_they_connected_leave_the_pool_usable() -> None:
    answering: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.current_task())
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(0.2)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    client = StripeHttpClient(20)

    async def call(url: str, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await client.pool.get(url)
        except TimeoutError:
            return False
        return True

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = "http://{}:{}/".format(*server.sockets[0].getsockname())
        # More at once than the pool has connections, as with probes beside calls.
        results = await asyncio.gather(*(call(url, 0.3) for _ in range(200)))
        assert results.count(False) > PROVIDER_CONNECTIONS_MAX
        assert await call(url, 10)
        await client.pool.aclose()
        await asyncio.wait([task for task in answering if task is not None])
        await turn_loop()
