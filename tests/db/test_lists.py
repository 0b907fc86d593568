"""The merchants' lists of payments and events: what each filter shows, and what a page costs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.payments import Connection, add_merchant, fact, pay, record


@pytest.fixture
def key_hash(conn: Connection) -> bytes:
    return add_merchant(conn)[1]


def one(conn: Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def pages_read(conn: Connection, query: str, *values: Any) -> int:
    conn.execute(query.encode(), values)  # reads the catalog
    [plan] = one(conn, "explain (analyze, buffers, format json) " + query, *values)
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


def listed_ids(conn: Connection, key_hash: bytes, **asked: Any) -> list[str]:
    order = ("state", "status", "reference", "created_from", "created_before", "limit", "starting_after")
    values = [({"limit": 20} | asked).get(name) for name in order]
    body = one(conn, "select body from api.list_payments(%s, %s, %s, %s, %s, %s, %s, %s)", key_hash, *values)
    return [payment["id"] for payment in json.loads(body)["data"]]


def test_payment_page_cost_is_independent_of_other_merchants(conn: Connection, key_hash: bytes) -> None:
    mine = pay(conn, key_hash, 3, reference=None)
    [ordered] = pay(conn, key_hash, reference="order-1")
    _, other = add_merchant(conn)
    theirs = pay(conn, other, 4000)
    for analyzed in (False, True):
        if analyzed:
            conn.execute("analyze surety.payments")
        query = "select * from api.list_payments(%s, %s, null, %s, null, null, 20, %s)"
        assert pages_read(conn, query, key_hash, None, None, None) < 200
        assert pages_read(conn, query, key_hash, "failed", None, None) < 200
        assert pages_read(conn, query, other, None, "order-1", None) < 200
        assert pages_read(conn, query, other, "canceled", None, None) < 200
        by_status = "select * from api.list_payments(%s, null, %s, null, null, null, 20, null)"
        assert pages_read(conn, by_status, other, "canceled") < 200
        assert pages_read(conn, by_status, other, "failed") < 400
        assert pages_read(conn, query, other, None, None, sorted(theirs)[30]) < 400
    assert sorted(listed_ids(conn, key_hash)) == sorted([*mine, ordered])
    assert listed_ids(conn, key_hash, reference="order-1") == [ordered]


def test_every_filter_of_the_list_holds_alone_and_together(conn: Connection, key_hash: bytes) -> None:
    first, second, third = sorted(pay(conn, key_hash, 3))
    record(conn, [fact(second, "captured", "ch", 10000)])
    now = datetime.now(UTC)
    for asked, expected in (
        ({}, [third, second, first]),
        ({"limit": 2}, [third, second]),
        ({"starting_after": second}, [first]),
        ({"state": "confirmed"}, [second]),
        ({"status": "succeeded"}, [second]),
        ({"state": "confirmed", "status": "pending"}, []),
        ({"state": "confirmed", "starting_after": second}, []),
        ({"created_from": now - timedelta(hours=1)}, [third, second, first]),
        ({"created_from": now + timedelta(hours=1)}, []),
        ({"created_before": now + timedelta(hours=1), "limit": 1}, [third]),
        ({"created_before": now - timedelta(hours=1)}, []),
        ({"created_before": datetime(1960, 1, 1, tzinfo=UTC)}, []),
        ({"created_from": datetime(1960, 1, 1, tzinfo=UTC)}, [third, second, first]),
        ({"reference": "order-2"}, []),
    ):
        assert listed_ids(conn, key_hash, **asked) == expected, asked


def test_internal_events_are_hidden_from_merchants(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "action", "pi"), fact(payment_id, "attempt_failed", "pi")])
    conn.execute("select surety.emit_expired_actions(interval '-1 second')")
    body = json.loads(one(conn, "select body from api.list_events(%s, null, 20)", key_hash))
    assert {event["type"] for event in body["data"]} == {
        f"payment.{state}" for state in ("initiated", "submitting", "provider_submitted", "requires_action")
    }
    assert all(event["created_at"] and event["data"]["state"] for event in body["data"])
