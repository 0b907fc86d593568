"""Facts in every order: whatever comes first, late or twice, the end is the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    as_bank_fact,
    fact,
    ledger_of,
    money,
    path_of,
    pay,
    record,
    state_of,
    violations,
)

History = Callable[[str], list[Fact]]


def three_d_secure(p: str) -> list[Fact]:
    return [
        fact(p, "submitted", "pi"),
        fact(p, "action", "pi", data={"next_action": {"type": "redirect", "url": "https://bank.example"}}),
        fact(p, "processing", "pi"),
        fact(p, "captured", "ch", 10000),
        money(p, "txn", "charge", 10000, 320),
        fact(p, "available", "txn", 10000),
    ]


def refund_before_settlement(p: str) -> list[Fact]:
    return [
        fact(p, "captured", "ch", 10000),
        fact(p, "refund_pending", "re", 2500),
        fact(p, "refund_succeeded", "re", 2500),
        money(p, "txn_r", "refund", -2500),
        money(p, "txn", "charge", 10000, 320),
        fact(p, "available", "txn", 10000),
    ]


def refund_that_fails_late(p: str) -> list[Fact]:
    return [
        fact(p, "captured", "ch", 10000),
        fact(p, "refund_succeeded", "re_1", 3000),
        fact(p, "refund_succeeded", "re_2", 7000),
        fact(p, "refund_failed", "re_2", 7000),
        money(p, "txn", "charge", 10000, 320),
        fact(p, "available", "txn", 10000),
    ]


def dispute_won(p: str) -> list[Fact]:
    return [
        fact(p, "captured", "ch", 10000),
        money(p, "txn", "charge", 10000, 320),
        fact(p, "available", "txn", 10000),
        fact(p, "dispute_opened", "dp", 10000, revision=1),
        money(p, "txn_d", "dispute", -10000, 1500),
        fact(p, "dispute_won", "dp", 10000, revision=2),
    ]


def dispute_lost_then_reinstated(p: str) -> list[Fact]:
    return [
        fact(p, "captured", "ch", 10000),
        fact(p, "dispute_opened", "dp", 10000, revision=1),
        fact(p, "dispute_lost", "dp", 10000, revision=2),
        fact(p, "dispute_won", "dp", 10000, revision=3),
        money(p, "txn_d", "dispute", -10000, 1500),
        money(p, "txn_w", "dispute_reversal", 10000),
    ]


def failed_and_succeeded_after_all(p: str) -> list[Fact]:
    return [
        fact(p, "submitted", "pi"),
        fact(p, "action", "pi"),
        fact(p, "failed", "pi", data={"failure": {"code": "card_declined"}}),
        fact(p, "captured", "ch", 10000),
        money(p, "txn", "charge", 10000, 320),
        fact(p, "available", "txn", 10000),
    ]


def held_and_captured_in_part(p: str) -> list[Fact]:
    return [
        fact(p, "submitted", "pi"),
        fact(p, "authorized", "ch", 10000),
        fact(p, "captured", "ch", 7000),
        money(p, "txn", "charge", 10000, 320),
        money(p, "txn_u", "partial_capture_reversal", -3000, -87),
        fact(p, "available", "txn", 10000),
    ]


def ach_returned_before_it_was_confirmed(p: str) -> list[Fact]:
    return [
        as_bank_fact(fact(p, "submitted", "entry")),
        as_bank_fact(money(p, "credit", "ach_credit", 10000)),
        as_bank_fact(fact(p, "returned", "return", 10000, data={"failure": {"code": "R01"}})),
        as_bank_fact(money(p, "txn_r", "ach_return", -10000, 250)),
        as_bank_fact(fact(p, "dishonored", "return", 10000)),
        as_bank_fact(fact(p, "contested", "return", 10000, data={"failure": {"code": "R01"}})),
    ]


def ach_returned_after_it_settled(p: str) -> list[Fact]:
    return [
        as_bank_fact(fact(p, "submitted", "entry")),
        as_bank_fact(fact(p, "processing", "entry")),
        as_bank_fact(money(p, "credit", "ach_credit", 10000)),
        as_bank_fact(fact(p, "captured", "entry", 10000)),
        as_bank_fact(fact(p, "returned", "return", 10000)),
        as_bank_fact(money(p, "txn_r", "ach_return", -10000, 250)),
    ]


def ach_whose_return_was_dishonored(p: str) -> list[Fact]:
    return [
        as_bank_fact(money(p, "credit", "ach_credit", 10000)),
        as_bank_fact(fact(p, "captured", "entry", 10000)),
        as_bank_fact(fact(p, "returned", "return", 10000)),
        as_bank_fact(money(p, "txn_r", "ach_return", -10000, 250)),
        as_bank_fact(fact(p, "dishonored", "return", 10000)),
        as_bank_fact(money(p, "txn_d", "ach_return", 10000)),
    ]


HISTORIES: list[tuple[History, str, str, dict[str, int]]] = [
    (
        three_d_secure,
        "automatic",
        "settled",
        {"available": 9625, "provider_balance": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    (
        refund_before_settlement,
        "automatic",
        "partially_refunded",
        {"available": 7125, "provider_balance": 7180, "fee_revenue": 375, "provider_cost": 320},
    ),
    (
        refund_that_fails_late,
        "automatic",
        "partially_refunded",
        {
            "available": 6625,
            "reserved_for_refunds": 3000,
            "provider_balance": 9680,
            "fee_revenue": 375,
            "provider_cost": 320,
        },
    ),
    (
        dispute_won,
        "automatic",
        "settled",
        {
            "available": 8125,
            "provider_balance": -1820,
            "withheld_by_network": 10000,
            "fee_revenue": 1875,
            "provider_cost": 1820,
        },
    ),
    (
        dispute_lost_then_reinstated,
        "automatic",
        "confirmed",
        {
            "provider_receivable": 10000,
            "pending": 9625,
            "available": -1500,
            "provider_balance": -1500,
            "fee_revenue": 1875,
            "provider_cost": 1500,
        },
    ),
    (
        failed_and_succeeded_after_all,
        "automatic",
        "settled",
        {"available": 9625, "provider_balance": 9680, "fee_revenue": 375, "provider_cost": 320},
    ),
    (
        held_and_captured_in_part,
        "manual",
        "confirmed",
        {"pending": 6727, "provider_balance": 6767, "fee_revenue": 273, "provider_cost": 233},
    ),
    (ach_returned_before_it_was_confirmed, "ach", "failed", {"bank": -250, "provider_cost": 250}),
    (
        ach_returned_after_it_settled,
        "ach",
        "reversed",
        {"available": -375, "bank": -250, "fee_revenue": 375, "provider_cost": 250},
    ),
    (
        ach_whose_return_was_dishonored,
        "ach",
        "settled",
        {"available": 9625, "bank": 9750, "fee_revenue": 375, "provider_cost": 250},
    ),
]


METHODS: dict[str, dict[str, Any]] = {
    "automatic": {"capture_method": "automatic"},
    "manual": {"capture_method": "manual"},
    "ach": {"rail": "ach"},
}
NAMES = [getattr(history, "__name__", "") for history, *_ in HISTORIES]


@pytest.mark.parametrize(("history", "method", "end", "balances"), HISTORIES, ids=NAMES)
def test_every_order_of_six_facts_ends_in_the_same_state(
    conn: Connection, history: History, method: str, end: str, balances: dict[str, int]
) -> None:
    _, key_hash = add_merchant(conn)
    orders = list(itertools.permutations(range(6)))
    payments = pay(conn, key_hash, len(orders), **METHODS[method])
    result = [history(payment_id) for payment_id in payments]
    duplicates = random.Random(7)
    for place in range(6):
        now = [facts[order[place]] for facts, order in zip(result, orders, strict=True)]
        before = [facts[order[duplicates.randint(0, place)]] for facts, order in zip(result, orders, strict=True)]
        record(conn, now)
        record(conn, before)

    ends = conn.execute(
        "select state, captured_minor, refunded_minor, refund_pending_minor, at_risk_minor, reversed_minor, count(*)"
        " from surety.payments group by 1, 2, 3, 4, 5, 6"
    ).fetchall()
    assert len(ends) == 1 and ends[0][0] == end, ends
    ledgers = conn.execute(
        """
        select totals, count(*) from (
            select payment_id, jsonb_object_agg(kind, total) as totals from (
                select p.payment_id, k.kind,
                    sum(case k.normal_side when l.side then l.amount_minor else - l.amount_minor end) as total
                from (
                    select posting_id, debit_account as account_id, 'debit' as side, amount_minor from ledger.transfers
                    union all
                    select posting_id, credit_account, 'credit', amount_minor from ledger.transfers
                ) as l
                join ledger.postings as p on p.id = l.posting_id
                join ledger.accounts as a on a.id = l.account_id
                join ledger.account_kinds as k on k.kind = a.kind
                group by 1, 2
            ) as sums where total <> 0 group by payment_id
        ) as payments group by 1
        """
    ).fetchall()
    assert ledgers == [(balances, len(orders))]
    mandatory = conn.execute(
        """
        select count(*) from surety.payments as p
        join surety.mandatory_steps as m on m.rail = p.rail and m.capture_method = p.capture_method
        where m.state <> all(array(select s.to_state from surety.steps as s where s.payment_id = p.id))
            and (m.state <> 'confirmed' or p.captured_minor > 0) and (m.state <> 'settled' or p.state = 'settled')
        """
    ).fetchone()
    assert mandatory == (0,), "every payment made every mandatory step"
    assert not violations(conn)


@pytest.mark.parametrize(("history", "method", "end", "balances"), HISTORIES, ids=NAMES)
def test_all_facts_in_one_batch_end_in_the_same_state(
    conn: Connection, history: History, method: str, end: str, balances: dict[str, int]
) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, **METHODS[method])
    facts = history(payment_id)
    random.Random(11).shuffle(facts)
    record(conn, [*facts, *facts])
    assert (state_of(conn, payment_id), ledger_of(conn, payment_id)) == (end, balances)


def test_a_step_that_must_have_happened_is_marked_implied(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    steps = conn.execute(
        "select to_state, implied from surety.steps where payment_id = %s order by version", (payment_id,)
    ).fetchall()
    assert steps == [("initiated", False), ("submitting", True), ("provider_submitted", True), ("confirmed", False)]


def test_automatic_capture_skips_authorized(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "authorized", "ch", 10000)])
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    assert "authorized" not in path_of(conn, payment_id)


def test_two_partial_refunds_are_two_steps(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re_1", 2000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re_2", 3000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re_2", 3000)])
    assert path_of(conn, payment_id)[-3:] == ["confirmed", "partially_refunded", "partially_refunded"]


@pytest.mark.parametrize(
    ("difference", "kind"),
    [({"currency": "eur"}, "currency"), ({"account": "acct_other"}, "account"), ({"livemode": True}, "livemode")],
)
def test_fact_of_another_currency_account_or_mode_makes_no_step_but_a_discrepancy(
    conn: Connection, difference: dict[str, object], kind: str
) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000, **difference)])
    assert path_of(conn, payment_id) == ["initiated"]
    result = conn.execute("select kind, severity from surety.discrepancies where payment_id = %s", (payment_id,))
    assert result.fetchall() == [(kind, "critical")]


def test_object_with_another_amount_is_a_discrepancy_and_never_confirmed(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    assert record(conn, [fact(payment_id, "submitted", "pi", 10001)]) == []
    assert path_of(conn, payment_id) == ["initiated"]
    result = conn.execute("select kind, severity from surety.discrepancies where payment_id = %s", (payment_id,))
    assert result.fetchall() == [("amount", "critical")]
    record(conn, [fact(payment_id, "submitted", "pi_2", 10000)])
    assert state_of(conn, payment_id) == "provider_submitted"


def test_another_amount_for_the_same_object_is_a_contradiction(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    record(conn, [fact(payment_id, "captured", "ch", 9000)])
    assert ledger_of(conn, payment_id)["provider_receivable"] == 10000
    result = conn.execute("select kind from surety.discrepancies").fetchall()
    assert result == [("amount",)]


def test_excess_amount_is_posted_to_suspense(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10500)])
    assert ledger_of(conn, payment_id) == {
        "provider_receivable": 10500,
        "pending": 9625,
        "fee_revenue": 375,
        "suspense": 500,
    }
    assert conn.execute("select kind from surety.discrepancies").fetchall() == [("amount",)]


def test_decline_is_not_final_until_the_intent_is_canceled(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    declined = fact(payment_id, "attempt_failed", "pi", data={"failure": {"code": "card_declined"}})
    assert "payment.attempt_failed" in record(conn, [declined])
    assert state_of(conn, payment_id) == "provider_submitted"
    assert record(conn, [fact(payment_id, "failed", "pi", data=declined["data"])]) == ["payment.failed"]
    failure = conn.execute("select failure from surety.payments where id = %s", (payment_id,)).fetchone()
    assert failure == ({"code": "card_declined"},)


def test_live_object_of_a_finished_payment_is_a_discrepancy(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, capture_method="manual")
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (payment_id,),
    )
    record(conn, [fact(payment_id, "authorized", "ch", 10000)])
    assert state_of(conn, payment_id) == "canceled"
    assert conn.execute("select kind from surety.discrepancies").fetchall() == [("state",)]


def test_a_fact_finds_its_payment_by_object_intent_or_metadata(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    by_object, by_intent, by_metadata = pay(conn, key_hash, 3)
    record(conn, [fact(by_object, "submitted", "pi", objects=["ch_1"]), fact(by_intent, "submitted", "pi_2")])
    record(
        conn,
        [
            fact(None, "captured", "ch_1", 10000) | {"object_id": "ch_1"},
            fact(None, "captured", "ch_2", 10000, intent=f"pi_2_{by_intent[-12:]}"),
            fact(None, "captured", "ch_3", 10000, metadata_payment=by_metadata),
        ],
    )
    assert {state_of(conn, payment_id) for payment_id in (by_object, by_intent, by_metadata)} == {"confirmed"}


def test_unmatched_fact_is_recorded_when_its_payment_appears(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    early = fact(None, "captured", "ch", 10000, intent="pi_late")
    record(conn, [early])
    record(conn, [early])
    assert conn.execute("select count(*) from surety.unmatched_facts where ended_at is null").fetchone() == (1,)
    record(conn, [fact(payment_id, "submitted", "pi") | {"object_id": "pi_late"}])
    conn.execute("select surety.retry_unmatched_facts()")
    assert state_of(conn, payment_id) == "confirmed"
    assert conn.execute("select ended_as from surety.unmatched_facts").fetchall() == [("matched",)]


def test_unmatched_money_goes_to_suspense_after_15_minutes(conn: Connection) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    record(conn, [money(None, "txn_foreign", "charge", 5000, 175)])
    conn.execute("select surety.retry_unmatched_facts()")
    assert ledger_of(conn) == {}
    conn.execute("insert into surety.clock (ahead) values ('16 minutes')")
    conn.execute("select surety.retry_unmatched_facts()")
    conn.execute("select surety.retry_unmatched_facts()")
    assert ledger_of(conn) == {"provider_balance": 4825, "suspense": 4825}
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("foreign", "warning")]


def test_unmatched_money_of_this_environment_is_critical(conn: Connection) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    row = conn.execute("select id from surety.environment").fetchone()
    assert row is not None
    record(conn, [fact(None, "captured", "ch", 10000, metadata_environment=row[0])])
    conn.execute("insert into surety.clock (ahead) values ('16 minutes')")
    conn.execute("select surety.retry_unmatched_facts()")
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("missing_here", "critical")]
