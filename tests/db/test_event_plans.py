"""What reading events costs: handlers' claims and merchants' lists walk through few pages of their own index."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from psycopg.errors import Diagnostic

from tests.support.payments import Connection, add_merchant

HANDLER = "apply_webhooks"
TYPE = "webhook.received"


def test_a_claim_reads_a_few_pages_beside_a_hundred_thousand_past_events(conn: Connection) -> None:
    emit_many(conn, 100_000)
    conn.execute("update outbox.handlers set seen = pg_current_snapshot(), goal = null where handler = %s", (HANDLER,))
    emit_many(conn, 3)
    with explained_plans(conn) as plans:
        [(event_ids,)] = conn.execute("select event_ids from outbox.claim_batch(%s, 'w')", (HANDLER,)).fetchall()
    assert len(event_ids) == 3
    assert_reads_few_pages_of(conn, "events_in_commit_order", plans, pages_max=60)


def test_a_list_of_events_reads_a_few_pages_beside_events_of_other_merchants(conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    other, _ = add_merchant(conn)
    emit_many(conn, 20_000, other)
    emit_many(conn, 100, merchant)
    with explained_plans(conn) as plans:
        conn.execute("select body from api.list_events(%s, null, 20)", (key_hash,))
    assert_reads_few_pages_of(conn, "events_of_a_merchant", plans, pages_max=150)


def emit_many(conn: Connection, count: int, merchant: str | None = None) -> None:
    """Emit events in one transaction, about no object."""
    conn.execute(
        "insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, generation, at)"
        " select surety.new_id('evt', now()), 'webhook', 'whk_past', %s, '{}', %s, outbox.current_restore_generation(),"
        " now()"
        " from generate_series(1, %s)",
        (TYPE, merchant, count),
    )
    conn.execute("vacuum analyze outbox.events")


@contextmanager
def explained_plans(conn: Connection, words: str = "pg_visible_in_snapshot") -> Generator[list[dict[str, Any]]]:
    """Collect the plans that have these words: those of statements that walk through events by snapshots."""
    plans: list[dict[str, Any]] = []

    def collect(notice: Diagnostic) -> None:
        message = notice.message_primary or ""
        if words in message and '"Plan"' in message:
            plans.append(json.loads(message[message.index("{") :])["Plan"])

    conn.add_notice_handler(collect)
    conn.execute("load 'auto_explain'")
    for name, value in {
        "auto_explain.log_min_duration": "0",
        "auto_explain.log_analyze": "on",
        "auto_explain.log_buffers": "on",
        "auto_explain.log_nested_statements": "on",
        "auto_explain.log_format": "json",
        "client_min_messages": "log",
    }.items():
        conn.execute("select set_config(%s, %s, false)", (name, value))
    yield plans
    conn.execute("reset client_min_messages")
    conn.remove_notice_handler(collect)


def assert_reads_few_pages_of(conn: Connection, index: str, plans: list[dict[str, Any]], pages_max: int) -> None:
    """Each plan walks through partitions of the index, nothing else of the log but rows by id, and few pages in all."""
    assert plans
    for plan in plans:
        nodes = list(nodes_of(plan))
        scans = [node for node in nodes if node.get("Relation Name", "").startswith("events")]
        walked = [node for node in scans if "pg_visible_in_snapshot" in node.get("Filter", "")]
        assert walked, plan
        assert all(is_partition_of(conn, node["Index Name"], index) for node in walked), walked
        assert all(node in walked or "xid" in node["Index Cond"] or "id = " in node["Index Cond"] for node in scans)
        assert not any(node["Node Type"] == "Seq Scan" and "Relation Name" in node for node in nodes)
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < pages_max


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes_of(inner)


def is_partition_of(conn: Connection, index: str, parent: str) -> bool:
    """Whether an index is that of a partition, or the parent itself."""
    query = "select count(*) from pg_inherits where inhrelid = to_regclass('outbox.' || %s)"
    query += " and inhparent = to_regclass('outbox.' || %s)"
    return conn.execute(query, (index, parent)).fetchone() == (1,)
