"""Warnings of fraud: facts that move neither state nor money, shown by their payment, and announced to the merchant."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.payments import Connection, Fact, add_merchant, fact, ledger_of, pay, record, state_of, violations

MADE_AT = "2026-11-20T00:00:00Z"


def warning(payment_id: str | None, name: str = "issfr", *, closed: bool = False, **fields: Any) -> Fact:
    kind = "fraud_warning_closed" if closed else "fraud_warning"
    fields = {"occurred_at": MADE_AT, "data": {"type": "misc", "source": "ch"}, "currency": None, **fields}
    return fact(payment_id, kind, name, **fields)


def captured(conn: Connection) -> str:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 10000)])
    return payment_id


def shown(conn: Connection, payment_id: str) -> Any:
    query = "select d.document -> 'fraud_warning' from surety.payments as p cross join api.show_payment(p) as d"
    [(found,)] = conn.execute(f"{query} where p.id = %s".encode(), (payment_id,)).fetchall()
    return found


def announced(conn: Connection) -> list[bool]:
    """Whether the warning was actionable in each event of the merchant."""
    query = """
        select s.document -> 'data' -> 'fraud_warning' -> 'actionable'
        from outbox.events as e cross join api.show_events(array[e.id]) as s
        where e.type = 'payment.fraud_warning' and e.merchant_id is not null
        order by e.id
    """
    return [row[0] for row in conn.execute(query.encode())]


def test_warning_is_shown_and_announced_and_moves_neither_state_nor_money(conn: Connection) -> None:
    payment_id = captured(conn)
    before = ledger_of(conn)
    assert shown(conn, payment_id) is None
    assert record(conn, [warning(payment_id)]) == ["payment.fraud_warning"]
    assert shown(conn, payment_id) == {"type": "misc", "actionable": True, "at": "2026-11-20T00:00:00.000Z"}
    assert record(conn, [warning(payment_id)]) == [], "known facts change nothing"
    assert record(conn, [warning(payment_id, closed=True)]) == ["payment.fraud_warning"]
    assert shown(conn, payment_id)["actionable"] is False
    assert announced(conn) == [True, False]
    assert (state_of(conn, payment_id), ledger_of(conn)) == ("confirmed", before)
    assert not violations(conn)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_warning_does_not_depend_on_the_order_of_its_facts(conn: Connection, order: tuple[int, ...]) -> None:
    payment_id = captured(conn)
    facts = [
        warning(payment_id, "issfr_1", occurred_at="2026-11-19T00:00:00Z"),
        warning(payment_id, "issfr_2"),
        warning(payment_id, "issfr_2", closed=True),
    ]
    for number in order:
        record(conn, [facts[number]])
    assert shown(conn, payment_id) == {"type": "misc", "actionable": False, "at": "2026-11-20T00:00:00.000Z"}
    assert not violations(conn)


def test_warning_finds_its_payment_by_intent_or_charge_and_waits_until_it_is_known(conn: Connection) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    by_charge = {"type": "misc", "source": "ch_7"}
    record(conn, [warning(None, "by_intent", intent="pi_7"), warning(None, "by_charge", data=by_charge)])
    proof = {"objects": ["pi_7", "ch_7"]}
    record(conn, [fact(payment_id, "submitted", "pi", 10000, **proof), fact(payment_id, "captured", "ch", 10000)])
    assert conn.execute("select surety.retry_unmatched_facts()").fetchone() == (["payment.fraud_warning"],)
    assert [row[0] for row in conn.execute("select ended_as from surety.unmatched_facts")] == ["matched"] * 2
    assert shown(conn, payment_id)["actionable"]
    assert not violations(conn)


def test_warning_of_another_system_is_foreign_and_books_nothing(conn: Connection) -> None:
    add_merchant(conn)
    record(conn, [warning(None)])
    conn.execute("update surety.unmatched_facts set recorded_at = now() - interval '16 minutes'")
    assert conn.execute("select surety.retry_unmatched_facts()").fetchone() == ([],)
    assert conn.execute("select kind from surety.discrepancies").fetchall() == [("foreign",)]
    assert ledger_of(conn) == {}


def test_warning_of_another_account_or_mode_is_disregarded_and_a_discrepancy(conn: Connection) -> None:
    payment_id = captured(conn)
    assert record(conn, [warning(payment_id, account="acct_other")]) == []
    assert shown(conn, payment_id) is None
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("account", "critical")]
    assert not violations(conn)


def test_warning_alone_leads_a_payment_nowhere(conn: Connection) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    record(conn, [warning(payment_id)])
    assert state_of(conn, payment_id) == "initiated"
    assert shown(conn, payment_id)["actionable"]
    assert not violations(conn)


def test_trace_and_summary_name_the_warning_while_it_can_be_acted_on(conn: Connection) -> None:
    payment_id = captured(conn)
    record(conn, [warning(payment_id)])
    open_work = "select still_open from surety.payment_summary(%s)"
    lines = [row[0] for row in conn.execute("select summary from surety.trace_payment(%s)", (payment_id,))]
    assert any(line.startswith("fraud warning, misc (issfr_") for line in lines), lines
    [(found,)] = conn.execute(open_work, (payment_id,)).fetchall()
    assert "fraud warning, misc: a refund may avoid a dispute" in found
    record(conn, [warning(payment_id, closed=True)])
    [(found,)] = conn.execute(open_work, (payment_id,)).fetchall()
    assert not any("fraud" in line for line in found)
