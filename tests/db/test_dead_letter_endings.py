"""Dead letters that a payment's end resolves, and those that it does not."""

from __future__ import annotations

import pytest

from tests.support.payments import Connection, add_merchant, pay

# A second intent lives on when the payment has ended. Settlements are expected and met after it, and a payment method
# that was proved is saved.
OUTLIVE_THE_PAYMENT = {
    "payment.orphan_found", "payment.confirmed", "payment.settled", "payment.money_available",
    "payment.method_usable",
}  # fmt: skip


@pytest.mark.parametrize("state", ["canceled", "failed"])
def test_end_of_a_payment_closes_what_was_to_be_done_about_its_own_intent(conn: Connection, state: str) -> None:
    _, key = add_merchant(conn)
    ended, other = pay(conn, key, 2)
    conn.execute(
        "insert into outbox.dead_letters (id, handler, event_id, type, payment_id, payload, attempts, reason, died_at)"
        " select surety.new_id('dl', now()), h.handler, surety.new_id('evt', now()), h.event_type, p.id, '{}', '[]',"
        "   'it failed', now()"
        " from outbox.handler_events as h, unnest(%s::text[]) as p (id) where h.event_type like 'payment.%%'",
        ([ended, other],),
    )
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', %s, 'test', now(), 'test')",
        (ended, state),
    )
    rows = conn.execute(
        "select payment_id, type, closed_as, closed_because from outbox.dead_letters order by type"
    ).fetchall()
    types = {type for _, type, _, _ in rows}
    assert types > OUTLIVE_THE_PAYMENT
    assert {type for payment_id, type, closed_as, _ in rows if payment_id == ended and closed_as is None} == (
        OUTLIVE_THE_PAYMENT
    )
    assert {row[2:] for row in rows if row[0] == ended} == {(None, None), ("resolved", f"the payment is {state}")}
    assert {row[2:] for row in rows if row[0] == other} == {(None, None)}
