"""Reconciliation of a report of the provider with planted mistakes on either side: missed and invented differences.

Costs are CPU seconds of this process and of its PostgreSQL backend.
"""

from __future__ import annotations

import csv
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.imports.provider_reports import ReportOptions, compare_report
from tests.bench import databases, history
from tests.bench.cpu_time import read_processes
from tests.bench.scale import create_past
from tests.support.payments import fact, record

Connection = databases.Connection

COLUMNS = ("balance_transaction_id", "created_utc", "currency", "gross", "fee", "net", "reporting_category")
MISTAKES = ("amount", "fee", "currency", "category", "missing_here", "missing_at_provider")
READ_MONEY = """
    select object_id, occurred_at, currency, amount_minor, (data ->> 'fee')::bigint, data ->> 'category'
    from surety.facts where kind = 'money' order by object_id
"""


def run(payments: int, small: int, planted: int, probes: int) -> dict[str, Any]:
    """The results for a database of so many payments, and the cost of a row beside that in a small one."""
    with databases.server() as server_url:
        first = measure(server_url, small, min(planted, small // 2), probes=0)
        results = measure(server_url, payments, planted, probes)
    return {
        "benchmark": "reconcile",
        **results,
        "missed": results["missed"] + first["missed"],
        "invented": results["invented"] + first["invented"],
        "flatness": round(results["rows_per_second"] / first["rows_per_second"], 3),
    }


def measure(server_url: str, payments: int, planted: int, probes: int) -> dict[str, Any]:
    """One report over so many payments."""
    with databases.deployed_database(server_url) as url, databases.connection(url) as conn:
        create_past(conn, url, payments)
        conn.execute("vacuum analyze")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "balance_change.csv"
            expected = write_report(conn, path, planted)
            began, memory = cpu_of(conn), peak_mb()
            with conn.transaction():
                done = compare_report(conn, path, ReportOptions(), "bench")
            cost, growth = cpu_of(conn) - began, peak_mb() - memory
        assert done is not None
        found = {
            (kind, subject.removesuffix(":report"))
            for kind, subject in conn.execute("select kind, subject from surety.discrepancies where closed_at is null")
        }
        return {
            "payments": payments,
            "rows": done["row_count"],
            "planted": len(expected),
            "missed": len(expected - found),
            "invented": len(found - expected),
            "rows_per_second": round(done["row_count"] / cost),
            "growth_mb": round(growth, 1),
            **(flag_delays(conn, probes) if probes else {}),
        }


def write_report(conn: Connection, path: Path, planted: int) -> set[tuple[str, str]]:
    """Write a report of all money with so many mistakes; returns their kinds and balance transactions."""
    expected: set[tuple[str, str]] = set()
    row = conn.execute("select count(*) from surety.facts where kind = 'money'").fetchone()
    assert row is not None
    every = max(1, row[0] // planted)
    with path.open("w", encoding="utf-8", newline="") as file, conn.transaction(), conn.cursor("money") as cursor:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, money in enumerate(cursor.execute(READ_MONEY)):
            mistake = None
            if number % every == 0 and len(expected) < planted:
                mistake = MISTAKES[len(expected) % len(MISTAKES)]
                expected.add((mistake, f"txn_unknown{number}" if mistake == "missing_here" else money[0]))
            for line in lines_of(money, mistake, number):
                writer.writerow(line)
    return expected


def lines_of(money: tuple[Any, ...], mistake: str | None, number: int) -> Iterator[tuple[str, ...]]:
    """The report's rows for a balance transaction with a mistake: none, one, or another's beside it."""
    id, at, currency, gross, fee, category = money
    match mistake:
        case "missing_at_provider":
            return
        case "missing_here":
            yield row_of(f"txn_unknown{number}", at, currency, gross, fee, category)
        case "amount":
            gross += 1
        case "fee":
            fee += 1
        case "currency":
            currency = "eur"
        case "category":
            category = "tax"
    yield row_of(id, at, currency, gross, fee, category)


def row_of(id: str, at: datetime, currency: str, gross: int, fee: int, category: str) -> tuple[str, ...]:
    """A row in major units of a currency with two decimals."""
    amounts = (f"{amount / 100:.2f}" for amount in (gross, fee, gross - fee))
    return (id, f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}", currency, *amounts, category)


def flag_delays(conn: Connection, probes: int) -> dict[str, Any]:
    """Milliseconds from the recording of contradicting facts to the open discrepancy, as another session sees it."""
    ids = [
        row[0]
        for row in conn.execute("select payment_id from surety.facts where kind = 'captured' limit %s", (probes,))
    ]
    delays = []
    for payment_id in ids:
        row = conn.execute(
            "select object_id from surety.facts where kind = 'captured' and payment_id = %s", (payment_id,)
        ).fetchone()
        assert row is not None
        contradicting = fact(payment_id, "captured", "ch", history.AMOUNT_MINOR + 1) | {"object_id": row[0]}
        began = time.perf_counter()
        record(conn, [contradicting])
        query = "select count(*) from surety.discrepancies where payment_id = %s and closed_at is null"
        seen = conn.execute(query, (payment_id,)).fetchone()
        delays.append((time.perf_counter() - began) * 1000)
        assert seen is not None
        assert seen[0] >= 1, f"{payment_id} is not flagged"
    return {"probes": len(delays), "flag_delay_p99_ms": round(databases.percentile(sorted(delays), 0.99), 2)}


def cpu_of(conn: Connection) -> float:
    """CPU seconds of this process and of the connection's backend so far."""
    return time.process_time() + read_processes()[conn.info.backend_pid].own


def peak_mb() -> float:
    """The peak of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
