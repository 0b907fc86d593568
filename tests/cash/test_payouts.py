"""Payouts to our bank: their life at the provider, and the balance transactions that each pays out."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from psycopg.types.json import Jsonb

from jobs.payouts import poll_payouts, read_payout_lines
from jobs.polling import poll_balance_transactions
from tests.cash.conftest import Pay
from tests.cash.test_bank_statements import camt, entry, statement
from tests.cli.conftest import Run, run, said
from tests.support.payments import Connection, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import in_process_worker, run_until_idle

__all__ = ["run"]

PAYOUT = "select status, was_paid, trace_id, line_count, lines_minor, amount_minor from surety.payouts"


@pytest.fixture
def quiet_sandbox(tmp_path: Path) -> Generator[SandboxProcess]:
    """A sandbox without payouts of its own, whose money is available at once."""
    options = ("--available-seconds=0", "--payout-seconds=0", "--payout-arrival-seconds=3600")
    with running_sandbox(tmp_path, *options) as sandbox:
        yield sandbox


def pay_out(sandbox: SandboxProcess) -> str:
    """Pay out all available money; returns the payout's id."""
    eventually(lambda: sandbox.get("/v1/balance")["available"][0]["amount"])
    return str(sandbox.control("payouts", {})["payouts"][-1])


def discrepancies(conn: Connection) -> list[tuple[str, str]]:
    return conn.execute(
        "select kind, subject from surety.discrepancies where closed_at is null order by 1, 2"
    ).fetchall()


async def test_a_payout_pays_out_payments_refunds_disputes_and_unrecognized_money(
    conn: Connection, database: str, quiet_sandbox: SandboxProcess, shop: Pay
) -> None:
    shop(3)
    async with in_process_worker(database, quiet_sandbox.url) as worker:
        await run_until_idle(worker)
        charges = [row[0] for row in conn.execute("select provider_id from surety.payments order by id")]
        eventually(lambda: len(quiet_sandbox.get("/v1/balance_transactions")["data"]) >= 3)
        quiet_sandbox.control("refunds", {"payment_intent": charges[0], "amount": 500})
        quiet_sandbox.control("disputes", {"payment_intent": charges[1]})
        quiet_sandbox.control("foreign-charge", {"amount": 90000})
        eventually(lambda: len(quiet_sandbox.get("/v1/balance_transactions")["data"]) >= 6)
        payout = pay_out(quiet_sandbox)
        quiet_sandbox.control(f"payouts/{payout}", {"outcome": "paid"})
        await poll_payouts(worker)
        await poll_balance_transactions(worker)
        await read_payout_lines(worker)
    [(status, was_paid, trace, lines, total, amount)] = conn.execute(PAYOUT).fetchall()
    assert (status, was_paid, lines, total) == ("paid", True, 6, amount)
    assert trace == quiet_sandbox.get(f"/v1/payouts/{payout}")["trace_id"]["value"]
    categories = conn.execute(
        "select category, count(*), count(payment_id) from report.payout_lines where payout_id = %s"
        " group by 1 order by 1",
        (payout,),
    ).fetchall()
    assert categories == [("charge", 4, 3), ("dispute", 1, 1), ("payout", 1, 0), ("refund", 1, 1)]
    assert discrepancies(conn) == []


async def test_a_payout_that_differs_from_its_balance_transactions_is_a_discrepancy_until_they_add_up(
    conn: Connection, database: str, quiet_sandbox: SandboxProcess, shop: Pay
) -> None:
    shop()
    async with in_process_worker(database, quiet_sandbox.url) as worker:
        await run_until_idle(worker)
        payout = pay_out(quiet_sandbox)
        quiet_sandbox.control(f"payouts/{payout}", {"outcome": "paid"})
        await poll_payouts(worker)
        conn.execute("update surety.payouts set amount_minor = amount_minor + 1")
        await read_payout_lines(worker)
        assert discrepancies(conn) == [("amount", f"{payout}:lines")]
        conn.execute("update surety.payouts set amount_minor = amount_minor - 1, lines_due_at = now()")
        await read_payout_lines(worker)
    assert discrepancies(conn) == []
    assert conn.execute("select lines_due_at from surety.payouts").fetchone() == (None,)


