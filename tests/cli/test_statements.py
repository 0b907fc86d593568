"""`surety statement`: opening balances, lines and closing balances tie, for any history."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections import Counter
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from db.connect import harden
from tests.cli.conftest import Run, refused, said
from tests.cli.test_closing import capture, close, end_of, month_of, move_to, settle
from tests.db.test_balances_at import live_through, merchant_balances, now, sum_days
from tests.db.test_partitions import move_clock
from tests.support.payments import Connection, add_merchant, fact, money, pay, record

RECORDED_AT = "2026-11-20T00:00:00Z"


def statement(run: Run, merchant: str, month: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(
        said(run("statement", "--merchant", merchant, "--month", month, "--format", "json"))
    )
    return shown


def totals(shown: dict[str, Any], side: str) -> Counter[tuple[str, str]]:
    return Counter(
        {(each["currency"], kind): amount for each in shown["balances"] for kind, amount in each[side].items()}
    )


@pytest.mark.parametrize("seed", range(5))
def test_lines_between_any_two_times_lead_from_one_balance_to_the_other(conn: Connection, seed: int) -> None:
    chance = random.Random(seed)
    merchant, key = add_merchant(conn)
    _, neighbour = add_merchant(conn)
    times, hours = [now(conn)], 0
    for _ in range(12):
        hours += chance.choice((0, 1, 30, 200))
        move_clock(conn, f"{hours} hours")
        live_through(conn, chance.choice((key, key, neighbour)), chance, chance.choice(("usd", "eur", "jpy")))
        times.append(now(conn) + timedelta(milliseconds=chance.randrange(2)))
        if chance.random() < 0.3:
            sum_days(conn)
    times.sort()
    for _ in range(10):
        start, end = sorted(chance.sample(times, 2))
        moved: Counter[str] = Counter(merchant_balances(conn, merchant, start))
        after = ""
        while page := conn.execute(
            "select posting_id, currency, changes, gross_minor, fee_minor, net_minor"
            " from ledger.statement_lines(%s, %s, %s, %s, 3)",
            (merchant, start, end, after),
        ).fetchall():
            after = page[-1][0]
            for _, currency, changes, gross, fee, net in page:
                assert gross + fee == net == sum(changes.values())
                moved.update({f"{kind}:{merchant}:{currency}": amount for kind, amount in changes.items()})
        closing = merchant_balances(conn, merchant, end)
        assert {account: total for account, total in moved.items() if total} == {
            account: total for account, total in closing.items() if total
        }


def test_late_facts_are_adjustments_in_the_next_statement(run: Run, conn: Connection) -> None:
    start = now(conn)
    merchant, key = add_merchant(conn)
    payment, late = capture(conn, key), pay(conn, key)[0]
    move_to(conn, end_of(start) + timedelta(hours=1))
    close(run, month_of(start))
    first = statement(run, merchant, month_of(start))
    # The provider's records are of the closed month.
    settle(conn, payment)
    charge = money(late, "txn", "charge", 10000, 320, data={"source": f"ch_{late[-12:]}"})
    in_the_month = (start + timedelta(seconds=1)).isoformat()
    record(
        conn,
        [
            fact(late, "submitted", "pi", 10000),
            fact(late, "captured", "ch", 10000),
            charge | {"occurred_at": in_the_month},
        ],
    )
    assert statement(run, merchant, month_of(start)) == first
    assert [line["adjusts"] for line in first["lines"]] == [None]
    move_to(conn, end_of(start, 1) + timedelta(hours=1))
    close(run, month_of(start, 1))
    second = statement(run, merchant, month_of(start, 1))
    assert {(line["type"], line["payment"], line["adjusts"]) for line in second["lines"]} == {
        ("settled", payment, None),
        ("captured", late, month_of(start)),
    }
    assert totals(second, "opening") == totals(first, "closing")
    moved = totals(second, "opening")
    for line in second["lines"]:
        moved.update({(line["currency"], kind): amount for kind, amount in line["changes"].items()})
    assert moved == totals(second, "closing")
    assert (first["status"], second["status"]) == ("closed", "closed")


def test_csv_has_amounts_in_major_units_of_each_currency(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    for currency, amount in (("usd", 10000), ("jpy", 10000), ("kwd", 10000)):
        [payment] = pay(conn, key, currency=currency, reference=f"order-{currency}", amount=amount)
        record(conn, [fact(payment, "captured", "ch", amount, currency=currency)])
    move_clock(conn, "1 second")
    text = said(run("statement", "--merchant", merchant, "--month", month_of(now(conn))))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["type"] for row in rows] == ["opening_balance"] * 3 + ["captured"] * 3 + ["closing_balance"] * 3
    shown = {row["currency"]: (row["gross"], row["fee"], row["net"]) for row in rows if row["type"] == "captured"}
    assert shown == {
        "USD": ("100.00", "-3.75", "96.25"),
        "JPY": ("10000", "-385", "9615"),
        "KWD": ("10.000", "-0.450", "9.550"),
    }
    closing = {row["currency"]: Decimal(row["balance"]) for row in rows if row["type"] == "closing_balance"}
    assert closing == {"USD": Decimal("96.25"), "JPY": Decimal(9615), "KWD": Decimal("9.550")}
    assert all(row["pending"] == row["balance"] for row in rows if row["type"] != "opening_balance")


@pytest.mark.parametrize("reference", ["=1+1", "+1", "-1", "@SUM(A1)", " =1+1"])
def test_no_text_of_a_csv_is_a_formula(run: Run, conn: Connection, reference: str) -> None:
    merchant, key = add_merchant(conn)
    [payment] = pay(conn, key, reference=reference)
    record(conn, [fact(payment, "captured", "ch", 10000)])
    move_clock(conn, "1 second")
    text = said(run("statement", "--merchant", merchant, "--month", month_of(now(conn))))
    [row] = [row for row in csv.DictReader(io.StringIO(text)) if row["payment"] == payment]
    assert row["reference"] == f"'{reference}"


def test_reference_with_quotes_and_separators_stays_one_cell(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    reference = 'a "b", c; d'
    [payment] = pay(conn, key, reference=reference)
    record(conn, [fact(payment, "captured", "ch", 10000)])
    move_clock(conn, "1 second")
    text = said(run("statement", "--merchant", merchant, "--month", month_of(now(conn))))
    assert [row["reference"] for row in csv.DictReader(io.StringIO(text)) if row["payment"]] == [reference]


def test_statement_that_does_not_tie_is_not_written(run: Run, conn: Connection, database: str, tmp_path: Path) -> None:
    start = now(conn)
    merchant, key = add_merchant(conn)
    capture(conn, key)
    move_to(conn, end_of(start) + timedelta(hours=1))
    sum_days(conn)
    with psycopg.connect(harden(database, "deploy")) as owner:
        owner.execute("set session_replication_role = replica")
        owner.execute(
            "update ledger.daily_balances set balance_minor = balance_minor + 1 where account_id like 'pend%'"
        )
    path = tmp_path / "statement.csv"
    words = ("statement", "--merchant", merchant, "--month", month_of(start), "--output", str(path))
    assert "does not tie" in refused(run(*words))
    assert list(tmp_path.iterdir()) == []


def test_pdf_is_written_for_names_of_every_script(run: Run, conn: Connection, tmp_path: Path) -> None:
    merchant, key = add_merchant(conn, name="Кафе Ωmega #set $x$ \\")
    [payment] = pay(conn, key, reference='#panic("no") *b* $')
    record(conn, [fact(payment, "captured", "ch", 10000)])
    move_clock(conn, "1 second")
    path = tmp_path / "statement.pdf"
    words = ("statement", "--merchant", merchant, "--month", month_of(now(conn)), "--output", str(path))
    assert said(run(*words)) == ""
    assert path.read_bytes().startswith(b"%PDF-")


def test_pdf_without_its_library_or_of_too_many_lines_is_refused(
    run: Run, conn: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merchant, key = add_merchant(conn)
    capture(conn, key)
    capture(conn, key)
    move_clock(conn, "1 second")
    words = ("statement", "--merchant", merchant, "--month", month_of(now(conn)), "--output", str(tmp_path / "s.pdf"))
    monkeypatch.setattr("app.statements.pdf.LINES_MAX", 1)
    assert "more than 1 lines; choose csv or json" in refused(run(*words))
    monkeypatch.setitem(sys.modules, "typst", None)
    assert "pip install 'surety[pdf]'" in refused(run(*words))
    assert list(tmp_path.iterdir()) == []


def test_statement_of_no_merchant_month_or_directory_is_refused(run: Run, conn: Connection, tmp_path: Path) -> None:
    merchant, _ = add_merchant(conn)
    this_month = month_of(now(conn))
    assert refused(run("statement", "--merchant", "mer_none", "--month", this_month)) == (
        "--merchant: there is no merchant mer_none"
    )
    assert refused(run("statement", "--merchant", merchant, "--month", "2999-01")) == "--month: 2999-01 has not begun"
    missing = tmp_path / "none" / "s.csv"
    words = ("statement", "--merchant", merchant, "--month", this_month, "--output", str(missing))
    assert refused(run(*words)).startswith(f"--output: {missing} can't be written")
    assert statement(run, merchant, this_month)["lines"] == []
