"""`surety close` and `surety balance`: a month's books end, and later facts leave them as they are."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from db.connect import harden
from tests.cli.conftest import Run, refused, said
from tests.db.test_balances_at import all_balances, now
from tests.db.test_partitions import move_clock
from tests.support.operators import add_operator
from tests.support.payments import Connection, add_merchant, fact, money, pay, record, violations


def month_of(at: datetime, ahead: int = 0) -> str:
    """The month of a time, or one after it, as the command line names it."""
    months = at.year * 12 + at.month - 1 + ahead
    return f"{months // 12:04}-{months % 12 + 1:02}"


def end_of(at: datetime, ahead: int = 0) -> datetime:
    """The end of the month of a time, or of one after it."""
    return datetime.fromisoformat(f"{month_of(at, ahead + 1)}-01T00:00:00+00:00")


def move_to(conn: Connection, at: datetime) -> None:
    """Move the clock so that it is this time, or a little later."""
    move_clock(conn, f"{(at - datetime.now(UTC)).total_seconds()} seconds")


def capture(conn: Connection, key: bytes) -> str:
    [payment] = pay(conn, key)
    record(conn, [fact(payment, "submitted", "pi", 10000), fact(payment, "captured", "ch", 10000)])
    return payment


def settle(conn: Connection, payment: str) -> None:
    record(conn, [money(payment, "txn", "charge", 10000, 320), fact(payment, "available", "txn", 10000)])


def close(run: Run, month: str) -> dict[str, Any]:
    closed: dict[str, Any] = json.loads(said(run("close", "--month", month, "--json")))
    return closed


def test_late_facts_leave_a_closed_month_as_it_was(run: Run, conn: Connection) -> None:
    start = now(conn)
    merchant, key = add_merchant(conn)
    payment = capture(conn, key)
    end = end_of(start)
    move_to(conn, end + timedelta(hours=1))
    closed = close(run, month_of(start))
    before = all_balances(conn, end)
    assert before[f"pending:{merchant}:usd"] == 9625
    settle(conn, payment)
    assert all_balances(conn, end) == before
    kept = conn.execute("select account_id, balance_minor from ledger.closed_balances").fetchall()
    assert dict(kept) == before
    assert all_balances(conn, now(conn) + timedelta(seconds=1))[f"available:{merchant}:usd"] == 9625
    assert (closed["month"], closed["closed_by"]) == (month_of(start), "tester")
    assert not violations(conn)


def test_closing_lists_what_is_open(run: Run, conn: Connection) -> None:
    start = now(conn)
    _, key = add_merchant(conn)
    payment = capture(conn, key)
    record(conn, [money(payment, "txn_odd", "a_category_of_tomorrow", -120)])
    move_to(conn, end_of(start) + timedelta(hours=1))
    [(discrepancy,)] = conn.execute("select id from surety.discrepancies").fetchall()
    shown = said(run("close", "--month", month_of(start)))
    assert f"{month_of(start)} is closed" in shown and discrepancy in shown
    [listed] = json.loads(said(run("close", "--json")))
    assert listed["findings"]["discrepancies"] == {"count": 1, "example": discrepancy}
    assert listed["findings"]["amounts_in_suspense"] == {"count": 1, "example": "suspense:platform:usd"}
    audited = conn.execute(
        "select actor, snapshot ->> 'month' from audit.entries where outcome = 'month closed'"
    ).fetchall()
    assert audited == [("operator:tester", month_of(start))]


def test_closing_again_changes_nothing(run: Run, conn: Connection) -> None:
    start = now(conn)
    _, key = add_merchant(conn)
    capture(conn, key)
    move_to(conn, end_of(start) + timedelta(hours=1))
    first = close(run, month_of(start))
    capture(conn, key)
    move_to(conn, end_of(start) + timedelta(days=1))
    assert close(run, month_of(start)) == first
    assert said(run("close", "--month", month_of(start))).startswith(f"{month_of(start)} is closed already")
    assert conn.execute("select count(*) from audit.entries where outcome = 'month closed'").fetchone() == (1,)


def test_month_that_is_not_over_or_not_the_next_is_refused(run: Run, conn: Connection) -> None:
    start = now(conn)
    assert "nothing was ever booked" in refused(run("close", "--month", month_of(start, -1)))
    _, key = add_merchant(conn)
    capture(conn, key)
    assert refused(run("close", "--month", month_of(start))).startswith(f"--month: {month_of(start)} isn't over")
    next_one = f"--month: months are closed in their order; the next one is {month_of(start)}"
    assert refused(run("close", "--month", month_of(start, -1))) == next_one
    move_to(conn, end_of(start) + timedelta(minutes=5))
    assert "ten minutes must have passed" in refused(run("close", "--month", month_of(start)))
    move_to(conn, end_of(start, 1) + timedelta(minutes=11))
    assert refused(run("close", "--month", month_of(start, 1))) == next_one
    close(run, month_of(start))
    close(run, month_of(start, 1))
    assert [each["month"] for each in json.loads(said(run("close", "--json")))] == [
        month_of(start), month_of(start, 1)
    ]  # fmt: skip


def test_books_that_do_not_balance_are_not_closed(run: Run, conn: Connection, database: str) -> None:
    start = now(conn)
    _, key = add_merchant(conn)
    capture(conn, key)
    move_to(conn, end_of(start) + timedelta(hours=1))
    with psycopg.connect(harden(database, "deploy")) as owner:
        owner.execute("set session_replication_role = replica")
        owner.execute("select ledger.end_days()")
        owner.execute("select ledger.sum_day()")
        owner.execute(
            "update ledger.daily_balances set balance_minor = balance_minor + 1 where account_id like 'pend%'"
        )
    assert "don't balance in usd" in refused(run("close", "--month", month_of(start)))


@pytest.mark.parametrize("month", ["2027", "2027-13", "2027-1", "27-01", "0000-01", "2027-01-01", "now"])
def test_month_is_named_by_year_and_number(run: Run, month: str) -> None:
    assert refused(run("close", "--month", month)) == "--month: a month such as 2027-01"


def test_closing_needs_its_scope(run: Run, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURETY_OPERATOR_KEY", add_operator(conn, "ann", "support"))
    assert "books:close" in refused(run("close", "--month", "2020-01"))


def test_balances_are_shown_as_of_a_time(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    before = now(conn)
    payment = capture(conn, key)
    between = now(conn) + timedelta(milliseconds=1)
    move_clock(conn, "1 hour")
    settle(conn, payment)

    def shown(*words: str) -> dict[str, int]:
        found = json.loads(said(run("balance", *words, "--json")))
        return {each["account"]: each["balance_minor"] for each in found["balances"]}

    assert shown("--merchant", merchant, "--at", before.isoformat()) == {}
    assert shown("--merchant", merchant, "--at", between.isoformat()) == {"pending": 9625}
    assert shown("--merchant", merchant) == {"pending": 0, "available": 9625}
    assert shown() == {
        "available": 9625, "fee_revenue": 375, "pending": 0, "provider_balance": 9680, "provider_cost": 320,
        "provider_receivable": 0,
    }  # fmt: skip
    text = said(run("balance", "--merchant", merchant, "--at", between.isoformat()))
    assert "pending  96.25 USD" in text
    assert "debit   96.80 USD" in said(run("balance"))
    assert "no postings" in said(run("balance", "--at", "2020-01-01T00:00Z"))
    assert refused(run("balance", "--merchant", "mer_none")) == "--merchant: there is no merchant mer_none"
    assert refused(run("balance", "--at", "2020-01-01")).startswith("--at: a time with its offset")
