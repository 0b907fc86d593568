"""Double entry: what a transfer can't say, and the balances that a payment's history must end with.

The histories are those of a merchant with a fee of 3.4 % + 35 at a provider that takes 2.9 % + 30, or for ACH of 1 %;
cents. Each is tried in every order of its facts, or, where there are more than 720 orders, in 720 of them drawn from a
seed.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import errors

from db.connect import harden
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    as_bank_fact,
    fact,
    ledger_of,
    money,
    pay,
    record,
    violations,
)

ORDERS_MAX = 720
# Of those histories that come beside the thirteen.
VARIANTS_ORDERS_MAX = 120
THIRTEEN = frozenset(map(str, range(1, 14)))


def settled(p: str, amount: int = 10000, fee: int = 320) -> list[Fact]:
    return [
        fact(p, "captured", "ch", amount),
        money(p, "txn", "charge", amount, fee),
        fact(p, "available", "txn", amount),
    ]


def payout(p: str, amount: int, category: str = "payout") -> Fact:
    return money(None, f"{category}_{p[-12:]}", category, amount)


def bank_line(p: str, amount: int) -> Fact:
    return money(None, f"line_{'in' if amount > 0 else 'out'}_{p[-12:]}", "bank_line", amount)


def euros(p: str, kind: str, object_id: str, **fields: Any) -> Fact:
    return fact(p, kind, object_id, 10000, currency="eur", **fields)


def exchanged(
    p: str, object_id: str, category: str, amount: int, fee: int = 0, *, other: int, rate: str = "1.085"
) -> Fact:
    """A balance transaction in dollars for so many cents of a euro."""
    data = {"other_currency": "eur", "other_gross": other, "rate": rate}
    return money(p, object_id, category, amount, fee, data=data)


def settled_in_dollars(p: str) -> list[Fact]:
    return [
        euros(p, "captured", "ch"),
        exchanged(p, "txn", "charge", 10850, 345, other=10000),
        fact(p, "available", "txn", 10850),
    ]


def by_bank(p: str) -> list[Fact]:
    """Fifty thousand cents of ACH: the bank credited and confirmed them."""
    return [as_bank_fact(money(p, "credit", "ach_credit", 50000)), as_bank_fact(fact(p, "captured", "entry", 50000))]


def came_back(p: str, kind: str, amount: int, fee: int = 0) -> list[Fact]:
    """What the bank says of a return: its status, and the money."""
    return [
        as_bank_fact(fact(p, kind, "return", 50000)),
        as_bank_fact(money(p, f"txn_{kind}", "ach_return", amount, fee)),
    ]


HISTORIES: dict[str, tuple[Callable[[str], list[Fact]], dict[str, int]]] = {
    "1 a card payment settles": (
        settled,
        {"available": 9625, "provider_balance": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    "2 and is paid out": (
        lambda p: [*settled(p), payout(p, -9680), bank_line(p, 9680)],
        {"available": 9625, "bank": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    "2 and is on its way to the bank": (
        lambda p: [*settled(p), payout(p, -9680)],
        {"available": 9625, "in_transit": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    "3 and the payout fails after it was paid": (
        lambda p: [
            *settled(p),
            payout(p, -9680),
            bank_line(p, 9680),
            bank_line(p, -9680),
            payout(p, 9680, "payout_reversal"),
        ],
        {"available": 9625, "provider_balance": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    "3 and the payout fails on its way": (
        lambda p: [*settled(p), payout(p, -9680), payout(p, 9680, "payout_reversal")],
        {"available": 9625, "provider_balance": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    "4 a hold is captured in part": (
        lambda p: [fact(p, "authorized", "ch", 10000), *settled(p, 7000, 233)],
        {"available": 6727, "provider_balance": 6767, "fee_revenue": 273, "provider_cost": 233},
    ),
    "4 a hold is captured in part, in two balance transactions": (
        lambda p: [
            fact(p, "captured", "ch", 7000),
            money(p, "txn", "charge", 10000, 320),
            money(p, "txn_u", "partial_capture_reversal", -3000, -87),
            fact(p, "available", "txn", 10000),
            fact(p, "available", "txn_u", -3000),
        ],
        {"available": 6727, "provider_balance": 6767, "fee_revenue": 273, "provider_cost": 233},
    ),
    "5 a refund before settlement": (
        lambda p: [*settled(p), fact(p, "refund_succeeded", "re", 2500), money(p, "txn_r", "refund", -2500)],
        {"available": 7125, "provider_balance": 7180, "fee_revenue": 375, "provider_cost": 320},
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
        {"available": 6625, "provider_balance": 6680, "fee_revenue": 375, "provider_cost": 320},
    ),
    "7 a dispute is open": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            money(p, "txn_d", "dispute", -10000, 1500),
        ],
        {
            "available": -1875,
            "disputed": 10000,
            "withheld_by_network": 10000,
            "provider_balance": -1820,
            "fee_revenue": 1875,
            "provider_cost": 1820,
        },
    ),
    "8 and won": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            fact(p, "dispute_won", "dp", 10000, revision=2),
            money(p, "txn_d", "dispute", -10000, 1500),
            money(p, "txn_w", "dispute_reversal", 10000),
        ],
        {"available": 8125, "provider_balance": 8180, "fee_revenue": 1875, "provider_cost": 1820},
    ),
    "9 or lost": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_opened", "dp", 10000, revision=1),
            fact(p, "dispute_lost", "dp", 10000, revision=2),
            money(p, "txn_d", "dispute", -10000, 1500),
        ],
        {"available": -1875, "provider_balance": -1820, "fee_revenue": 1875, "provider_cost": 1820},
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
        {"available": 8125, "provider_balance": 8180, "fee_revenue": 1875, "provider_cost": 1820},
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
        {"available": -1875, "provider_balance": -1820, "fee_revenue": 1875, "provider_cost": 1820},
    ),
    "a lost dispute is appealed": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_lost", "dp", 10000, revision=1),
            fact(p, "dispute_opened", "dp", 10000, revision=2),
            money(p, "txn_d", "dispute", -10000, 1500),
        ],
        {
            "available": -1875,
            "disputed": 10000,
            "withheld_by_network": 10000,
            "provider_balance": -1820,
            "fee_revenue": 1875,
            "provider_cost": 1820,
        },
    ),
    "a part of a dispute is won": (
        lambda p: [
            *settled(p),
            fact(p, "dispute_lost", "dp", 10000, revision=1),
            fact(p, "dispute_lost", "dp", 6000, revision=2),
            money(p, "txn_d", "dispute", -10000, 1500),
            money(p, "txn_w", "dispute_reversal", 4000),
        ],
        {"available": 2125, "provider_balance": 2180, "fee_revenue": 1875, "provider_cost": 1820},
    ),
    "what the provider and a bank take for themselves, hold back and don't explain": (
        lambda p: [
            money(None, f"fee_{p[-12:]}", "fee", -200),
            money(None, f"reserve_{p[-12:]}", "risk_reserved_funds", -1000),
            money(p, "odd", "a_category_of_tomorrow", -30),
            as_bank_fact(money(None, f"bank_fee_{p[-12:]}", "fee", -5)),
        ],
        {"provider_balance": -1230, "provider_cost": 205, "reserved": 1000, "suspense": -30, "bank": -5},
    ),
    "11 ACH comes back before it is confirmed": (
        lambda p: [
            as_bank_fact(fact(p, "processing", "entry")),
            as_bank_fact(money(p, "credit", "ach_credit", 50000)),
            *came_back(p, "returned", -50000, 250),
        ],
        {"bank": -250, "provider_cost": 250},
    ),
    "12 ACH settles": (by_bank, {"available": 49500, "bank": 50000, "fee_revenue": 500}),
    "12 ACH comes back after it settled": (
        lambda p: [*by_bank(p), *came_back(p, "returned", -50000, 250)],
        {"available": -500, "bank": -250, "fee_revenue": 500, "provider_cost": 250},
    ),
    "12 ACH, the return is dishonored": (
        lambda p: [*by_bank(p), *came_back(p, "returned", -50000, 250), *came_back(p, "dishonored", 50000)],
        {"available": 49500, "bank": 49750, "fee_revenue": 500, "provider_cost": 250},
    ),
    "12 ACH, the dishonored return is contested": (
        lambda p: [
            *by_bank(p),
            *came_back(p, "returned", -50000, 250),
            *came_back(p, "dishonored", 50000),
            *came_back(p, "contested", -50000),
        ],
        {"available": -500, "bank": -250, "fee_revenue": 500, "provider_cost": 250},
    ),
    "ACH is refunded by the bank": (
        lambda p: [
            *by_bank(p),
            as_bank_fact(fact(p, "refund_succeeded", "re", 20000)),
            as_bank_fact(money(p, "txn_r", "refund", -20000, 25)),
        ],
        {"available": 29500, "bank": 29975, "fee_revenue": 500, "provider_cost": 25},
    ),
    "ACH, and the bank books an unexplained amount": (
        lambda p: [*by_bank(p), as_bank_fact(money(p, "odd", "a_category_of_tomorrow", 700))],
        {"available": 49500, "bank": 50700, "fee_revenue": 500, "suspense": 700},
    ),
    "ACH is refunded by the bank, and the refund comes back": (
        lambda p: [
            *by_bank(p),
            as_bank_fact(fact(p, "refund_succeeded", "re", 20000)),
            as_bank_fact(fact(p, "refund_failed", "re", 20000)),
            as_bank_fact(money(p, "txn_r", "refund", -20000, 25)),
            as_bank_fact(money(p, "txn_f", "refund_failure", 20000)),
        ],
        {"available": 49500, "bank": 49975, "fee_revenue": 500, "provider_cost": 25},
    ),
    "ACH at Stripe fails before it is confirmed": (
        lambda p: [
            money(p, "txn", "charge", 50000, 500),
            fact(p, "returned", "txn_f", 50000),
            money(p, "txn_f", "charge_failure", -50000, 400),
        ],
        {"provider_balance": -900, "provider_cost": 900},
    ),
    "ACH at Stripe fails after it settled": (
        lambda p: [
            *settled(p, 50000, 500),
            fact(p, "returned", "txn_f", 50000),
            money(p, "txn_f", "charge_failure", -50000, 400),
        ],
        {"available": -500, "provider_balance": -900, "fee_revenue": 500, "provider_cost": 900},
    ),
    "13 euros arrive as dollars": (
        settled_in_dollars,
        {
            "fee_revenue eur": 375,
            "currency_exchange eur": -375,
            "available": 10443,
            "provider_balance": 10505,
            "provider_cost": 345,
            "currency_exchange": 407,
        },
    ),
    "13 euros of a hold are captured in part and arrive as dollars, in two balance transactions": (
        lambda p: [
            fact(p, "captured", "ch", 7000, currency="eur"),
            exchanged(p, "txn", "charge", 10850, 345, other=10000),
            exchanged(p, "txn_u", "partial_capture_reversal", -3255, -94, other=-3000),
            fact(p, "available", "txn", 10850),
            fact(p, "available", "txn_u", -3255),
        ],
        {
            "fee_revenue eur": 273,
            "currency_exchange eur": -273,
            "available": 7299,
            "provider_balance": 7595 - 251,
            "provider_cost": 251,
            "currency_exchange": 7595 - 7299,
        },
    ),
    "14 euros are refunded when a dollar is worth less": (
        lambda p: [
            *settled_in_dollars(p),
            fact(p, "refund_succeeded", "re", 2500, currency="eur"),
            exchanged(p, "txn_r", "refund", -2750, other=-2500, rate="1.1"),
        ],
        {
            "fee_revenue eur": 375,
            "currency_exchange eur": -375,
            "available": 10443 - 2750,
            "provider_balance": 10505 - 2750,
            "provider_cost": 345,
            "currency_exchange": 407,
        },
    ),
    "14 euros are refunded, and the refund comes back": (
        lambda p: [
            *settled_in_dollars(p),
            euros(p, "refund_succeeded", "re"),
            euros(p, "refund_failed", "re"),
            exchanged(p, "txn_r", "refund", -11000, other=-10000, rate="1.1"),
            exchanged(p, "txn_f", "refund_failure", 10900, other=10000, rate="1.09"),
        ],
        {
            "fee_revenue eur": 375,
            "currency_exchange eur": -375,
            "available": 10443 - 100,
            "provider_balance": 10505 - 100,
            "provider_cost": 345,
            "currency_exchange": 407,
        },
    ),
    "15 euros are disputed": (
        lambda p: [
            *settled_in_dollars(p),
            euros(p, "dispute_opened", "dp", revision=1),
            exchanged(p, "txn_d", "dispute", -11000, 1500, other=-10000, rate="1.1"),
        ],
        {
            "fee_revenue eur": 375,
            "currency_exchange eur": -375,
            "disputed eur": 10000,
            "withheld_by_network eur": 10000,
            "available": 10443 - 11000 - 1500,
            "provider_balance": 10505 - 11000 - 1500,
            "fee_revenue": 1500,
            "provider_cost": 345 + 1500,
            "currency_exchange": 407,
        },
    ),
    "15 euros are disputed, and it is lost": (
        lambda p: [
            *settled_in_dollars(p),
            euros(p, "dispute_opened", "dp", revision=1),
            euros(p, "dispute_lost", "dp", revision=2),
            exchanged(p, "txn_d", "dispute", -11000, 1500, other=-10000, rate="1.1"),
        ],
        {
            "fee_revenue eur": 375,
            "currency_exchange eur": -375,
            "available": 10443 - 11000 - 1500,
            "provider_balance": 10505 - 11000 - 1500,
            "fee_revenue": 1500,
            "provider_cost": 345 + 1500,
            "currency_exchange": 407,
        },
    ),
    "15 euros are disputed, and it is won": (
        lambda p: [
            *settled_in_dollars(p),
            euros(p, "dispute_opened", "dp", revision=1),
            euros(p, "dispute_won", "dp", revision=2),
            exchanged(p, "txn_d", "dispute", -11000, 1500, other=-10000, rate="1.1"),
            exchanged(p, "txn_w", "dispute_reversal", 10900, other=10000, rate="1.09"),
        ],
        {
            "fee_revenue eur": 375,
            "currency_exchange eur": -375,
            "available": 10443 - 11000 - 1500 + 10900,
            "provider_balance": 10505 - 11000 - 1500 + 10900,
            "fee_revenue": 1500,
            "provider_cost": 345 + 1500,
            "currency_exchange": 407,
        },
    ),
}


def begin(conn: Connection, key_hash: bytes, history: str, count: int = 1) -> list[str]:
    """Payments that can go through a history."""
    return pay(
        conn,
        key_hash,
        count,
        amount=50000 if "ACH" in history else 10000,
        currency="eur" if "euros" in history else "usd",
        rail="ach" if "ACH" in history else "card",
        capture_method="manual" if "hold" in history else "automatic",
    )


@pytest.mark.parametrize("history", HISTORIES)
def test_balances_are_independent_of_fact_order(conn: Connection, history: str) -> None:
    make_facts, balances = HISTORIES[history]
    _, key_hash = add_merchant(conn)
    if "ACH" in history:
        conn.execute("update surety.merchants set fee_basis_points = 100")
        conn.execute("update surety.currencies set fee_fixed_minor = 0")
    count = len(make_facts("pay_" + 24 * "0"))
    orders = list(itertools.permutations(range(count)))
    orders_max = ORDERS_MAX if history.split(maxsplit=1)[0] in THIRTEEN else VARIANTS_ORDERS_MAX
    if len(orders) > orders_max:
        orders = random.Random(13).sample(orders, orders_max)
    result = [make_facts(payment_id) for payment_id in begin(conn, key_hash, history, len(orders))]
    for place in range(count):
        record(conn, [facts[order[place]] for facts, order in zip(result, orders, strict=True)])
    assert ledger_of(conn) == {account: total * len(orders) for account, total in balances.items()}
    assert not violations(conn)


def test_every_ledger_rule_is_covered_by_a_history(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    for history, (make_facts, _) in HISTORIES.items():
        [payment_id] = begin(conn, key_hash, history)
        for result in make_facts(payment_id):
            record(conn, [result])
    # Payouts to merchants come from no fact: tests/db/test_merchant_payouts.py.
    ruled = {row[0] for row in conn.execute("select rule from ledger.rules where rule not like 'merchant%'")}
    assert {row[0] for row in conn.execute("select rule from ledger.postings")} == ruled


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
        ("pst_" + 24 * "0", debit, credit, 5, "usd"): "transfer_belongs_to_a_posting",
    }.items():
        with pytest.raises((errors.CheckViolation, errors.ForeignKeyViolation)) as error:
            conn.execute(insert, values)
        assert refusal in str(error.value.diag.constraint_name)


def test_each_cause_posts_once(conn: Connection) -> None:
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
    assert ledger_of(conn)["provider_receivable"] == before.get("provider_receivable", 0) + 5


def test_account_kinds_and_rules_match_the_chart_of_accounts(conn: Connection) -> None:
    unruled = conn.execute(
        "select distinct p.rule from ledger.postings as p left join ledger.rules as r on r.rule = p.rule"
        " where r.rule is null"
    )
    assert unruled.fetchall() == []
    kept = conn.execute("select array_agg(kind order by kind) from ledger.account_kinds where keeps_balance").fetchone()
    assert kept == (["available", "disputed", "pending", "reserved_for_payouts", "reserved_for_refunds"],)


def test_money_of_an_unknown_category_is_posted(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [*settled(payment_id), money(payment_id, "txn_odd", "a_category_of_tomorrow", -120)])
    assert ledger_of(conn)["suspense"] == -120
    assert conn.execute("select kind from surety.discrepancies").fetchall() == [("category",)]


@pytest.mark.parametrize(
    ("amount", "fee"), [(10000, 375), (7000, 273), (50, 37), (1, 1), (99999999, 3400035), (250, 43), (750, 61)]
)
def test_our_fee_is_rounded_half_to_even_and_never_above_the_amount(conn: Connection, amount: int, fee: int) -> None:
    assert conn.execute("select ledger.platform_fee(%s, 340, 35)", (amount,)).fetchone() == (fee,)


@pytest.mark.parametrize(("currency", "fee"), [("usd", 375), ("gbp", 365), ("jpy", 385), ("kwd", 450)])
def test_our_fixed_fee_is_that_of_the_currency(conn: Connection, currency: str, fee: int) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, currency=currency)
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency=currency)])
    assert sorted(ledger_of(conn, payment_id).values()) == sorted([10000, 10000 - fee, fee])
    record(
        conn,
        [
            money(payment_id, "txn", "charge", 10000, 320, currency=currency),
            fact(payment_id, "available", "txn", 10000, currency=currency),
        ],
    )
    unit = "" if currency == "usd" else f" {currency}"
    balances = ledger_of(conn, payment_id)
    assert (balances[f"available{unit}"], balances[f"fee_revenue{unit}"]) == (10000 - fee, fee)


def test_concurrently_opened_accounts_are_opened_once(conn: Connection, database: str) -> None:
    currencies = [row[0] for row in conn.execute("select currency from surety.currencies order by currency")]
    start = threading.Barrier(6)

    def post(number: int) -> None:
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            for currency in currencies:
                cause = f"txn_{number}_{currency}"
                start.wait(timeout=30)
                connection.execute(
                    "select ledger.post(array[row(%s, 'foreign', null, null, 'stripe/', %s, 5, 0, 5, null, null, null,"
                    " null, null)::ledger.entry], now())",
                    (cause, currency),
                )

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(post, number) for number in range(6)]:
            done.result(timeout=60)
    assert conn.execute("select count(*) from ledger.accounts").fetchone() == (2 * len(currencies),)
