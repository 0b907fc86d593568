"""Reports of the provider compared with our records: every difference, and every row that breaks a rule, is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from db.formats.amounts import Unreadable, minor_units
from tests.cash.test_bank_statements import payout
from tests.cli.conftest import Run, refused, run, said
from tests.support.payments import Connection

__all__ = ["run"]

COLUMNS = (
    "balance_transaction_id", "created_utc", "currency", "gross", "fee", "net", "reporting_category", "new_column",
    "automatic_payout_id",
)  # fmt: skip
Row = dict[str, str]


def book(conn: Connection, count: int) -> list[Row]:
    """Record fees of our own account, which need no payment; returns the rows that a report has of them."""
    facts = [
        {
            "provider": "stripe", "account": "", "livemode": False, "object_id": f"txn_{n:04}", "kind": "money",
            "amount_minor": -(1000 + n), "currency": "usd", "source": "poll",
            "occurred_at": f"2026-11-02T10:{n // 60 % 60:02}:{n % 60:02}Z",
            "data": {"category": "fee", "fee": 0, "net": -(1000 + n)},
        }
        for n in range(count)
    ]  # fmt: skip
    conn.execute("select surety.record_facts(%s, 'test')", (Jsonb(facts),))
    return [
        {
            "balance_transaction_id": f"txn_{n:04}", "created_utc": f"2026-11-02 10:{n // 60 % 60:02}:{n % 60:02}",
            "currency": "usd", "gross": f"-{10 + n // 100}.{n % 100:02}", "fee": "0.00",
            "net": f"-{10 + n // 100}.{n % 100:02}", "reporting_category": "fee", "new_column": "x",
            "automatic_payout_id": "",
        }
        for n in range(count)
    ]  # fmt: skip


class Reports:
    """Compares rows as files of increasing numbers."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder, self.count = run, folder, 0

    def write(self, rows: list[Row], delimiter: str = ",") -> str:
        self.count += 1
        path = self.folder / f"balance_change_{self.count}.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)
        return str(path)

    def __call__(self, rows: list[Row], *options: str, delimiter: str = ",") -> dict[str, Any]:
        path = self.write(rows, delimiter)
        shown = json.loads(said(self.run("reconcile", "--file", path, *options, "--json")))
        return shown or {}


@pytest.fixture
def reports(run: Run, tmp_path: Path) -> Reports:
    return Reports(run, tmp_path)


