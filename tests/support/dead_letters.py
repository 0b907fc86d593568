"""Dead letters, made the way events become them: handled in vain until their delays are used up."""

from __future__ import annotations

from typing import Any

from tests.support.payments import Connection, add_merchant, command, fact, pay, record, record_results

REFUSAL = 'Stripe 400 parameter_invalid: currency "usx"'


def exhaust_retries(
    conn: Connection, handler: str, error: str = REFUSAL, *, operation: str | None = None, status: int | None = None
) -> list[str]:
    """Fail a handler's due events until they are dead letters. Returns the letters' ids.

    With an `operation` each attempt begins a call, answered with `status`; None leaves its outcome unknown.
    """
    known = {letter for (letter,) in conn.execute("select id from outbox.dead_letters")}
    conn.execute("update outbox.handlers set retry_after = '{0 s,0 s}' where handler = %s", (handler,))
    claim = "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'worker-1')"
    while row := conn.execute(claim, (handler,)).fetchone():
        batch, fence, event_ids = row
        results: list[dict[str, Any]] = [{"event_id": event_id, "error": error} for event_id in event_ids]
        if operation is not None:
            begun = conn.execute(
                "select event_id, payment_id from surety.begin_calls(%s, %s, %s, 'worker:w')", (batch, fence, operation)
            ).fetchall()
            outcome = {"operation": operation, "outcome": "rejected" if status else "unknown", "status": status}
            payments: dict[str, str] = dict(begun)
            results = [result | outcome | {"payment_id": payments[result["event_id"]]} for result in results]
        record_results(conn, batch, fence, results)
    return [
        letter for (letter,) in conn.execute("select id from outbox.dead_letters order by id") if letter not in known
    ]


def open_dead_letter(conn: Connection, payment_id: str) -> str:
    """The open letter of a payment."""
    query = "select id from outbox.dead_letters where payment_id = %s and closed_at is null"
    [(letter,)] = conn.execute(query, (payment_id,)).fetchall()
    return str(letter)


def never_sent_letter(conn: Connection, error: str = REFUSAL) -> tuple[str, str]:
    """A letter of a payment for which nothing was sent, and the payment."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    exhaust_retries(conn, "submit", error)
    return open_dead_letter(conn, payment_id), payment_id


def refused(conn: Connection) -> tuple[str, str]:
    """A letter of a payment that the provider refused to make."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    exhaust_retries(conn, "submit", operation="create", status=400)
    return open_dead_letter(conn, payment_id), payment_id


def unanswered(conn: Connection) -> tuple[str, str]:
    """A letter of a payment that the provider may or may not have."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    exhaust_retries(conn, "submit", "no answer within 20 s", operation="create")
    return open_dead_letter(conn, payment_id), payment_id


def held(conn: Connection, *, operation: str | None = None, status: int | None = None) -> tuple[str, str]:
    """A letter about confirming a payment that the provider holds, and the payment."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch('submit', 'worker-1')").fetchone()
    assert row is not None
    conn.execute("select * from surety.begin_calls(%s, %s, 'create', 'worker:w')", row[:2])
    answered = {
        "event_id": row[2][0],
        "payment_id": payment_id,
        "operation": "create",
        "outcome": "answered",
        "status": 200,
        "facts": [fact(payment_id, "submitted", "pi")],
    }
    record_results(conn, row[0], row[1], [answered])
    exhaust_retries(conn, "confirm", operation=operation, status=status)
    return open_dead_letter(conn, payment_id), payment_id


def refund(conn: Connection, sent: str, status: int | None = None) -> tuple[str, str]:
    """A letter about a refund of 4000, sent with that answer (None: unknown) or unsent, and its payment."""
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    assert command(conn, "create_refund", key_hash, payment_id=payment_id, amount=4000)["status"] == 201
    return exhaust_command(conn, "refund", f"refund:{refund_of(conn)}", payment_id, sent, status), payment_id


def refund_of(conn: Connection) -> str:
    """The one refund there is."""
    [(refund_id,)] = conn.execute("select id from surety.refunds").fetchall()
    return str(refund_id)


def capture(conn: Connection, sent: str, status: int | None = None) -> tuple[str, str]:
    """A letter about a capture, sent with that answer (None: unknown) or unsent, and its payment."""
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, capture_method="manual")
    record(conn, [fact(payment_id, "authorized", "ch", 10000)])
    assert command(conn, "capture_payment", key_hash, payment_id=payment_id)["status"] == 202
    return exhaust_command(conn, "capture", "capture", payment_id, sent, status), payment_id


def exhaust_command(
    conn: Connection, handler: str, operation: str, payment_id: str, sent: str, status: int | None
) -> str:
    """Handle a command in vain until it is given up; if it is sent, it is each time, with that answer."""
    conn.execute("update outbox.handlers set retry_after = '{0 s,0 s}' where handler = %s", (handler,))
    claim = "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'worker-1')"
    while row := conn.execute(claim, (handler,)).fetchone():
        batch, fence, [event_id] = row
        result = {"event_id": event_id, "error": REFUSAL}
        if sent == "sent":
            conn.execute("select from surety.begin_calls(%s, %s, %s, 'worker:w')", (batch, fence, handler))
            output = {"payment_id": payment_id, "operation": operation, "outcome": "rejected", "status": status}
            result |= {name: value for name, value in output.items() if value is not None}
        record_results(conn, batch, fence, [result])
    return open_dead_letter(conn, payment_id)


def end(conn: Connection, payment_id: str) -> None:
    """The provider says that it failed."""
    record(conn, [fact(payment_id, "failed", "pi")])


def closed_as(conn: Connection, letter: str) -> str | None:
    row = conn.execute("select closed_as from outbox.dead_letters where id = %s", (letter,)).fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])


def operator_actions(conn: Connection) -> list[tuple[str, str, str]]:
    """What operators did: who, what and why."""
    return conn.execute(
        "select actor, outcome, reason from audit.entries"
        " where kind = 'operator' and reason is not null order by xid, id"
    ).fetchall()
