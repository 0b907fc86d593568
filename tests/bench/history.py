"""A past for a database: a few payments are lived through the product's own functions, then copied by the thousand.

Copies are rows like any others, in all tables, so that the invariants hold over them too; only events of other things
than payments (webhooks received) are not copied.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.bench.databases import Connection, connection
from tests.support.payments import add_merchant, fact, money, pay, record_results

BENCH_SQL = Path(__file__).parent / "bench.sql"
COPIES_AT_ONCE = 1000
AMOUNT_MINOR = 10_000


def prepare(conn: Connection, merchants: int) -> bytes:
    """The benchmarks' own functions, and merchants; returns the hash of the key of one of them."""
    conn.execute(BENCH_SQL.read_bytes())
    for number in range(merchants):
        _, key_hash = add_merchant(conn, name=f"Merchant {number}")
    return key_hash


def create_submitted_payment(conn: Connection, key_hash: bytes) -> str:
    """The id of a payment that was submitted to the provider and not confirmed."""
    (payment_id,) = pay(conn, key_hash, reference="submitted", amount=AMOUNT_MINOR, metadata={"cart": "9"})
    record_call(conn, "submit", "create", [fact(payment_id, "submitted", "pi", source="response")])
    return payment_id


def create_settled_payment(conn: Connection, key_hash: bytes) -> str:
    """The id of a payment that went all the way: two calls, a webhook, money that became available."""
    (payment_id,) = pay(conn, key_hash, reference="settled", amount=AMOUNT_MINOR, metadata={"cart": "9"})
    record_call(conn, "submit", "create", [fact(payment_id, "submitted", "pi", source="response")])
    captured = fact(payment_id, "captured", "ch", AMOUNT_MINOR, source="response")
    record_call(conn, "confirm", "confirm", [captured])
    webhook = {
        "n": 0, "provider": "stripe", "account": "", "livemode": False, "event_id": f"evt_{payment_id}",
        "type": "payment_intent.succeeded", "headers": {}, "body": json.dumps({"id": payment_id}),
    }  # fmt: skip
    conn.execute("select n, is_new from surety.receive_webhooks(%s)", (json.dumps([webhook]),))
    row = conn.execute("select max(id) from surety.provider_events").fetchone()
    assert row is not None
    output = fact(payment_id, "processing", "pi", source="webhook", source_id=row[0])
    paid = money(payment_id, "txn", "charge", AMOUNT_MINOR, 320)
    available = fact(payment_id, "available", "txn", AMOUNT_MINOR, data=paid["data"])
    for facts in ([output], [paid], [available]):
        conn.execute("select surety.record_facts(%s, 'system:poll')", (json.dumps(facts),))
    conn.execute("select surety.expect_settlement(%s, %s, %s)", claim_next(conn, "expect_settlement"))
    conn.execute("select surety.meet_expected_settlement(%s, %s, %s)", claim_next(conn, "meet_settlement"))
    return payment_id


def record_call(conn: Connection, handler: str, operation: str, facts: list[dict[str, Any]]) -> None:
    """A call to the provider as a worker makes it, answered by these facts."""
    batch_id, fence, event_ids = claim_next(conn, handler)
    conn.execute("select * from surety.begin_calls(%s, %s, %s, 'worker:bench')", (batch_id, fence, operation))
    result = {
        "event_id": event_ids[-1], "payment_id": facts[0]["payment_id"], "operation": operation, "status": 200,
        "outcome": "answered", "duration_ms": 87.5, "facts": facts,
        "snapshot": {"id": facts[0]["object_id"], "object": "payment_intent", "amount": AMOUNT_MINOR},
    }  # fmt: skip
    others = [{"event_id": event_id} for event_id in event_ids[:-1]]
    record_results(conn, batch_id, fence, [*others, result], actor="worker:bench")


def claim_next(conn: Connection, handler: str) -> tuple[int, int, list[str]]:
    """The next batch of a handler."""
    row = conn.execute(
        "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'worker:bench')", (handler,)
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def copy_payments(url: str, payment_id: str, count: int, *, days_ago: int, first: int = 0) -> None:
    """Copies of a payment, a millisecond apart, numbered from `first`, by two connections; needs a superuser."""
    begin, end = datetime.now(UTC) - timedelta(days=days_ago), first + count
    parts = [(number, min(number + COPIES_AT_ONCE, end) - 1) for number in range(first, end, COPIES_AT_ONCE)]

    def copy(shares: list[tuple[int, int]]) -> None:
        with connection(url) as conn:
            conn.execute("set session_replication_role = replica")
            conn.execute("set synchronous_commit = off")
            for share in shares:
                conn.execute("select bench.copy_payments(%s, %s, %s, %s)", (payment_id, *share, begin))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(copy, (parts[::2], parts[1::2])))


def finish_copies(url: str) -> None:
    """Accounts, balances, statistics and a checkpoint, as a database has them that did not come into being just now."""
    with connection(url) as conn:
        conn.execute("select bench.open_copied_accounts()")
        conn.execute("vacuum (analyze)")
        conn.execute("checkpoint")


def skip_existing_events(conn: Connection) -> None:
    """Let all handlers have taken whatever was committed so far."""
    conn.execute("update outbox.handlers set seen = pg_current_snapshot(), goal = null, at_xid = '0', at_id = ''")
