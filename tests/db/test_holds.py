"""Payments on hold: nothing is sent before a release, once after it; every end, and every race of two of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg import errors

from tests.conftest import Connect
from tests.db.test_create_payments import until_waiting
from tests.db.test_money_limits import move_clock
from tests.db.test_velocity_rules import add_rule
from tests.support.payments import Connection, add_merchant, command, fact, path_of, pay, record, state_of, violations


@pytest.fixture
def key(conn: Connection) -> bytes:
    return add_merchant(conn)[1]


@pytest.fixture
def held(conn: Connection, key: bytes) -> str:
    """A payment on hold."""
    add_rule(conn, "hold", count=0)
    return pay(conn, key, customer={"email": "ada@example.com"})[0]


def decide(conn: Connection, payment_id: str, decision: str = "released") -> str:
    """The outcome of a decision."""
    query = "select outcome from surety.decide_hold(%s, %s, 'operator:test', 'known customer')"
    row = conn.execute(query, (payment_id, decision)).fetchone()
    assert row is not None
    return str(row[0])


def verdicts(conn: Connection) -> list[tuple[str, str]]:
    """Let a worker begin the calls of the next batch of `submit`: each event's type and verdict."""
    batch = conn.execute("select batch_id, fence from outbox.claim_batch('submit', 'w', '1 minute')").fetchone()
    if batch is None:
        return []
    planned = conn.execute(
        "select e.type, c.verdict from outbox.batch_events(%s, %s) as e"
        " join surety.begin_calls(%s, %s, 'create', 'worker:w') as c using (event_id) order by e.type",
        (*batch, *batch),
    ).fetchall()
    conn.execute(
        "select outbox.complete_events(%s, %s, array(select event_id from outbox.batch_events(%s, %s)))",
        (*batch, *batch),
    )
    return planned


def hold_of(conn: Connection, payment_id: str) -> tuple[Any, ...]:
    """Outcome of a payment's hold, and what its merchant sees."""
    query = (
        "select h.outcome, p.flags #>> '{hold,status}', p.failure ->> 'code'"
        " from surety.payment_holds as h join surety.payments as p on p.id = h.payment_id where p.id = %s"
    )
    row = conn.execute(query, (payment_id,)).fetchone()
    assert row is not None
    return row


def test_a_held_payment_is_not_sent_and_is_sent_once_after_its_release(conn: Connection, held: str) -> None:
    assert verdicts(conn) == [("payment.initiated", "skip")]
    assert state_of(conn, held) == "initiated"
    assert not violations(conn)
    assert [decide(conn, held), decide(conn, held)] == ["released", "unchanged"]
    assert verdicts(conn) == [("payment.released", "send")]
    assert state_of(conn, held) == "submitting"
    assert verdicts(conn) == []
    assert decide(conn, held, "refused") == "ended"
    assert hold_of(conn, held) == ("released", "released", None)
    assert not violations(conn)


def test_a_release_before_the_worker_looks_sends_once(conn: Connection, held: str) -> None:
    decide(conn, held)
    assert verdicts(conn) == [("payment.initiated", "skip"), ("payment.released", "send")]
    assert conn.execute("select sends from surety.calls where payment_id = %s", (held,)).fetchall() == [(1,)]


def test_a_release_while_the_worker_begins_the_call_waits_for_it(conn: Connection, connect: Connect, held: str) -> None:
    worker, operator = connect("deploy"), connect("deploy")
    with ThreadPoolExecutor(1) as pool:
        with worker.transaction():
            assert verdicts(worker) == [("payment.initiated", "skip")]
            waiting = pool.submit(decide, operator, held)
            until_waiting(conn, operator)
        assert waiting.result() == "released"
    assert verdicts(conn) == [("payment.released", "send")]


def test_a_refused_payment_ends_as_failed(conn: Connection, held: str) -> None:
    assert [decide(conn, held, "refused"), decide(conn, held, "refused")] == ["refused", "unchanged"]
    assert decide(conn, held) == "ended"
    assert verdicts(conn) == [("payment.initiated", "skip")]
    assert path_of(conn, held) == ["initiated", "failed"]
    assert hold_of(conn, held) == ("refused", "refused", "hold_refused")
    assert not violations(conn)


def test_a_hold_without_a_decision_ends_with_its_time(conn: Connection, held: str) -> None:
    expire = "select surety.expire_holds('worker:w')"
    move_clock(conn, "6 days -0:00:10")
    assert conn.execute(expire).fetchone() == ([],)
    move_clock(conn, "7 days")
    assert conn.execute(expire).fetchone() == (["payment.canceled"],)
    assert conn.execute(expire).fetchone() == ([],)
    assert path_of(conn, held) == ["initiated", "canceled"]
    assert hold_of(conn, held) == ("expired", "expired", "hold_expired")
    assert not violations(conn)


