"""Races of two real connections in each order, and deadlocks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import psycopg
import pytest

from db.connect import harden
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    create,
    fact,
    ledger_of,
    money,
    path_of,
    pay,
    record,
    request,
    state_of,
    violations,
)

Two = tuple[Connection, Connection]


def waits(conn: Connection, waiting: Connection) -> bool:
    """Whether a connection is held up by a lock."""
    row = conn.execute("select cardinality(pg_blocking_pids(%s)) > 0", (waiting.info.backend_pid,)).fetchone()
    return bool(row and row[0])


def at_once(conn: Connection, two: Two, first: Callable[[], object], second: Callable[[], object]) -> None:
    """Runs `second` while `first` has worked and not committed; `first` commits once `second` ends or waits for it."""
    one, other = two
    with ThreadPoolExecutor(1) as pool:
        first()
        later: Future[object] = pool.submit(second)
        deadline = time.monotonic() + 10
        while not later.done() and not waits(conn, other):
            assert time.monotonic() < deadline, "the second neither ends nor waits"
            threading.Event().wait(0.002)
        one.commit()
        later.result(timeout=10)
        other.commit()


def submitted(p: str) -> Fact:
    return fact(p, "submitted", "pi", source="response")


def captured(p: str, **fields: object) -> Fact:
    return fact(p, "captured", "ch", 10000, **fields)


@pytest.mark.parametrize("first", ["webhook", "answer"])
def test_webhook_and_response_end_the_same_in_either_order(conn: Connection, two: Two, first: str) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    one, other = two
    webhook, answer = [captured(payment_id, source="webhook")], [submitted(payment_id)]
    if first == "webhook":
        at_once(conn, two, lambda: record(one, webhook), lambda: record(other, answer))
    else:
        at_once(conn, two, lambda: record(one, answer), lambda: record(other, webhook))
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "confirmed"]
    assert ledger_of(conn, payment_id) == {"provider_receivable": 10000, "pending": 9625, "fee_revenue": 375}
    assert not violations(conn)


def test_the_same_webhook_twice_at_once_is_one_event(conn: Connection, two: Two) -> None:
    row = {"n": 0, "provider": "stripe", "account": "", "livemode": False, "event_id": "evt_1", "type": "t"}
    webhook = json.dumps([row | {"headers": {}, "body": "{}", "address": "127.0.0.1"}])
    answers: list[bool] = []

    def receive(connection: Connection) -> None:
        answer = connection.execute("select is_new from surety.receive_webhooks(%s)", (webhook,)).fetchone()
        assert answer is not None
        answers.append(answer[0])

    at_once(conn, two, lambda: receive(two[0]), lambda: receive(two[1]))
    assert answers == [True, False]
    assert conn.execute("select count(*) from outbox.events where type = 'webhook.received'").fetchone() == (1,)


def test_the_same_fact_from_two_workers_at_once_counts_once(conn: Connection, two: Two) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    one, other = two
    at_once(
        conn,
        two,
        lambda: record(one, [captured(payment_id, source="webhook")]),
        lambda: record(other, [captured(payment_id, source="poll")]),
    )
    assert path_of(conn, payment_id).count("confirmed") == 1
    assert ledger_of(conn, payment_id) == {"provider_receivable": 10000, "pending": 9625, "fee_revenue": 375}


RACES: dict[str, tuple[Callable[[str], Fact], Callable[[str], Fact], str]] = {
    "a refund crosses the capture": (captured, lambda p: fact(p, "refund_succeeded", "re", 4000), "partially_refunded"),
    "a cancel crosses the capture": (captured, lambda p: fact(p, "canceled", "pi"), "confirmed"),
    "a refund crosses a dispute": (
        lambda p: fact(p, "dispute_opened", "dp", 10000, revision=1),
        lambda p: fact(p, "refund_succeeded", "re", 4000),
        "disputed",
    ),
    "a refund crosses a return": (
        lambda p: fact(p, "returned", "return", 10000),
        lambda p: fact(p, "refund_succeeded", "re", 4000),
        "reversed",
    ),
}


@pytest.mark.parametrize("crossing", RACES)
@pytest.mark.parametrize("is_swapped", [False, True], ids=["one first", "other first"])
def test_concurrent_changes_end_the_same_in_both_orders(
    conn: Connection, two: Two, crossing: str, is_swapped: bool
) -> None:
    first_fact, second_fact, end = RACES[crossing]
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [submitted(payment_id)])
    if "capture" not in crossing:
        record(conn, [captured(payment_id)])
    if is_swapped:
        first_fact, second_fact = second_fact, first_fact
    one, other = two
    at_once(
        conn,
        two,
        lambda: record(one, [first_fact(payment_id)]),
        lambda: record(other, [second_fact(payment_id)]),
    )
    assert state_of(conn, payment_id) == end
    assert not violations(conn)


def test_fifty_simultaneous_requests_with_one_key_make_one_payment(conn: Connection, database: str) -> None:
    _, key_hash = add_merchant(conn)
    start = threading.Barrier(50)

    def ask(number: int) -> tuple[int, str, bool]:
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            asked = request(key_hash, idempotency_key="one", request_id=f"req_{number}")
            start.wait(timeout=30)
            [outcome] = create(connection, [asked])
            return outcome["status"], outcome["body"], outcome["is_replayed"]

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(ask, range(50)))
    assert {(status, body) for status, body, _ in outcomes} == {(201, outcomes[0][1])}
    assert sorted(replayed for *_, replayed in outcomes) == [False] + [True] * 49
    assert conn.execute("select count(*) from surety.payments").fetchone() == (1,)


def test_batches_with_their_keys_in_opposite_order_do_not_deadlock(conn: Connection, database: str) -> None:
    _, key_hash = add_merchant(conn)
    rounds = 40
    start = threading.Barrier(2)

    def ask(is_backward: bool) -> None:
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            for turn in range(rounds):
                numbers = range(20, 0, -1) if is_backward else range(1, 21)
                batch = [
                    request(key_hash, idempotency_key=f"{turn}-{n}", reference=f"{turn}-{21 - n}") for n in numbers
                ]
                start.wait(timeout=30)
                create(connection, batch)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(ask, False), pool.submit(ask, True)]:
            done.result(timeout=60)
    assert conn.execute("select count(*) from surety.payments").fetchone() == (20 * rounds,)
    assert not violations(conn)


def test_facts_of_the_same_payments_in_opposite_order_do_not_deadlock(conn: Connection, database: str) -> None:
    keys = [add_merchant(conn)[1] for _ in range(3)]
    payments = [payment_id for key_hash in keys for payment_id in pay(conn, key_hash, 20)]
    start = threading.Barrier(2)

    def record_all(is_backward: bool) -> None:
        ordered = payments[::-1] if is_backward else payments
        batches = [
            [submitted(p) for p in ordered],
            [captured(p) for p in ordered],
            [money(p, "txn", "charge", 10000, 320) for p in ordered],
            [fact(p, "available", "txn", 10000) for p in ordered],
            [fact(p, "refund_succeeded", "re", 100) for p in ordered],
        ]
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            for batch in batches:
                start.wait(timeout=30)
                record(connection, batch)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(record_all, False), pool.submit(record_all, True)]:
            done.result(timeout=60)
    assert {state_of(conn, payment_id) for payment_id in payments} == {"partially_refunded"}
    assert not violations(conn)


@pytest.mark.parametrize("first", ["mode", "merchant"])
def test_mode_and_first_merchant_at_once_end_in_one_mode(conn: Connection, two: Two, first: str) -> None:
    one, other = two
    change, add = "select surety.set_livemode(true)", "select surety.add_merchant('Acme Books')"
    earlier, later = (change, add) if first == "mode" else (add, change)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        at_once(conn, two, lambda: one.execute(earlier.encode()), lambda: other.execute(later.encode()))
    merchants = conn.execute("select count(*) from surety.merchants").fetchone()
    assert (merchants, conn.execute("select surety.read_livemode()").fetchone()) == (
        ((0,), (True,)) if first == "mode" else ((1,), (False,))
    )