def counts(done: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Rows, differences, unknown here, absent there, refused."""
    names = ("row_count", "difference_count", "missing_here_count", "missing_at_provider_count", "refused_count")
    rows, different, here, there, wrong = (done[name] for name in names)
    return rows, different, here, there, wrong


def test_equal_records_differ_in_nothing_whatever_the_separators(conn: Connection, reports: Reports) -> None:
    rows = book(conn, 20)
    assert counts(reports(rows)) == (20, 0, 0, 0, 0)
    commas = [row | {name: row[name].replace(".", ",") for name in ("gross", "fee", "net")} for row in rows]
    assert counts(reports(commas, delimiter=";")) == (20, 0, 0, 0, 0)
    assert counts(reports(commas, "--decimal", ",", delimiter="\t")) == (20, 0, 0, 0, 0)


def test_each_difference_names_its_field_and_both_values(conn: Connection, reports: Reports, run: Run) -> None:
    rows = book(conn, 10)
    rows[1] |= {"gross": "-11.02", "net": "-11.02"}
    rows[2] |= {"fee": "1.00", "net": "-11.02"}
    rows[3] |= {"currency": "eur"}
    rows[4] |= {"reporting_category": "tax"}
    rows[5] |= {"balance_transaction_id": "txn_unknown"}
    output = reports.folder / "differences.csv"
    done = reports(rows, "--output", str(output))
    assert counts(done) == (10, 4, 1, 1, 0)
    found = conn.execute(
        "select kind, replace(subject, ':report', ''), fields -> 0 ->> 'field', fields -> 0 ->> 'here',"
        " fields -> 0 ->> 'there' from surety.discrepancies where closed_at is null order by subject"
    ).fetchall()
    assert found == [
        ("amount", "txn_0001", "gross", "-1001", "-1102"),
        ("fee", "txn_0002", "fee", "0", "100"),
        ("currency", "txn_0003", "currency", "usd", "eur"),
        ("category", "txn_0004", "category", "fee", "tax"),
        ("missing_at_provider", "txn_0005", "net", "-1005", None),
        ("missing_here", "txn_unknown", "balance transaction", None, "txn_unknown"),
    ]
    with output.open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["line"] for row in written if row["subject"] == "txn_0001"] == ["3", "3"]
    assert f"{done['id']}  balance_change_1.csv: 10 rows" in said(run("reconcile", "--show", done["id"]))


def test_a_later_report_that_agrees_closes_the_differences(conn: Connection, reports: Reports) -> None:
    rows = book(conn, 5)
    reports([rows[0], rows[1] | {"gross": "-99.00", "net": "-99.00"}, *rows[3:]])
    still_open = "select kind from surety.discrepancies where closed_at is null order by kind"
    assert conn.execute(still_open).fetchall() == [("amount",), ("missing_at_provider",)]
    reports(rows)
    assert conn.execute(still_open).fetchall() == []


def test_a_report_that_was_compared_changes_nothing(conn: Connection, reports: Reports) -> None:
    rows = book(conn, 3)
    rows[0]["net"] = "1"
    assert counts(reports(rows))[4] == 1
    assert reports(rows) == {}
    assert conn.execute("select count(*) from surety.refused_report_rows").fetchone() == (1,)
    assert conn.execute("select count(*) from surety.staged_report_rows").fetchone() == (0,)


WRONG: tuple[tuple[str, str], ...] = (
    ("gross", "12.345"),
    ("gross", "abc"),
    ("gross", ""),
    ("fee", "1.234"),
    ("fee", "--1"),
    ("net", "99.99"),
    ("net", "1,2,3"),
    ("currency", "us"),
    ("created_utc", "yesterday"),
    ("reporting_category", "=HYPERLINK(1)"),
)


def test_of_two_hundred_planted_lines_exactly_these_are_named(conn: Connection, reports: Reports) -> None:
    rows = book(conn, 1000)
    planted = []
    for number in range(200):
        column, value = WRONG[number % len(WRONG)]
        rows[number * 5][column] = value
        planted.append((number * 5 + 2, column, value))
    output = reports.folder / "refused.csv"
    assert counts(reports(rows, "--output", str(output))) == (800, 0, 0, 0, 200)
    named = conn.execute("select line, field, value from surety.refused_report_rows order by line").fetchall()
    assert named == planted
    cells = list(csv.reader(output.read_text(encoding="utf-8").splitlines()))
    assert [cell for row in cells for cell in row if "HYPERLINK" in cell] == ["'=HYPERLINK(1)"] * 20


def test_a_repeated_id_and_a_short_row_are_refused(conn: Connection, reports: Reports) -> None:
    rows = book(conn, 3)
    path = Path(reports.write([*rows, rows[1]]))
    path.write_text(path.read_text(encoding="utf-8-sig") + "txn_1,2\n", encoding="utf-8")
    said(reports.run("reconcile", "--file", str(path)))
    named = conn.execute("select line, field, rule from surety.refused_report_rows order by line").fetchall()
    assert named == [
        (5, "balance_transaction_id", "an id stands once; this one stands in line 3"),
        (6, "row", "a row has 9 columns"),
    ]


def test_a_file_that_is_no_report_is_refused_by_its_columns(conn: Connection, reports: Reports, run: Run) -> None:
    path = reports.write([{"balance_transaction_id": "txn_1", "gross": "1"}])
    message = refused(run("reconcile", "--file", path))
    assert "created_utc, currency, fee, net, reporting_category" in message
    assert conn.execute("select count(*) from surety.report_files").fetchone() == (0,)
    assert "give a report by --file" in refused(run("reconcile"))


def test_payouts_are_compared_with_status_trace_id_and_arrival(conn: Connection, reports: Reports) -> None:
    payout(conn, "po_1", 9680, trace="T1")
    payout(conn, "po_2", 500)
    payout(conn, "po_3", 700)
    rows = [
        {
            "payout_id": name, "effective_at_utc": "2026-11-20 00:00:00", "currency": "eur", "gross": gross,
            "fee": "0", "net": gross, "reporting_category": "payout", "payout_status": status, "trace_id": trace,
            "payout_expected_arrival_date": "2026-11-20",
        }
        for name, gross, status, trace in (
            ("po_1", "-96.80", "paid", "T1"), ("po_2", "-5.01", "failed", ""), ("po_4", "-1.00", "paid", "")
        )
    ]  # fmt: skip
    assert counts(reports(rows)) == (3, 1, 1, 1, 0)
    found = conn.execute(
        "select kind, subject, jsonb_path_query_array(fields, '$[*].field')::text from surety.discrepancies"
        " where subject like '%:report' order by subject"
    ).fetchall()
    assert found == [
        ("amount", "po_2:report", '["amount", "status"]'),
        ("missing_at_provider", "po_3:report", '["net"]'),
        ("missing_here", "po_4:report", '["payout"]'),
    ]


def test_a_payout_reconciliation_report_lacks_a_balance_transaction(conn: Connection, reports: Reports) -> None:
    rows = book(conn, 3)
    payout(conn, "po_1", 100)
    lines = [{"id": row["balance_transaction_id"], "category": "fee", "net": -1, "currency": "usd"} for row in rows]
    conn.execute("select surety.record_payout_lines('', 'po_1', %s)", (Jsonb(lines),))
    shown = [row | {"automatic_payout_id": "po_1"} for row in rows[:2]]
    shown[1]["automatic_payout_id"] = "po_2"
    assert counts(reports(shown, "--kind", "payout-reconciliation")) == (2, 1, 0, 1, 0)


@pytest.mark.parametrize(
    ("text", "currency", "minor"),
    [
        ("1,234.50", "usd", 123450), ("1.234,50", "usd", 123450), ("-0,05", "eur", -5), ("12.5", "usd", 1250),
        ("1234", "jpy", 1234), ("1,234,567", "jpy", 1234567), ("1.234", "kwd", 1234), ("12.00", "jpy", 12),
        ("1 234,50", "sek", 123450), ("\N{MINUS SIGN}3", "usd", -300),
    ],
)  # fmt: skip
def test_amounts_are_read_with_either_separator(text: str, currency: str, minor: int) -> None:
    assert minor_units(text, currency) == minor


@pytest.mark.parametrize(
    ("text", "currency"),
    [
        ("1.234", "usd"),
        ("1,234", "jpy"),
        ("1.2.3", "usd"),
        ("1.23", "jpy"),
        ("", "usd"),
        ("1e3", "usd"),
        ("9" * 20, "usd"),
    ],
)
def test_ambiguous_amounts_are_refused(text: str, currency: str) -> None:
    with pytest.raises(Unreadable):
        minor_units(text, currency)
