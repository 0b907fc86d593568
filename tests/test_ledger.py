"""Double entry: what a transfer can't say, and the balances that a payment's history must end with.

The histories are those of a merchant with a fee of 3.4 % + 35 at a provider that takes 2.9 % + 30; cents. Each is tried
in every order of its facts, or, where there are more than 720 orders, in 720 of them drawn from a seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from psycopg import errors

from tests.payments import Connection, Fact, add_merchant, fact, ledger_of, money, pay, record, violations

ORDERS_MAX = 720


def settled(p: str, amount: int = 10000, fee: int = 320) -> list[Fact]:
    return [
        fact(p, "captured", "ch", amount),
        money(p, "txn", "charge", amount, fee),
        fact(p, "available", "txn", amount),
    ]


def payout(p: str, amount: int) -> Fact:
    return money(None, f"po_txn_{p[-8:]}", "payout", amount)


HISTORIES: dict[str, tuple[Callable[[str], list[Fact]], dict[str, int]]] = {
    "1 a card payment settles": (settled, {"avail": 9625, "stripe": 9680, "rev": 375, "cost": 320}),
    "2 and is paid out": (
        lambda p: [*settled(p), payout(p, -9680)],
        {"avail": 9625, "transit": 9680, "rev": 375, "cost": 320},
    ),
    "3 and the payout fails": (
        lambda p: [*settled(p), payout(p, -9680), money(None, f"po_back_{p[-8:]}", "payout_reversal", 9680)],
        {"avail": 9625, "stripe": 9680, "rev": 375, "cost": 320},
    ),
    "4 a hold is captured in part": (
        lambda p: [fact(p, "authorized", "ch", 10000), *settled(p, 7000, 233)],
        {"avail": 6727, "stripe": 6767, "rev": 273, "cost": 233},
    ),
    "4 a hold is captured in part, told by two balance transactions": (
        lambda p: [
            fact(p, "captured", "ch", 7000),
            money(p, "txn", "charge", 10000, 320),
            money(p, "txn_u", "partial_capture_reversal", -3000, -87),
            fact(p, "available", "txn", 10000),
            fact(p, "available", "txn_u", -3000),
        ],
        {"avail": 6727, "stripe": 6767, "rev": 273, "cost": 233},
    ),
    "5 a refund before settlement": (
        lambda p: [*settled(p), fact(p, "refund_succeeded", "re", 2500), money(p, "txn_r", "refund", -2500)],
        {"avail": 7125, "stripe": 7180, "rev": 375, "cost": 320},
    ),
    "6 two refunds, the second fails late": (
        lambda p: [
            *settled(p),
            fact(p, "refund_succeeded", "re_1", 3000),
            fact(p, "refund_succeeded", "re_2", 7000),
            fact(p, "refund_failed", "re_2", 7000),
            money(p, "txn_1", "refund", -3000),
            money(p, "txn_2", "refund", -7000),
            money(p, "txn_3", "refund_failure", 7000),
        ],
        {"avail": 6625, "stripe": 6680, "rev": 375, "cost": 320},
    ),
    "7 a dispute is open": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            money(p, "txn_d", "dispute", -10000, 1500),
        ],
        {"avail": -1875, "held": 10000, "network": 10000, "stripe": -1820, "rev": 1875, "cost": 1820},
    ),
    "8 and won": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            fact(p, "dispute_won", "dp", 10000, revision=2),
            money(p, "txn_d", "dispute", -10000, 1500),
            money(p, "txn_w", "dispute_reversal", 10000),
        ],
        {"avail": 8125, "stripe": 8180, "rev": 1875, "cost": 1820},
    ),
    "9 or lost": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            fact(p, "dispute_lost", "dp", 10000, revision=2),
            money(p, "txn_d", "dispute", -10000, 1500),
        ],
        {"avail": -1875, "stripe": -1820, "rev": 1875, "cost": 1820},
    ),
    "9 and reinstated": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            fact(p, "dispute_lost", "dp", 10000, revision=2),
            fact(p, "dispute_won", "dp", 10000, revision=3),
            money(p, "txn_d", "dispute", -10000, 1500),
            money(p, "txn_w", "dispute_reversal", 10000),
        ],
        {"avail": 8125, "stripe": 8180, "rev": 1875, "cost": 1820},
    ),
    "10 a refund, and a dispute of the rest is lost": (
        lambda p: [
            *settled(p),
            fact(p, "refund_succeeded", "re", 3000),
            money(p, "txn_r", "refund", -3000),
            fact(p, "dispute_opened", "dp", 7000, revision=1),
            fact(p, "dispute_lost", "dp", 7000, revision=2),
            money(p, "txn_d", "dispute", -7000, 1500),
        ],
        {"avail": -1875, "stripe": -1820, "rev": 1875, "cost": 1820},
    ),
    "13 euros arrive as dollars": (
        lambda p: [
            fact(p, "captured", "ch", 10000, currency="eur"),
            money(
                p,
                "txn",
                "charge",
                10850,
                345,
                data={"other_currency": "eur", "other_gross": 10000, "rate": "1.085"},
            ),
            fact(p, "available", "txn", 10850),
        ],
        {
            "rev eur": 375,
            "fx eur": -375,
            "avail": 10443,
            "stripe": 10505,
            "cost": 345,
            "fx": 407,
        },
    ),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_a_history_ends_with_its_balances_in_every_order_of_its_facts(conn: Connection, history: str) -> None:
    tell, balances = HISTORIES[history]
    _, key_hash = add_merchant(conn)
    count = len(tell("pay_" + 32 * "0"))
    orders = list(itertools.permutations(range(count)))
    if len(orders) > ORDERS_MAX:
        orders = random.Random(13).sample(orders, ORDERS_MAX)
    payments = pay(
        conn,
        key_hash,
        len(orders),
        currency="eur" if "euros" in history else "usd",
        capture_method="manual" if "hold" in history else "automatic",
    )
    told = [tell(payment_id) for payment_id in payments]
    for place in range(count):
        record(conn, [facts[order[place]] for facts, order in zip(told, orders, strict=True)])
    assert ledger_of(conn) == {account: total * len(orders) for account, total in balances.items()}
    assert not violations(conn)


def test_a_transfer_can_be_neither_unbalanced_nor_empty_nor_circular(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, settled(payment_id))
    row = conn.execute("select posting_id, debit_account, credit_account from ledger.transfers limit 1").fetchone()
    assert row is not None
    insert = (
        "insert into ledger.transfers (posting_id, leg, debit_account, credit_account, amount_minor, currency)"
        " values (%s, 9, %s, %s, %s, %s)"
    )
    posting, debit, credit = row
    for values, refusal in {
        (posting, debit, credit, 0, "usd"): "transfer_moves_a_positive_amount",
        (posting, debit, credit, -5, "usd"): "transfer_moves_a_positive_amount",
        (posting, debit, debit, 5, "usd"): "transfer_moves_between_two_accounts",
        (posting, debit, credit, 5, "eur"): "in_its_currency",
        ("pst_" + 32 * "0", debit, credit, 5, "usd"): "transfer_belongs_to_a_posting",
    }.items():
        with pytest.raises((errors.CheckViolation, errors.ForeignKeyViolation)) as error:
            conn.execute(insert, values)
        assert refusal in str(error.value.diag.constraint_name)


def test_a_cause_posts_once(conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, settled(payment_id))
    before = ledger_of(conn)
    conn.execute(
        "select ledger.post(array[row('ch_x:captured', 'captured', %(p)s, %(m)s, 'stripe/', 'usd', 5, null, null, 1,"
        " null, null, null, null)::ledger.entry], now())",
        {"p": payment_id, "m": merchant},
    )
    conn.execute(
        "select ledger.post(array[row('ch_x:captured', 'captured', %(p)s, %(m)s, 'stripe/', 'usd', 7, null, null, 1,"
        " null, null, null, null)::ledger.entry], now())",
        {"p": payment_id, "m": merchant},
    )
    assert ledger_of(conn)["due"] == before.get("due", 0) + 5


def test_every_kind_of_account_and_every_rule_is_one_of_the_chart(conn: Connection) -> None:
    unruled = conn.execute(
        "select distinct p.rule from ledger.postings as p left join ledger.rules as r on r.cause = p.rule"
        " where r.cause is null"
    )
    assert unruled.fetchall() == []
    kept = conn.execute("select array_agg(kind order by kind) from ledger.account_kinds where keeps_balance").fetchone()
    assert kept == (["avail", "held", "pend", "refunding"],)


def test_an_unknown_category_leaves_no_money_unbooked(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [*settled(payment_id), money(payment_id, "txn_odd", "a_category_of_tomorrow", -120)])
    assert ledger_of(conn)["suspense"] == -120
    assert conn.execute("select kind from surety.discrepancies").fetchall() == [("category",)]


@pytest.mark.parametrize(("amount", "fee"), [(10000, 375), (7000, 273), (50, 37), (1, 1), (99999999, 3400035)])
def test_our_fee_is_rounded_half_up_and_never_above_the_amount(conn: Connection, amount: int, fee: int) -> None:
    assert conn.execute("select ledger.fee(%s, 340, 35)", (amount,)).fetchone() == (fee,)
