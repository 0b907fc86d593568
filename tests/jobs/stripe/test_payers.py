"""Payers: their actions, and which of their data reach the provider, are stored and are logged."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from db.logs import LineFormatter
from tests.jobs.stripe.test_stripe_client import PIPELINE
from tests.support.payments import Connection, state_of
from tests.support.sandbox_process import SandboxProcess
from tests.support.workers import due, in_process_worker, run_until_idle


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
