"""Discrepancies: one for each cause, with both values, however often and by however many workers it is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from db.connect import harden
from tests.db.test_races import waits
from tests.support.payments import Connection, add_merchant, fact, pay, record
from tests.support.sandbox_process import eventually

Row = dict[str, Any]
OPEN = (
    "select surety.open_discrepancy('fee', 'txn_1', 'warning', %s,"
    " jsonb_build_array(surety.differing_amount('fee', 320, %s)), 'pay_1', %s, surety.time_now())"
)


@pytest.fixture
def payment_id(conn: Connection) -> str:
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute("insert into surety.clock (ahead) values ('0')")
    return pay(conn, add_merchant(conn)[1])[0]


@pytest.fixture
def worker(database: str) -> Iterator[Connection]:
    with psycopg.connect(harden(database, "deploy")) as other:
        yield other


def found(conn: Connection, condition: str = "true") -> list[Row]:
    """Discrepancies, in the order of their opening."""
    with conn.cursor(row_factory=dict_row) as cursor:
        query = f"select * from surety.discrepancies where {condition} order by kind, subject, occurrence"
        return cursor.execute(query.encode()).fetchall()


def report(conn: Connection, fee: int, source: str = "txn_1") -> str | None:
    """A fee of 320 minor units is reported as another one."""
    row = conn.execute(OPEN, (f"a fee of {fee} instead of 320", fee, source)).fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])


def resolve(conn: Connection, discrepancy_id: str, resolution: str = "explained") -> None:
    query = "select outcome from surety.resolve_discrepancy(%s, %s, 'why', 'operator:ada')"
    assert conn.execute(query, (discrepancy_id, resolution)).fetchall() == [("resolved",)]


def pass_time(conn: Connection, interval: str) -> None:
    conn.execute("update surety.clock set ahead = ahead + %s::interval", (interval,))


def amounts(row: Row) -> list[tuple[str, Any, Any, Any]]:
    return [(field["field"], field["here"], field["there"], field["delta_minor"]) for field in row["fields"]]


def test_an_excess_refund_is_reported_although_an_excess_capture_was_explained(
    conn: Connection, payment_id: str
) -> None:
    record(conn, [fact(payment_id, "captured", "ch", 11000)])
    [captured] = found(conn)
    assert amounts(captured) == [("captured", 10000, 11000, 1000)]
    resolve(conn, captured["id"])
    record(conn, [fact(payment_id, "refund_succeeded", "re", 10500)])
    [refunded] = found(conn, "closed_at is null")
    assert (refunded["kind"], refunded["severity"]) == ("amount", "critical")
    assert amounts(refunded) == [("refunded", 10000, 10500, 500)]


def test_a_greater_excess_of_an_explained_capture_is_the_next_occurrence(conn: Connection, payment_id: str) -> None:
    record(conn, [fact(payment_id, "captured", "ch_1", 11000)])
    resolve(conn, found(conn)[0]["id"])
    record(conn, [fact(payment_id, "submitted", "pi")])
    assert [row["occurrence"] for row in found(conn)] == [1], "the same excess is not reported again"
    record(conn, [fact(payment_id, "captured", "ch_2", 500)])
    first, second = found(conn)
    assert (first["closed_as"], second["occurrence"], second["closed_at"]) == ("explained", 2, None)
    assert amounts(second) == [("captured", 10000, 11500, 1500)]


def test_an_excess_refund_that_fails_later_closes_its_discrepancy(conn: Connection, payment_id: str) -> None:
    record(conn, [fact(payment_id, "captured", "ch", 10000), fact(payment_id, "refund_succeeded", "re_1", 8000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re_2", 6000)])
    assert [row["closed_at"] for row in found(conn)] == [None]
    record(conn, [fact(payment_id, "refund_failed", "re_2", 6000)])
    assert [(row["closed_as"], row["closed_by"]) for row in found(conn)] == [("arrived_late", "system")]


def test_a_repetition_keeps_the_first_and_the_newest_values(conn: Connection, payment_id: str) -> None:
    opened = report(conn, 330)
    assert report(conn, 340, "txn_1b") is None
    assert report(conn, 350, "txn_1c") is None
    [row] = found(conn)
    assert (row["id"], amounts(row)) == (opened, [("fee", 320, 350, 30)])
    assert (row["source_here"], row["source_there"], row["seen_again"]) == ("pay_1", "txn_1c", 2)
    assert row["first"]["fields"] == [{"field": "fee", "here": 320, "there": 330, "delta_minor": 10}]
    assert (row["first"]["source_there"], row["first"]["detail"]) == ("txn_1", "a fee of 330 instead of 320")


def test_an_unchanged_repetition_writes_at_most_once_an_hour(conn: Connection, payment_id: str) -> None:
    version = "select xmin::text, seen_again from surety.discrepancies"
    report(conn, 330)
    before = conn.execute(version).fetchall()
    pass_time(conn, "59 minutes")
    report(conn, 330)
    assert conn.execute(version).fetchall() == before
    pass_time(conn, "2 minutes")
    report(conn, 330)
    report(conn, 330)
    assert [count for _, count in conn.execute(version)] == [1]


def test_a_closed_cause_does_not_come_back_but_another_value_does(conn: Connection, payment_id: str) -> None:
    opened = report(conn, 330)
    report(conn, 340)
    assert opened is not None
    resolve(conn, opened, "written_off")
    pass_time(conn, "2 days")
    assert (report(conn, 340), report(conn, 330)) == (None, None)
    assert report(conn, 350) is not None
    assert [row["occurrence"] for row in found(conn)] == [1, 2]


def test_a_cause_that_a_later_fact_resolved_may_come_back(conn: Connection, payment_id: str) -> None:
    report(conn, 330)
    conn.execute("select surety.close_discrepancies('fee', array['txn_1'], 'it fits', surety.time_now())")
    assert report(conn, 330) is not None
    assert [(row["occurrence"], row["closed_as"]) for row in found(conn)] == [(1, "arrived_late"), (2, None)]


def test_other_values_end_a_snooze(conn: Connection, payment_id: str) -> None:
    opened = report(conn, 330)
    snooze = "select outcome from surety.snooze_discrepancy(%s, surety.time_now() + interval '3 days', 'x', 'a')"
    assert conn.execute(snooze, (opened,)).fetchall() == [("snoozed",)]
    summary = "select surety.read_status() -> 'discrepancies' ->> 'open'"
    assert conn.execute(summary).fetchall() == [("0",)]
    pass_time(conn, "2 hours")
    report(conn, 330)
    assert conn.execute(summary).fetchall() == [("0",)]
    report(conn, 340)
    assert conn.execute(summary).fetchall() == [("1",)]


def test_two_workers_open_one_discrepancy(conn: Connection, worker: Connection, payment_id: str) -> None:
    assert report(worker, 330) is not None
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(report, conn, 340)
        eventually(lambda: waits(worker, conn))
        worker.commit()
        assert other.result(timeout=10) is None
    [row] = found(conn)
    assert (amounts(row), row["seen_again"]) == ([("fee", 320, 340, 20)], 1)


def test_other_values_during_a_resolution_are_the_next_occurrence(
    conn: Connection, worker: Connection, payment_id: str
) -> None:
    opened = report(conn, 330)
    assert opened is not None
    resolve(worker, opened)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(report, conn, 340)
        eventually(lambda: waits(worker, conn))
        worker.commit()
        assert other.result(timeout=10) is not None
    assert [(row["occurrence"], row["closed_as"]) for row in found(conn)] == [(1, "explained"), (2, None)]


def test_an_object_that_was_missing_at_the_provider_closes_its_discrepancy_once_it_is_read(
    conn: Connection, payment_id: str
) -> None:
    submitted = fact(payment_id, "submitted", "pi")
    intent = submitted["object_id"]
    missing = {"kind": "missing_at_provider", "subject": intent, "detail": "no such intent", "source_there": None}
    missing["fields"] = [{"field": "object", "here": intent, "there": None}]
    result = {"payment_id": payment_id, "outcome": "rejected", "discrepancy": missing}
    conn.execute("select surety.record_results('worker:w', %s)", (json.dumps([result]),))
    record(conn, [submitted | {"source": "webhook"}])
    assert [row["closed_at"] for row in found(conn)] == [None], "a late webhook does not prove that it is there"
    record(conn, [submitted])
    assert [row["closed_as"] for row in found(conn)] == ["arrived_late"]


def test_resolving_several_needs_their_number_and_audits_each(conn: Connection, payment_id: str) -> None:
    merchant, _ = add_merchant(conn)
    opened = []
    for number, fee in enumerate((321, 322, 323)):
        query = OPEN.replace("'txn_1'", f"'txn_{number}'").replace("now())", f"now(), p_merchant_id => '{merchant}')")
        opened += [row[0] for row in conn.execute(query.encode(), ("x", fee, None))]
    chosen = json.dumps({"statuses": ["open"], "kind": "fee", "merchant": merchant, "max_delta": 2})
    query = "select id, outcome, detail from surety.resolve_discrepancies(%s, %s, 'written_off', 'small', 'operator:a')"
    assert conn.execute(query, (chosen, 3)).fetchall() == [(None, "refused", "2 match, not 3: none is resolved")]
    assert len(found(conn, "closed_at is null")) == 3
    done = conn.execute(query, (chosen, 2)).fetchall()
    assert done == [(each, "resolved", "it is closed as written_off") for each in sorted(opened[:2])]
    assert [row["id"] for row in found(conn, "closed_at is null")] == opened[2:]
    entries = "select snapshot ->> 'discrepancy' from audit.entries where outcome = 'discrepancy resolved' order by 1"
    assert [row[0] for row in conn.execute(entries)] == sorted(opened[:2])
