"""Refunds at once, beside network events, and with lost responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.db.test_races import Two, at_once
from tests.db.test_refunds import ask, captured, states
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    fact,
    pay,
    record,
    violations,
)

Doing = Callable[[Connection], object]


def test_two_refunds_at_once_can_not_exceed_what_was_captured(conn: Connection, two: Two) -> None:
    _, key = add_merchant(conn)
    captured(conn, key)
    payment_id = captured(conn, key)
    outcomes: list[str | None] = []

    def asked(connection: Connection) -> None:
        outcomes.append(ask(connection, key, payment_id, 6000)["problem"])

    at_once(conn, two, lambda: asked(two[0]), lambda: asked(two[1]))
    assert outcomes == [None, "invalid-request"]
    assert not violations(conn)


def test_two_refunds_of_two_payments_at_once_can_not_exceed_the_balance(conn: Connection, two: Two) -> None:
    _, key = add_merchant(conn)
    first, second = captured(conn, key), captured(conn, key)
    record(conn, [fact(captured(conn, key), "dispute_opened", "dp", 10000)])
    outcomes: list[Any] = []
    at_once(
        conn,
        two,
        lambda: outcomes.append(ask(two[0], key, first)["problem"]),
        lambda: outcomes.append(ask(two[1], key, second)["problem"]),
    )
    assert outcomes == [None, "balance-too-low"]
    assert not violations(conn)


OTHERS: dict[str, tuple[list[Callable[[str], Fact]], Callable[[str], Fact], Any, Any]] = {
    # what came before, what crosses the refund; the refund's problem if it comes second, and if it comes first
    "capture": ([lambda p: fact(p, "authorized", "ch", 10000)], lambda p: fact(p, "captured", "ch", 10000), None, None),
    "dispute": (
        [lambda p: fact(p, "captured", "ch", 10000)],
        lambda p: fact(p, "dispute_opened", "dp", 10000),
        "wrong-state",
        None,
    ),
    "return": (
        [lambda p: fact(p, "captured", "ch", 10000)],
        lambda p: fact(p, "returned", "return", 10000),
        "wrong-state",
        None,
    ),
}


@pytest.mark.parametrize("first", ["refund", "other"])
@pytest.mark.parametrize("name", OTHERS)
def test_refund_races_with_network_events(conn: Connection, two: Two, name: str, first: str) -> None:
    before, crossing, problem_second, problem_first = OTHERS[name]
    _, key = add_merchant(conn)
    for _ in range(2):
        captured(conn, key)
    [payment_id] = pay(conn, key, capture_method="manual")
    for make_fact in before:
        record(conn, [make_fact(payment_id)])
    outcomes: list[Any] = []

    def refund(connection: Connection) -> None:
        outcomes.append(ask(connection, key, payment_id, 4000)["problem"])

    def other(connection: Connection) -> None:
        record(connection, [crossing(payment_id)])

    doings: list[Doing] = [refund, other] if first == "refund" else [other, refund]
    at_once(conn, two, lambda: doings[0](two[0]), lambda: doings[1](two[1]))
    if name == "capture" and first == "refund":
        assert outcomes == ["wrong-state"]
    else:
        assert outcomes == [problem_second if first == "other" else problem_first]
    assert not violations(conn)


def test_refund_with_a_lost_response_is_retried_at_once(conn: Connection, two: Two) -> None:
    """The client hangs up and repeats while the first is not committed: one refund, one answer."""
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    outcomes: list[dict[str, Any]] = []
    at_once(
        conn,
        two,
        lambda: outcomes.append(ask(two[0], key, payment_id, 2500, idempotency_key="mine")),
        lambda: outcomes.append(ask(two[1], key, payment_id, 2500, idempotency_key="mine")),
    )
    assert outcomes[1] == outcomes[0] | {"is_replayed": True}
    assert states(conn, payment_id) == [("pending", 2500)]
