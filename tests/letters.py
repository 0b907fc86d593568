"""Dead letters, made the way events become them: handled in vain until their delays are used up."""

from __future__ import annotations

import json
from typing import Any

from tests.payments import Connection, add_merchant, fact, pay, record

REFUSAL = 'Stripe 400 parameter_invalid: currency "usx"'


def give_up(
    conn: Connection, handler: str, error: str = REFUSAL, *, operation: str | None = None, status: int | None = None
) -> list[str]:
    """Handle what is due for a handler in vain, as often as it takes: the letters' ids.

    With an `operation` each attempt begins a call, answered with `status`; None leaves its outcome unknown.
    """
    known = {letter for (letter,) in conn.execute("select id from outbox.dead_letters")}
    conn.execute("update outbox.handlers set retry_after = '{0 s,0 s}' where handler = %s", (handler,))
    claim = "select batch_id, fence, event_ids from outbox.claim(%s, 'worker-1')"
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
        conn.execute("select surety.record_results(%s, %s, 'worker:w', %s)", (batch, fence, json.dumps(results)))
    return [
        letter for (letter,) in conn.execute("select id from outbox.dead_letters order by id") if letter not in known
    ]


def letter_of(conn: Connection, payment_id: str) -> str:
    """The open letter of a payment."""
    query = "select id from outbox.dead_letters where payment_id = %s and closed_at is null"
    [(letter,)] = conn.execute(query, (payment_id,)).fetchall()
    return str(letter)


def unsent(conn: Connection, error: str = REFUSAL) -> tuple[str, str]:
    """A letter of a payment for which nothing was sent, and the payment."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    give_up(conn, "submit", error)
    return letter_of(conn, payment_id), payment_id


def refused(conn: Connection) -> tuple[str, str]:
    """A letter of a payment that the provider refused to make."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    give_up(conn, "submit", operation="create", status=400)
    return letter_of(conn, payment_id), payment_id


def unanswered(conn: Connection) -> tuple[str, str]:
    """A letter of a payment of which nobody knows whether the provider has it."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    give_up(conn, "submit", "no answer within 20 s", operation="create")
    return letter_of(conn, payment_id), payment_id


def held(conn: Connection, *, operation: str | None = None, status: int | None = None) -> tuple[str, str]:
    """A letter about confirming a payment that the provider holds, and the payment."""
    [payment_id] = pay(conn, add_merchant(conn)[1])
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim('submit', 'worker-1')").fetchone()
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
    conn.execute("select surety.record_results(%s, %s, 'worker:w', %s)", (*row[:2], json.dumps([answered])))
    give_up(conn, "confirm", operation=operation, status=status)
    return letter_of(conn, payment_id), payment_id


def end(conn: Connection, payment_id: str) -> None:
    """The provider says that it failed."""
    record(conn, [fact(payment_id, "failed", "pi")])


def closed_as(conn: Connection, letter: str) -> str | None:
    row = conn.execute("select closed_as from outbox.dead_letters where id = %s", (letter,)).fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])


def doings(conn: Connection) -> list[tuple[str, str, str]]:
    """What operators did: who, what and why."""
    return conn.execute(
        "select actor, outcome, reason from audit.entries"
        " where kind = 'operator' and reason is not null order by xid, id"
    ).fetchall()
