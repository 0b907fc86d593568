"""`trace`: the duration of a payment's whole trace in a database of many.

Random payments are traced by surety.trace_payment, which the command line and auditors use, and by api.get_trace, whose
answer is the HTTP endpoint's document. The first round only warms up.
"""

from __future__ import annotations

import json
import random
import time
from contextlib import ExitStack

from tests.bench import history
from tests.bench.databases import (
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    percentile,
    server,
)


def run(*, entries: int, traces: int, merchants: int, rounds: int, seed: int) -> Results:
    """`traces` random traces of each kind in each round, in a database of as many audit entries."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(server())))
        conn = stack.enter_context(connection(url))
        payment_id = history.create_settled_payment(conn, history.prepare(conn, merchants))
        output = len(conn.execute("select at from surety.trace_payment(%s)", (payment_id,)).fetchall())
        audited = count_audit_entries(conn, payment_id)
        history.copy_payments(url, payment_id, -(-entries // audited), days_ago=20)
        history.finish_copies(url)
        payments = conn.execute(
            "select p.id, k.hash from surety.payments as p join surety.api_keys as k on k.merchant_id = p.merchant_id"
        ).fetchall()
        held = count_audit_entries(conn)
        log_progress(f"{held:,} audit entries, {len(payments):,} payments, {output} lines about each")
        chance = random.Random(seed)
        by_sql: list[list[float]] = []
        by_api: list[list[float]] = []
        for turn in range(rounds + 1):
            asked = chance.choices(payments, k=traces)
            by_sql.append([time_sql_trace(conn, payment[0], output) for payment in asked])
            by_api.append([time_api_trace(conn, payment[1], payment[0], output) for payment in asked])
            log_progress(
                f"round {turn}: p99 {percentile(by_sql[-1], 0.99):.2f} ms, {percentile(by_api[-1], 0.99):.2f} ms"
            )
    results = {
        f"{name}_ms_{way}": median([percentile(times, share) for times in rounds_of[1:]], 2)
        for way, rounds_of in (("sql", by_sql), ("api", by_api))
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {
        "benchmark": "trace",
        "p99_ms": max(results["p99_ms_sql"], results["p99_ms_api"]),
        **results,
        "audit_entries": held,
        "payments": len(payments),
        "lines_per_trace": output,
    }


def count_audit_entries(conn: Connection, payment_id: str | None = None) -> int:
    """How many there are, of one payment or at all."""
    row = conn.execute(
        "select count(*) from audit.entries where %(id)s::text is null or payment_id = %(id)s", {"id": payment_id}
    ).fetchone()
    assert row is not None
    return int(row[0])


def time_sql_trace(conn: Connection, payment_id: str, lines: int) -> float:
    """Milliseconds until all lines of a payment's trace have come."""
    began = time.perf_counter()
    rows = conn.execute(
        "select at, kind, actor, summary, from_state, to_state, outcome, duration_ms, data"
        " from surety.trace_payment(%s)",
        (payment_id,),
    ).fetchall()
    took = time.perf_counter() - began
    assert len(rows) == lines
    return took * 1000


def time_api_trace(conn: Connection, key_hash: bytes, payment_id: str, lines: int) -> float:
    """Milliseconds until the document has come."""
    began = time.perf_counter()
    row = conn.execute("select merchant_id, body from api.get_trace(%s, %s)", (key_hash, payment_id)).fetchone()
    took = time.perf_counter() - began
    assert row is not None
    assert len(json.loads(row[1])["entries"]) == lines
    return took * 1000