async def test_a_payout_that_fails_after_it_was_paid_is_found_without_a_webhook(
    conn: Connection, database: str, quiet_sandbox: SandboxProcess, shop: Pay
) -> None:
    shop()
    async with in_process_worker(database, quiet_sandbox.url) as worker:
        await run_until_idle(worker)
        payout = pay_out(quiet_sandbox)
        quiet_sandbox.control(f"payouts/{payout}", {"outcome": "paid"})
        await poll_payouts(worker)
        quiet_sandbox.control(f"payouts/{payout}", {"outcome": "failed"})
        # It was created too long ago to be listed again.
        conn.execute("update surety.poll_cursors set polled_to = now() + interval '1 hour' where list = 'payouts'")
        await poll_payouts(worker)
        assert [row[0] for row in conn.execute(PAYOUT)] == ["paid"], "not due"
        conn.execute("update surety.payouts set poll_at = now()")
        await poll_payouts(worker)
        await poll_balance_transactions(worker)
    [(status, was_paid, trace, *_)] = conn.execute(PAYOUT).fetchall()
    assert (status, was_paid) == ("failed", True)
    assert trace, "kept"
    assert discrepancies(conn) == [("state", payout)]
    moved = "select count(*), sum(amount_minor) from ledger.transfers where %s like 'in\\_transit:%%'"
    out, back = (conn.execute(moved.replace("%s", side)).fetchone() for side in ("debit_account", "credit_account"))
    assert out == back


def payout_fact(status: str, trace: str | None = None, amount: int = 100, currency: str = "usd") -> dict[str, object]:
    """A report of one payout."""
    return {
        "provider": "stripe", "account": "", "livemode": False, "object_id": "po_1", "source": "webhook",
        "kind": "payout_failed" if status in {"failed", "canceled"} else "payout", "amount_minor": amount,
        "currency": currency, "occurred_at": "2026-11-20T00:00:00Z",
        "data": {"status": status, "trace_id": trace, "automatic": True, "arrival_date": 1_764_000_000},
    }  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 1, 1, 2, 0)])
def test_reports_of_a_payout_in_any_order_end_the_same(conn: Connection, order: tuple[int, ...]) -> None:
    reports = [payout_fact("in_transit"), payout_fact("paid", "021000"), payout_fact("failed")]
    for place in order:
        conn.execute("select surety.record_facts(%s, 'test')", (Jsonb([reports[place]]),))
    assert conn.execute("select status, was_paid, trace_id from surety.payouts").fetchall() == [
        ("failed", True, "021000")
    ]
    assert discrepancies(conn) == [("state", "po_1")]


def test_a_payout_reported_with_another_amount_is_a_discrepancy(conn: Connection) -> None:
    for amount, currency in ((100, "usd"), (101, "usd"), (100, "eur")):
        fact = payout_fact("paid", amount=amount, currency=currency)
        conn.execute("select surety.record_facts(%s, 'test')", (Jsonb([fact]),))
    assert conn.execute("select amount_minor, currency from surety.payouts").fetchall() == [(100, "usd")]
    assert discrepancies(conn) == [("amount", "po_1:payout"), ("currency", "po_1:payout")]


def test_a_balance_transaction_is_in_one_payout(conn: Connection) -> None:
    other = payout_fact("paid") | {"object_id": "po_2"}
    conn.execute("select surety.record_facts(%s, 'test')", (Jsonb([payout_fact("paid"), other]),))
    line = Jsonb([{"id": "txn_1", "category": "charge", "net": 100, "currency": "usd"}])
    for payout, count in (("po_1", 1), ("po_1", 0), ("po_2", 0)):
        assert conn.execute("select surety.record_payout_lines('', %s, %s)", (payout, line)).fetchone() == (count,)
    assert discrepancies(conn) == [("duplicate", "txn_1:payout")]


async def test_a_payments_money_is_traced_from_its_charge_to_the_banks_line(
    conn: Connection, database: str, quiet_sandbox: SandboxProcess, shop: Pay, run: Run, tmp_path: Path
) -> None:
    [payment_id, _] = shop(2)
    async with in_process_worker(database, quiet_sandbox.url) as worker:
        await run_until_idle(worker)
        payout = pay_out(quiet_sandbox)
        paid = quiet_sandbox.control(f"payouts/{payout}", {"outcome": "paid"})
        await poll_payouts(worker)
        await poll_balance_transactions(worker)
        await read_payout_lines(worker)
    whole, trace_id = paid["amount"] / 100, paid["trace_id"]["value"]
    lines = entry(f"{whole - 1:.2f}", text=trace_id) + entry("1.00", text=trace_id)
    file = tmp_path / "statement.xml"
    file.write_text(camt(statement(lines)).replace("EUR", "USD"))
    said(run("bank-statements", "import", str(file)))
    found = conn.execute(
        "select category, payout_id, trace_id, matched_by, count(*) from report.payment_cash where payment_id = %s"
        " group by 1, 2, 3, 4",
        (payment_id,),
    ).fetchall()
    assert found == [("charge", payout, trace_id, "trace_id", 2)]
    shown = said(run("trace", payment_id))
    assert f"in {payout} of {whole:.2f} USD" in shown
    assert shown.count("← bank") == 2
    [(_, body)] = conn.execute(
        "select * from api.get_trace((select hash from surety.api_keys limit 1), %s)", (payment_id,)
    ).fetchall()
    assert not {"payout", "bank"} & {one["kind"] for one in json.loads(body)["entries"]}
    assert not violations(conn)