def test_a_merchant_cancels_a_held_payment(conn: Connection, key: bytes, held: str) -> None:
    assert command(conn, "cancel_payment", key, payment_id=held)["status"] == 200
    assert hold_of(conn, held) == ("canceled", "canceled", None)
    assert decide(conn, held) == "ended"
    assert verdicts(conn) == [("payment.initiated", "skip")]
    assert not violations(conn)


def test_a_cancellation_after_a_release_keeps_it_from_being_sent(conn: Connection, key: bytes, held: str) -> None:
    decide(conn, held)
    assert command(conn, "cancel_payment", key, payment_id=held)["status"] == 200
    assert verdicts(conn) == [("payment.initiated", "skip"), ("payment.released", "skip")]
    assert hold_of(conn, held) == ("released", "released", None)
    assert not violations(conn)


@pytest.mark.parametrize("first", ["cancel", "release"])
def test_a_cancellation_and_a_release_at_once_end_in_one_order(
    conn: Connection, connect: Connect, key: bytes, held: str, first: str
) -> None:
    one, other = connect("deploy"), connect("deploy")

    def cancel(connection: Connection) -> Any:
        return command(connection, "cancel_payment", key, payment_id=held)["status"]

    def release(connection: Connection) -> Any:
        return decide(connection, held)

    acts = (cancel, release) if first == "cancel" else (release, cancel)
    with ThreadPoolExecutor(1) as pool:
        with one.transaction():
            answers = [acts[0](one)]
            waiting = pool.submit(acts[1], other)
            until_waiting(conn, other)
        answers.append(waiting.result())
    assert answers == ([200, "ended"] if first == "cancel" else ["released", 200])
    assert state_of(conn, held) == "canceled"
    assert {verdict for _, verdict in verdicts(conn)} == {"skip"}
    assert not violations(conn)


def test_no_step_sends_a_held_payment(conn: Connection, held: str) -> None:
    with pytest.raises(errors.CheckViolation) as refused:
        conn.execute(
            "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
            " values (%s, 2, 'initiated', 'submitting', 'command', now(), 'worker:w')",
            (held,),
        )
    assert refused.value.diag.constraint_name == "held_payment_is_not_sent"


def test_a_held_payment_that_the_provider_holds_is_recorded_and_not_confirmed(conn: Connection, held: str) -> None:
    record(conn, [fact(held, "submitted", "pi")])
    assert state_of(conn, held) == "provider_submitted"
    assert hold_of(conn, held) == ("overtaken", "overtaken", None)
    batch = conn.execute("select batch_id, fence from outbox.claim_batch('confirm', 'w', '1 minute')").fetchone()
    assert batch is not None
    query = "select verdict from surety.begin_calls(%s, %s, 'confirm', 'worker:w')"
    assert conn.execute(query, batch).fetchall() == [("skip",)]
    assert not violations(conn)


def test_a_held_payment_is_not_overdue(conn: Connection, held: str) -> None:
    move_clock(conn, "5 days")
    row = conn.execute("select surety.read_status()").fetchone()
    assert row is not None
    state = row[0]
    assert (state["overdue_objects"], state["unfinished"]) == ([], None)
    assert (state["holds"]["open"], state["holds"]["first"]) == (1, held)


def test_a_payment_of_another_payer_is_not_held(conn: Connection, key: bytes, held: str) -> None:
    conn.execute("update surety.velocity_rules set removed_at = now()")
    pay(conn, key, customer={"email": "bob@example.com"})
    assert ("payment.initiated", "send") in verdicts(conn)
    assert state_of(conn, held) == "initiated"


def test_a_dead_worker_after_the_release_loses_nothing(conn: Connection, held: str) -> None:
    decide(conn, held)
    claimed = conn.execute("select batch_id, fence from outbox.claim_batch('submit', 'w1', '1 minute')").fetchone()
    assert claimed is not None
    conn.execute("select from surety.begin_calls(%s, %s, 'create', 'worker:w1')", claimed)
    conn.execute("update outbox.batches set leased_until = now() - interval '1 second'")
    # Events of a dead worker are tried one by one.
    assert sorted(verdicts(conn) + verdicts(conn)) == [("payment.initiated", "skip"), ("payment.released", "send")]
    row = conn.execute("select sends, idempotency_key from surety.calls where payment_id = %s", (held,)).fetchone()
    assert row == (2, f"{held}:create"), "the same request under the same key"
