"""Losses in disputes: a payment with one never settles after it, whatever comes first."""

from __future__ import annotations

import itertools

from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    fact,
    ledger_of,
    money,
    path_of,
    pay,
    record,
    violations,
)


def dispute_lost_in_part_before_settlement(p: str) -> list[Fact]:
    return [
        fact(p, "captured", "ch", 10000),
        fact(p, "dispute_opened", "dp", 10000, revision=1),
        fact(p, "dispute_lost", "dp", 9950, revision=2),
        money(p, "txn", "charge", 10000, 320),
        fact(p, "available", "txn", 10000),
    ]


def test_payment_with_a_loss_never_settles_after_it_whatever_the_order(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    orders = list(itertools.permutations(range(5)))
    payments = pay(conn, key_hash, len(orders))
    histories = [dispute_lost_in_part_before_settlement(payment_id) for payment_id in payments]
    for place in range(5):
        record(conn, [facts[order[place]] for facts, order in zip(histories, orders, strict=True)])
        record(conn, [facts[order[0]] for facts, order in zip(histories, orders, strict=True)])
    ends = conn.execute("select distinct state, captured_minor, reversed_minor from surety.payments").fetchall()
    assert ends == [("reversed", 10000, 9950)]
    for payment_id, order in zip(payments, orders, strict=True):
        path = path_of(conn, payment_id)
        assert "settled" not in path[path.index("reversed") :], (order, path)
        made = conn.execute(
            "select count(*) from outbox.events where aggregate_id = %s"
            " and type in ('payment.settled', 'payment.money_available')",
            (payment_id,),
        ).fetchone()
        assert made == (1,), "its expected settlement is met once"
        assert ledger_of(conn, payment_id) == {
            "available": 9625 - 9950,
            "provider_balance": 9680,
            "withheld_by_network": -9950,
            "fee_revenue": 375,
            "provider_cost": 320,
        }
    assert not violations(conn)


def test_refund_and_dispute_beyond_the_capture_close_their_discrepancy_when_the_dispute_is_won(
    conn: Connection,
) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re", 2500)])
    record(conn, [fact(payment_id, "dispute_opened", "dp", 10000, revision=0)])
    found = "select kind, severity, closed_at is not null from surety.discrepancies"
    assert conn.execute(found).fetchall() == [("amount", "critical", False)]
    record(conn, [fact(payment_id, "dispute_won", "dp", 10000, revision=1)])
    assert conn.execute(found).fetchall() == [("amount", "critical", True)]
    assert not violations(conn)
