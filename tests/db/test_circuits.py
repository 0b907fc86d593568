"""The rules of the circuit breaker: what opens a circuit, which failures count, and holding while a circuit closes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.db.test_races import Two, at_once
from tests.support.payments import Connection, add_merchant, pay, record_results

OPEN = "select surety.open_circuit('stripe', '', 'outage', 'no answer', 'test')"
CLOSE = "select surety.close_circuit('stripe', '', 'it answers', 'test')"
Batch = tuple[int, int, list[str]]


def pass_time(conn: Connection, seconds: float) -> None:
    """Advance the database's clock."""
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update"
        " set ahead = clock.ahead + excluded.ahead",
        (timedelta(seconds=seconds),),
    )


def report(conn: Connection, *, answered: int = 0, failed: int = 0, in_flight: int = 0, in_a_row: int = 1) -> bool:
    """Report a worker's calls; whether the circuit is open then."""
    calls: dict[str, Any] = {"account": "", "answered": answered, "failed": failed, "in_flight": in_flight}
    calls["consecutive_failures"] = min(failed, in_a_row)
    if answered:
        [(now,)] = conn.execute("select surety.read_clock()").fetchall()
        calls["answered_at"] = now.isoformat()
    query = "select is_open from surety.count_call_results('stripe', %s, 'test')"
    [(is_open,)] = conn.execute(query, (json.dumps([calls]),)).fetchall()
    return bool(is_open)


def claim(conn: Connection) -> Batch:
    """Claim a batch of submissions."""
    query = "select batch_id, fence, event_ids from outbox.claim_batch('submit', 'test')"
    [batch] = conn.execute(query).fetchall()
    return batch


def fail(conn: Connection, batch: Batch) -> None:
    """Record that all calls of a batch failed by an outage of the account."""
    batch_id, fence, event_ids = batch
    results = [{"event_id": event_id, "error": "500", "outage": "stripe:"} for event_id in event_ids]
    record_results(conn, batch_id, fence, results)


def hold(conn: Connection, batch: Batch) -> None:
    """Hold all events of a batch."""
    conn.execute("select surety.hold_blocked_events(%s, %s, %s)", batch)


def test_five_failures_open_a_circuit_if_no_more_commands_were_answered(conn: Connection) -> None:
    assert not report(conn, answered=5, failed=4)
    assert report(conn, failed=1)


def test_five_failures_among_more_answers_open_no_circuit(conn: Connection) -> None:
    assert not report(conn, answered=6, failed=5)
    assert report(conn, failed=1)


def test_commands_in_flight_may_be_answered(conn: Connection) -> None:
    assert not report(conn, answered=2, failed=6, in_flight=5)
    assert report(conn, failed=1, in_flight=5)


def test_failures_are_compared_with_the_answers_of_the_bucket_before(conn: Connection) -> None:
    assert not report(conn, answered=20)
    pass_time(conn, 31)
    assert not report(conn, failed=6), "twenty were answered half a minute ago"
    pass_time(conn, 31)
    assert report(conn, failed=1), "those are forgotten, the six failures are not"


def test_one_failure_does_not_reopen_a_circuit_that_was_closed(conn: Connection) -> None:
    assert report(conn, failed=10, in_a_row=10)
    conn.execute(CLOSE)
    assert not report(conn, failed=1)


def test_failure_is_excused_at_most_eighteen_times_while_the_circuit_is_closed(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash)
    counted = []
    for _ in range(19):
        assert not report(conn, answered=10, failed=5)
        fail(conn, claim(conn))
        counted += [failures for (failures,) in conn.execute("select failures from outbox.retries").fetchall()]
        pass_time(conn, 61)
    assert counted == [0] * 18 + [1]


def test_circuit_opens_again_over_an_event_that_was_held_before_any_call(conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1])
    batch = claim(conn)
    conn.execute(OPEN)
    hold(conn, batch)
    conn.execute(CLOSE)
    assert conn.execute(OPEN).fetchone() == (True,)
    assert conn.execute("select attempts, due_at > surety.read_clock() from outbox.retries").fetchall() == [([], True)]


@pytest.mark.parametrize("release", [hold, fail])
def test_circuit_that_closes_during_a_hold_makes_the_held_events_due(
    conn: Connection, two: Two, release: Callable[[Connection, Batch], None]
) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash)
    batch = claim(conn)
    conn.execute(OPEN)
    one, other = two
    at_once(conn, two, lambda: release(one, batch), lambda: other.execute(CLOSE))
    [(is_due,)] = conn.execute("select due_at <= surety.read_clock() from outbox.retries").fetchall()
    assert is_due


def test_failures_that_are_recorded_while_the_circuit_opens_do_not_count(conn: Connection, two: Two) -> None:
    pay(conn, add_merchant(conn)[1])
    batch = claim(conn)
    assert not report(conn, failed=4)
    one, other = two
    at_once(conn, two, lambda: fail(one, batch), lambda: report(other, failed=6))
    held = "select failures, due_at > surety.read_clock() + interval '9 minutes' from outbox.retries"
    assert conn.execute(held).fetchall() == [(0, True)]


def test_circuit_that_opens_while_failures_are_recorded_holds_their_events(conn: Connection, two: Two) -> None:
    pay(conn, add_merchant(conn)[1])
    batch = claim(conn)
    assert not report(conn, failed=4)
    one, other = two
    at_once(conn, two, lambda: report(one, failed=6), lambda: fail(other, batch))
    held = "select failures, due_at > surety.read_clock() + interval '9 minutes' from outbox.retries"
    assert conn.execute(held).fetchall() == [(0, True)]


@pytest.mark.parametrize("release", [hold, fail])
def test_failure_of_an_event_that_is_claimed_while_the_circuit_opens_does_not_count(
    conn: Connection, two: Two, release: Callable[[Connection, Batch], None]
) -> None:
    pay(conn, add_merchant(conn)[1])
    assert not report(conn, failed=4)
    fail(conn, claim(conn))
    uncounted = "select failures, attempts -> 0 -> 'counted' from outbox.retries"
    assert conn.execute(uncounted).fetchall() == [(1, None)]
    conn.execute("update outbox.retries set due_at = surety.read_clock()")
    one, other = two
    claimed: list[Batch] = []
    at_once(conn, two, lambda: claimed.append(claim(one)), lambda: report(other, failed=6))
    release(conn, claimed[0])
    assert conn.execute(uncounted).fetchall() == [(0, False)]
    conn.execute(CLOSE)
    conn.execute(OPEN)
    assert conn.execute(uncounted).fetchall() == [(0, False)]


@pytest.mark.parametrize("cause", ["outage", "key_refused"])
def test_lists_that_fail_with_a_circuit_are_no_finding_while_it_is_open_nor_after_it_closed(
    conn: Connection, cause: str
) -> None:
    note = "select surety.note_unreadable_list('stripe', %s, %s, 'no answer', %s)"
    conn.execute(note, ("", "payouts", False))
    conn.execute(note, ("acct_1", "payouts", False))
    pass_time(conn, 3600)
    conn.execute(note, ("", "events", cause != "outage"))
    conn.execute("select surety.open_circuit('stripe', '', %s, 'words', 'test')", (cause,))
    conn.execute(note, ("", "balance_transactions", cause != "outage"))
    unreadable = "select account, list from surety.list_unreadable_lists() order by 1, 2"
    assert conn.execute(unreadable).fetchall() == [("acct_1", "payouts")]
    pass_time(conn, 3600)
    conn.execute(CLOSE)
    assert conn.execute(unreadable).fetchall() == [("", "payouts"), ("acct_1", "payouts")]
