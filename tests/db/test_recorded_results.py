"""Results of several batches and polls in one transaction: each keeps what it would have been alone."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from db.connect import harden
from tests.db.test_event_plans import explained_plans, nodes_of
from tests.db.test_races import waits
from tests.support.payments import Connection, add_merchant, fact, pay, violations
from tests.support.sandbox_process import eventually

NO_AMOUNT = [{"field": "record", "here": None, "there": "amount"}]


@pytest.fixture
def key_hash(conn: Connection) -> bytes:
    return add_merchant(conn)[1]


def record_group(conn: Connection, *results: dict[str, Any]) -> None:
    conn.execute("select surety.record_results('worker:w', %s)", (json.dumps(results),))


def test_each_payments_steps_name_the_source_of_its_own_facts(conn: Connection, key_hash: bytes) -> None:
    payments = pay(conn, key_hash, 3)
    sources = dict(zip(payments, ("webhook", "response", "poll"), strict=True))
    facts = [fact(payment_id, "captured", "ch", 10000, source=source) for payment_id, source in sources.items()]
    record_group(conn, *({"facts": [one]} for one in facts))
    query = "select distinct payment_id, cause from surety.steps where to_state <> 'initiated'"
    assert dict(conn.execute(query).fetchall()) == sources


def test_each_refund_made_at_the_provider_names_the_source_of_its_own_fact(conn: Connection, key_hash: bytes) -> None:
    payments = pay(conn, key_hash, 2)
    record_group(conn, *({"facts": [fact(payment_id, "captured", "ch", 10000)]} for payment_id in payments))
    sources = dict(zip(payments, ("webhook", "poll"), strict=True))
    refunds = [fact(payment_id, "refund_pending", "re", 100, source=source) for payment_id, source in sources.items()]
    record_group(conn, *({"facts": [one]} for one in refunds))
    query = "select r.payment_id, s.cause from surety.refund_steps as s join surety.refunds as r on r.id = s.refund_id"
    assert dict(conn.execute(query).fetchall()) == sources
    assert not violations(conn)


def test_unreadable_line_is_no_discrepancy_if_another_result_records_its_object(
    conn: Connection, key_hash: bytes
) -> None:
    [payment_id] = pay(conn, key_hash)
    captured = fact(payment_id, "captured", "ch", 10000)
    lines = [
        {"discrepancy": {"kind": "unrecorded", "subject": subject, "detail": "it has no amount", "fields": NO_AMOUNT}}
        for subject in (captured["object_id"], "txn_other")
    ]
    record_group(conn, *lines, {"facts": [captured]})
    assert conn.execute("select subject from surety.discrepancies").fetchall() == [("txn_other",)]


def test_calls_are_locked_in_the_order_of_their_payments(conn: Connection, database: str, key_hash: bytes) -> None:
    """Another worker, which took the batch over, may record results of the same calls in another order."""
    first, second = sorted(pay(conn, key_hash, 2))
    insert = "insert into surety.calls (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)"
    for payment_id in (first, second):
        conn.execute(f"{insert} values (%s, 'create', %s, '{{}}', now(), now())".encode(), (payment_id, payment_id))
    results = [{"payment_id": one, "operation": "create", "status": 200} for one in (second, first)]
    with psycopg.connect(harden(database, "deploy")) as holder, psycopg.connect(harden(database, "deploy")) as worker:
        holder.execute("select from surety.calls where payment_id = %s for update", (first,))
        with ThreadPoolExecutor(1) as pool:
            recording = pool.submit(record_group, worker, *results)
            eventually(lambda: waits(conn, worker))
            conn.execute("select from surety.calls where payment_id = %s for update nowait", (second,))
            holder.commit()
            recording.result(timeout=10)
    assert conn.execute("select status from surety.calls").fetchall() == [(200,)] * 2


def test_discrepancies_of_recorded_objects_are_closed_in_the_order_of_their_subjects(
    conn: Connection, database: str, key_hash: bytes
) -> None:
    payments = pay(conn, key_hash, 2)
    facts = sorted((fact(one, "captured", "ch", 10000) for one in payments), key=lambda one: str(one["object_id"]))
    first, second = (one["object_id"] for one in facts)
    unreadable: dict[str, Any] = {"kind": "unrecorded", "detail": "it has no amount", "fields": NO_AMOUNT}
    # The table holds them in this order.
    record_group(conn, {"discrepancy": unreadable | {"subject": second}})
    record_group(conn, {"discrepancy": unreadable | {"subject": first}})
    with psycopg.connect(harden(database, "deploy")) as holder, psycopg.connect(harden(database, "deploy")) as worker:
        holder.execute("select from surety.discrepancies where subject = %s for update", (first,))
        with ThreadPoolExecutor(1) as pool:
            recording = pool.submit(record_group, worker, *({"facts": [one]} for one in reversed(facts)))
            eventually(lambda: waits(conn, worker))
            conn.execute("select from surety.discrepancies where subject = %s for update nowait", (second,))
            holder.commit()
            recording.result(timeout=10)
        worker.commit()
    assert conn.execute("select closed_because from surety.discrepancies").fetchall() == [("it is recorded",)] * 2


def test_a_refused_send_and_an_answer_of_one_call_in_a_group_both_count(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    insert = "insert into surety.calls (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)"
    conn.execute(f"{insert} values (%s, 'create', 'key', '{{}}', now(), now())".encode(), (payment_id,))
    call = {"payment_id": payment_id, "operation": "create"}
    record_group(conn, call | {"undone_send": 1}, call | {"status": 200})
    assert conn.execute("select status, refused_through from surety.calls").fetchall() == [(200, 1)]


def test_facts_of_a_payment_are_recorded_without_a_look_into_other_months(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    with explained_plans(conn, "") as plans:
        record_group(conn, {"facts": [fact(payment_id, "captured", "ch", 10000)]})
    months = {
        node["Relation Name"]
        for plan in plans
        for node in nodes_of(plan)
        if node["Actual Loops"] and re.fullmatch(r"(payments|facts|steps|calls)_\d+", node.get("Relation Name", ""))
    }
    assert len(months) == len({name.partition("_")[0] for name in months}) > 1, months


def test_result_without_facts_is_recorded_by_statements_that_open_no_other_month(
    conn: Connection, key_hash: bytes
) -> None:
    [payment_id] = pay(conn, key_hash)
    answer = {"payment_id": payment_id, "operation": "create", "status": 200, "outcome": "answered"}
    with explained_plans(conn, "") as plans:
        record_group(conn, answer)
        record_group(conn, answer | {"payment_id": None})
    relations = [str(node.get("Relation Name", "")) for plan in plans for node in nodes_of(plan)]
    months = [name for name in relations if re.fullmatch(r"(payments|calls)_\d+", name)]
    assert sorted(name.partition("_")[0] for name in months) == ["calls", "payments"], months
