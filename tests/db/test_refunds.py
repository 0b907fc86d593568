"""Refunds: a request reserves its amount at once, facts end alike in any order, and refunds made at the provider are
booked and reported.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from tests.support.http_client import Merchant, broken_rules, problem, running_server
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    command,
    fact,
    ledger_of,
    money,
    pay,
    record,
    violations,
)


def captured(conn: Connection, key: bytes, **fields: Any) -> str:
    [payment_id] = pay(conn, key, **fields)
    currency = fields.get("currency", "usd")
    result = [fact(payment_id, *what, 10000, currency=currency) for what in (("submitted", "pi"), ("captured", "ch"))]
    record(conn, result)
    return payment_id


def ask(conn: Connection, key: bytes, payment_id: str, amount: int | None = None, **more: Any) -> dict[str, Any]:
    return command(conn, "create_refund", key, payment_id=payment_id, amount=amount, **more)


def refund_fact(payment_id: str, refund_id: str, kind: str, amount: int, object_id: str = "re") -> Fact:
    """What the provider says of a refund of ours."""
    return fact(payment_id, kind, object_id, amount, data={"refund": refund_id})


def amounts(conn: Connection, payment_id: str) -> tuple[str, int, int]:
    query = "select state, refunded_minor, refund_pending_minor from surety.payments where id = %s"
    row = conn.execute(query, (payment_id,)).fetchone()
    assert row is not None
    return row


def states(conn: Connection, payment_id: str) -> list[tuple[str, int]]:
    """State and amount of each of a payment's refunds."""
    query = "select state, amount_minor from surety.refunds where payment_id = %s order by amount_minor, state"
    return conn.execute(query, (payment_id,)).fetchall()


