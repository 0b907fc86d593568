"""A refusal proves nothing about the sends before it: once its key has expired, a call is looked for before a send."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.payments import Connection, add_merchant, command, fact, pay, record, record_results

WITHIN_LIFETIME, AFTER_LIFETIME = "22 hours", "24 hours"


def refund(conn: Connection) -> None:
    """A payment with a refund to send."""
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    assert command(conn, "create_refund", key, payment_id=payment_id, amount=4000)["status"] == 201


def capture(conn: Connection) -> None:
    """A payment with a capture to send."""
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual")
    record(conn, [fact(payment_id, "authorized", "ch", 10000)])
    assert command(conn, "capture_payment", key, payment_id=payment_id)["status"] == 202


def cancel(conn: Connection) -> None:
    """A payment with a cancellation to send."""
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual")
    record(conn, [fact(payment_id, "authorized", "ch", 10000)])
    assert command(conn, "cancel_payment", key, payment_id=payment_id)["status"] == 202


def confirm(conn: Connection) -> None:
    """A payment with a confirmation to send."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    conn.execute("update outbox.handlers set batch_size = 1")
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch('submit', 'worker-1')").fetchone()
    assert row is not None
    conn.execute("select from surety.begin_calls(%s, %s, 'create', 'worker:w')", row[:2])
    answered = {"event_id": row[2][0], "payment_id": payment_id, "operation": "create", "outcome": "answered"}
    record_results(conn, row[0], row[1], [answered | {"status": 200, "facts": [fact(payment_id, "submitted", "pi")]}])


def send(conn: Connection, handler: str, **result: Any) -> str:
    """Plan the handler's one call, and record a result for it; returns the verdict."""
    conn.execute("update outbox.retries set due_at = surety.time_now() - interval '1 second' where due_at is not null")
    row = conn.execute("select batch_id, fence from outbox.claim_batch(%s, 'worker-1')", (handler,)).fetchone()
    assert row is not None
    [(event_id, payment_id, verdict, operation)] = conn.execute(
        "select event_id, payment_id, verdict, operation from surety.begin_calls(%s, %s, %s, 'worker:w')",
        (*row, handler),
    ).fetchall()
    about = {"event_id": event_id, "payment_id": payment_id, "operation": operation, "error": "refused"}
    assert record_results(conn, row[0], row[1], [about | result])[0]
    return str(verdict)


@pytest.mark.parametrize("prepare", [refund, capture, cancel, confirm], ids=lambda one: one.__name__)
@pytest.mark.parametrize("status", [401, 409, 429])
@pytest.mark.parametrize(("waited", "expected"), [(WITHIN_LIFETIME, "send"), (AFTER_LIFETIME, "replace_key")])
def test_call_whose_key_has_expired_is_looked_for_whatever_its_last_refusal(
    conn: Connection, prepare: Any, status: int, waited: str, expected: str
) -> None:
    handler = prepare.__name__
    prepare(conn)
    assert send(conn, handler, outcome="unknown") == "send"
    assert send(conn, handler, outcome="busy", status=status) in {"ask", "replace_key"}
    conn.execute("update surety.calls set first_sent_at = first_sent_at - %s::interval", (waited,))
    assert send(conn, handler, outcome="unknown") == expected