def test_refund_reserves_its_amount_at_once(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    payment_id = captured(conn, key)
    outcome = ask(conn, key, payment_id, 2500, reason="duplicate", metadata={"why": "twice"})
    assert outcome["status"] == 201
    shown = outcome["body"]
    assert (shown["status"], shown["amount"], shown["payment"]) == ("pending", 2500, payment_id)
    assert (shown["reason"], shown["metadata"]) == ("duplicate", {"why": "twice"})
    assert amounts(conn, payment_id) == ("confirmed", 0, 2500)
    assert ledger_of(conn, payment_id) == {
        "provider_receivable": 10000,
        "pending": 9625,
        "fee_revenue": 375,
        "available": -2500,
        "reserved_for_refunds": 2500,
    }
    events = conn.execute("select type, merchant_id from outbox.events where aggregate_id = %s", (shown["id"],))
    assert events.fetchall() == [("refund.pending", merchant)]
    assert not violations(conn)


def test_refund_that_breaks_the_step_of_its_currency_is_refused(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key, currency="kwd")
    refused = ask(conn, key, payment_id, 1234)
    assert (refused["detail"]["rule"], refused["detail"]["limit"]) == ("multiple", 10)
    record(conn, [fact(payment_id, "dispute_lost", "dp", 1234, currency="kwd", revision=1)])
    record(conn, [fact(payment_id, "dispute_won", "dp", 1234, currency="kwd", revision=2)])
    assert ask(conn, key, payment_id, 1230)["status"] == 201
    assert ask(conn, key, payment_id)["body"]["amount"] == 8770


def test_refund_beyond_capture_is_refused(conn: Connection) -> None:
    _, key = add_merchant(conn)
    captured(conn, key)
    payment_id = captured(conn, key)
    assert ask(conn, key, payment_id, 6000)["status"] == 201
    refused = ask(conn, key, payment_id, 4001)
    assert (refused["detail"]["rule"], refused["detail"]["limit"]) == ("maximum", 4000)
    assert ask(conn, key, payment_id)["body"]["amount"] == 4000, "without an amount, the rest"
    assert ask(conn, key, payment_id, 1)["problem"] == "wrong-state"
    assert states(conn, payment_id) == [("pending", 4000), ("pending", 6000)]
    assert not violations(conn)


@pytest.mark.parametrize("state", ["initiated", "authorized", "disputed", "failed"])
def test_uncaptured_or_disputed_payment_is_not_refunded(conn: Connection, state: str) -> None:
    _, key = add_merchant(conn)
    captured(conn, key)
    [payment_id] = pay(conn, key, capture_method="manual")
    facts: dict[str, list[Fact]] = {
        "initiated": [],
        "authorized": [fact(payment_id, "authorized", "ch", 10000)],
        "disputed": [fact(payment_id, "captured", "ch", 10000), fact(payment_id, "dispute_opened", "dp", 4000)],
        "failed": [fact(payment_id, "failed", "pi")],
    }
    if facts[state]:
        record(conn, facts[state])
    outcome = ask(conn, key, payment_id, 100)
    assert (outcome["problem"], outcome["detail"]["state"]) == ("wrong-state", state)


def test_refund_must_be_covered_by_the_merchant_balance(conn: Connection) -> None:
    """A merchant whose only payment this is can refund all of it, although our fee lowered the balance."""
    _, key = add_merchant(conn)
    first, second = captured(conn, key), captured(conn, key)
    record(conn, [fact(first, "dispute_opened", "dp", 10000)])
    refused = ask(conn, key, second)
    assert (refused["status"], refused["problem"]) == (None, "balance-too-low")
    assert refused["detail"] == {"needed": 10000, "balance": 9250, "currency": "usd"}
    assert states(conn, second) == []
    assert ask(conn, key, second, 9600)["status"] == 201
    _, alone = add_merchant(conn)
    assert ask(conn, alone, captured(conn, alone))["status"] == 201


def arrived_in_dollars(conn: Connection, key: bytes, cents: int, rate: str) -> str:
    """A payment of 100 euros that has settled, for so many dollars' cents."""
    payment_id = captured(conn, key, currency="eur")
    data = {"other_currency": "eur", "other_gross": 10000, "rate": rate}
    record(conn, [money(payment_id, "txn", "charge", cents, 345, data=data)])
    record(conn, [fact(payment_id, "available", "txn", cents)])
    return payment_id


# 0.7351 * 9625 is 7075.3, and 7075 / 0.7351 is 9624.5: back and forth loses a cent.
@pytest.mark.parametrize(("cents", "rate"), [(10850, "1.085"), (7351, "0.7351"), (6700, "0.67")])
def test_payment_settled_in_another_currency_can_be_refunded_from_its_own_proceeds(
    conn: Connection, cents: int, rate: str
) -> None:
    _, key = add_merchant(conn)
    payment_id = arrived_in_dollars(conn, key, cents, rate)
    assert ask(conn, key, payment_id, 4000)["status"] == 201
    assert ask(conn, key, payment_id)["status"] == 201
    assert states(conn, payment_id) == [("pending", 4000), ("pending", 6000)]
    assert not violations(conn)


def test_refund_of_exchanged_money_must_be_covered_by_both_currencies_together(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = arrived_in_dollars(conn, key, 10850, "1.085")
    another = arrived_in_dollars(conn, key, 10850, "1.085")
    record(conn, [fact(another, "dispute_opened", "dp", 10000, currency="eur")])
    refused = ask(conn, key, payment_id, 9626)
    assert (refused["status"], refused["problem"]) == (None, "balance-too-low")
    assert refused["detail"] == {"needed": 9626, "balance": 9249, "currency": "eur"}
    assert ask(conn, key, payment_id, 9625)["status"] == 201
    assert ledger_of(conn)["available eur"] == -19625
    assert not violations(conn)


def test_dollars_of_other_payments_cover_a_refund_in_euros_only_where_it_was_exchanged(conn: Connection) -> None:
    _, key = add_merchant(conn)
    captured(conn, key)
    record(conn, [fact(captured(conn, key, currency="eur"), "dispute_opened", "dp", 10000, currency="eur")])
    in_euros, in_dollars = captured(conn, key, currency="eur"), arrived_in_dollars(conn, key, 10850, "1.085")
    assert ask(conn, key, in_dollars)["status"] == 201
    assert ask(conn, key, in_euros)["problem"] == "balance-too-low"


def test_same_key_gets_the_same_refund(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    first = ask(conn, key, payment_id, 2500, idempotency_key="mine")
    assert ask(conn, key, payment_id, 2500, idempotency_key="mine") == first | {"is_replayed": True}
    assert (
        ask(conn, key, payment_id, 2600, idempotency_key="mine", request_hash="01")["problem"]
        == "idempotency-key-reused"
    )
    assert states(conn, payment_id) == [("pending", 2500)]


def test_refund_ends_the_same_in_every_order_of_facts(conn: Connection) -> None:
    _, key = add_merchant(conn)
    for _ in range(3):
        captured(conn, key)
    orders = list(itertools.permutations(range(5)))
    payments = pay(conn, key, len(orders))
    record(conn, [fact(payment_id, "submitted", "pi", 10000) for payment_id in payments])
    record(conn, [fact(payment_id, "captured", "ch", 10000) for payment_id in payments])
    facts = []
    for payment_id in payments:
        refund_id = ask(conn, key, payment_id, 2500)["body"]["id"]
        kinds = ("refund_pending", "refund_action", "refund_succeeded", "refund_failed")
        facts.append([refund_fact(payment_id, refund_id, kind, 2500) for kind in kinds])
        facts[-1].append(money(payment_id, "txn", "refund", -2500))
    for place in range(5):
        record(conn, [facts[n][order[place]] for n, order in enumerate(orders)])
    ends = {
        (*states(conn, payment_id), *amounts(conn, payment_id), json.dumps(ledger_of(conn, payment_id), sort_keys=True))
        for payment_id in payments
    }
    assert len(ends) == 1 and next(iter(ends))[0] == ("failed", 2500), ends
    assert not violations(conn)


def test_late_failed_refund_is_credited_back_and_may_be_repeated(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    refund_id = ask(conn, key, payment_id)["body"]["id"]
    record(
        conn, [refund_fact(payment_id, refund_id, "refund_succeeded", 10000), money(payment_id, "t1", "refund", -10000)]
    )
    assert amounts(conn, payment_id) == ("refunded", 10000, 0)
    failed = refund_fact(payment_id, refund_id, "refund_failed", 10000)
    failed["data"]["failure"] = {"code": "lost_or_stolen_card"}
    record(conn, [failed, money(payment_id, "t2", "refund_failure", 10000)])
    assert amounts(conn, payment_id) == ("confirmed", 0, 0)
    row = conn.execute("select state, failure ->> 'code' from surety.refunds").fetchone()
    assert row == ("failed", "lost_or_stolen_card")
    assert ledger_of(conn, payment_id) == {"provider_receivable": 10000, "pending": 9625, "fee_revenue": 375}
    assert ask(conn, key, payment_id)["status"] == 201
    assert not violations(conn)


def test_refund_made_at_the_provider_is_recorded(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [fact(payment_id, "refund_succeeded", "re", 3000), money(payment_id, "txn", "refund", -3000)])
    assert amounts(conn, payment_id) == ("partially_refunded", 3000, 0)
    assert conn.execute("select state, is_ours from surety.refunds").fetchall() == [("succeeded", False)]
    assert conn.execute("select kind from surety.discrepancies").fetchall() == []
    assert ask(conn, key, payment_id, 7001)["detail"]["limit"] == 7000
    assert not violations(conn)


def test_external_refund_beyond_capture_is_posted_and_a_discrepancy(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    for name in ("a", "b"):
        record(conn, [fact(payment_id, "refund_succeeded", f"re_{name}", 6000)])
        record(conn, [money(payment_id, f"txn_{name}", "refund", -6000)])
    assert amounts(conn, payment_id) == ("refunded", 10000, 0)
    assert ledger_of(conn, payment_id)["available"] == -12000
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("amount", "critical")]
    assert not violations(conn)


def test_refund_with_another_amount_is_posted_with_its_real_amount(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    refund_id = ask(conn, key, payment_id, 2500)["body"]["id"]
    record(
        conn, [refund_fact(payment_id, refund_id, "refund_succeeded", 2600), money(payment_id, "txn", "refund", -2600)]
    )
    assert states(conn, payment_id) == [("succeeded", 2600)]
    assert ledger_of(conn, payment_id)["available"] == -2600
    assert "reserved_for_refunds" not in ledger_of(conn, payment_id)
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("amount", "critical")]
    assert not violations(conn)


def test_a_second_object_for_one_refund_is_a_refund_of_its_own_and_critical(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    refund_id = ask(conn, key, payment_id, 2500)["body"]["id"]
    record(conn, [refund_fact(payment_id, refund_id, "refund_succeeded", 2500, "re_1")])
    record(conn, [refund_fact(payment_id, refund_id, "refund_succeeded", 2500, "re_2")])
    assert amounts(conn, payment_id) == ("partially_refunded", 5000, 0)
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("duplicate", "critical")]
    assert not violations(conn)


def test_two_captures_of_one_payment_credit_the_merchant_once(conn: Connection) -> None:
    _, key = add_merchant(conn)
    for order in ((0, 1), (1, 0)):
        [payment_id] = pay(conn, key)
        facts = [fact(payment_id, "captured", "ch_1", 7000), fact(payment_id, "captured", "ch_2", 10000)]
        for place in order:
            record(conn, [facts[place]])
        assert ledger_of(conn, payment_id) == {
            "provider_receivable": 17000,
            "pending": 9625,
            "fee_revenue": 375,
            "suspense": 7000,
        }
    together = pay(conn, key)[0]
    record(conn, [fact(together, "captured", "ch_1", 7000), fact(together, "captured", "ch_2", 10000)])
    assert ledger_of(conn, together) == {
        "provider_receivable": 17000,
        "pending": 9625,
        "fee_revenue": 375,
        "suspense": 7000,
    }


# -------------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize(
    ("version", "from_state", "to_state", "constraint"),
    [
        (2, "pending", "pending", "refund_step_is_legal"),
        (2, "succeeded", "failed", "refund_step_starts_where_the_last_ended"),
        (3, "pending", "failed", "refund_step_starts_where_the_last_ended"),
        (1, None, "succeeded", "first_refund_step_is_pending"),
        (2, None, "failed", "only_the_first_refund_step_starts_nowhere"),
    ],
)
def test_a_refunds_steps_form_a_chain(
    conn: Connection, version: int, from_state: str | None, to_state: str, constraint: str
) -> None:
    _, key = add_merchant(conn)
    refund_id = ask(conn, key, captured(conn, key), 100)["body"]["id"]
    with pytest.raises(psycopg.IntegrityError) as refused:
        conn.execute(
            "insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)"
            " values (%s, %s, %s, %s, 'test', now(), 'test')",
            (refund_id, version, from_state, to_state),
        )
    assert refused.value.diag.constraint_name == constraint


def test_every_pair_of_a_refunds_states_is_legal_or_refused(conn: Connection) -> None:
    _, key = add_merchant(conn)
    captured(conn, key)
    listed = [row[0] for row in conn.execute("select state from surety.refund_states order by position")]
    legal = set(conn.execute("select from_state, to_state from surety.refund_transitions").fetchall())
    assert (len(listed), len(legal)) == (5, 10)
    step = (
        "insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, %s, %s, %s, 'test', now(), 'test')"
    )
    payment_id = captured(conn, key)
    for here in listed:
        refund_id = ask(conn, key, payment_id, 100)["body"]["id"]
        if here != "pending":
            conn.execute(step, (refund_id, 2, "pending", here))
        for there in listed:
            values = (refund_id, 2 if here == "pending" else 3, here, there)
            with conn.transaction(force_rollback=True):
                if (here, there) in legal:
                    conn.execute(step, values)
                else:
                    with pytest.raises(errors.ForeignKeyViolation, match="refund_step_is_legal"):
                        conn.execute(step, values)


def test_a_refunds_state_cannot_be_set_beside_its_steps(conn: Connection) -> None:
    _, key = add_merchant(conn)
    ask(conn, key, captured(conn, key), 100)
    with pytest.raises(errors.ForeignKeyViolation) as refused:
        conn.execute("update surety.refunds set state = 'succeeded'")
    assert refused.value.diag.constraint_name == "refund_state_is_its_last_step"


# -------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def merchant(conn: Connection, database: str) -> Iterator[Merchant]:
    with running_server("api", database) as api:
        merchant = Merchant(conn, api.url)
        with merchant.client:
            yield merchant


def test_api_creates_shows_and_lists_refunds(conn: Connection, merchant: Merchant) -> None:
    payment = merchant.pay(amount=10000)
    record(conn, [fact(payment["id"], "submitted", "pi", 10000), fact(payment["id"], "captured", "ch", 10000)])
    path = f"/v1/payments/{payment['id']}/refunds"
    answer = merchant.client.post(path, json={"amount": 2500}, headers={"Idempotency-Key": "a"})
    assert answer.status_code == 201, answer.text
    shown = answer.json()
    assert answer.headers["location"] == f"/v1/refunds/{shown['id']}"
    assert merchant.get(f"/v1/refunds/{shown['id']}") == shown
    again = merchant.client.post(path, json={"amount": 2500}, headers={"Idempotency-Key": "a"})
    assert (again.content, again.headers["idempotency-replayed"]) == (answer.content, "true")
    other = merchant.client.post(path, json={}, headers={"Idempotency-Key": "b"}).json()
    assert merchant.get("/v1/refunds")["data"] == [other, shown]
    page = merchant.get("/v1/refunds", payment=payment["id"], limit=1)
    assert (page["data"], page["has_more"]) == ([other], True)
    assert merchant.get("/v1/refunds", starting_after=other["id"])["data"] == [shown]
    assert merchant.get("/v1/refunds", payment=f"pay_{24 * '0'}")["data"] == []
    result = [event for event in merchant.get("/v1/events")["data"] if event["type"] == "refund.pending"]
    assert [event["data"] for event in result] == [shown, other]
    problem(merchant.client.get(f"/v1/refunds/ref_{24 * '0'}"), 404, "not-found")
    problem(merchant.client.post(path, json={}, headers={"Idempotency-Key": "c"}), 409, "wrong-state")
    answer = merchant.client.post(path, json={"reason": "boredom", "amount": 1.5}, headers={"Idempotency-Key": "d"})
    assert broken_rules(answer) == {("/reason", "one_of"), ("/amount", "type")}


def test_refunds_of_another_merchant_do_not_exist(conn: Connection, merchant: Merchant) -> None:
    _, key = add_merchant(conn)
    refund_id = ask(conn, key, captured(conn, key), 100)["body"]["id"]
    problem(merchant.client.get(f"/v1/refunds/{refund_id}"), 404, "not-found")
    assert merchant.get("/v1/refunds")["data"] == []
