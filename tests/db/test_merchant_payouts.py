"""Payouts to merchants: nothing is paid twice, by concurrent runs or after the death of a process."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import psycopg
import pytest

from db.connect import harden
from tests.db.test_partitions import move_clock
from tests.support.payments import Connection, add_merchant, fact, ledger_of, money, pay, record, violations

Outcome = tuple[str, str | None, int | None]


def settle(conn: Connection, key: bytes, currency: str = "usd") -> str:
    """A settled payment of 10000; 9625 of it in dollars is the merchant's."""
    [payment] = pay(conn, key, currency=currency)
    record(
        conn,
        [
            fact(payment, "submitted", "pi", 10000, currency=currency),
            fact(payment, "captured", "ch", 10000, currency=currency),
            money(payment, "txn", "charge", 10000, 320, currency=currency),
            fact(payment, "available", "txn", 10000, currency=currency),
        ],
    )
    return payment


def create(conn: Connection, merchant: str, currency: str = "usd", schedule: str = "manual") -> Outcome:
    row = conn.execute(
        "select outcome, payout_id, amount_minor from surety.create_merchant_payout(%s, %s, %s, 'operator:ann')",
        (merchant, currency, schedule),
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def created(conn: Connection, merchant: str, **fields: str) -> str:
    outcome, payout, _ = create(conn, merchant, **fields)
    assert outcome == "created" and payout is not None
    return payout


def move(conn: Connection, payout: str, state: str, proof: str | None = None, reason: str | None = None) -> str:
    row = conn.execute(
        "select outcome from surety.move_merchant_payout(%s, %s, %s, %s, 'operator:ann')",
        (payout, state, proof, reason),
    ).fetchone()
    assert row is not None
    return str(row[0])


def set_terms(conn: Connection, merchant: str, *terms: Any, currencies: tuple[str, ...] = ("usd",)) -> None:
    conn.execute(
        "select surety.set_merchant_payout_terms(%s, %s, %s, %s, %s, %s, 'ann')", (merchant, list(currencies), *terms)
    )


def create_due(conn: Connection) -> int:
    row = conn.execute("select surety.create_due_merchant_payouts('worker:w')").fetchone()
    assert row is not None
    return int(row[0])


def owed(conn: Connection) -> dict[str, int]:
    """The merchants' balances and the bank."""
    shown = ("available", "reserved_for_payouts", "bank")
    return {kind: total for kind, total in ledger_of(conn).items() if kind in shown}


def test_payout_reserves_its_amount_and_leaves_by_the_bank(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    payout = created(conn, merchant)
    assert owed(conn) == {"reserved_for_payouts": 9625}
    assert not violations(conn)
    assert move(conn, payout, "left", proof="wire 17") == "changed"
    assert owed(conn) == {"bank": -9625}
    assert not violations(conn)
    assert move(conn, payout, "returned", reason="the account is closed") == "changed"
    assert owed(conn) == {"available": 9625}
    assert not violations(conn)
    types = conn.execute(
        "select type, merchant_id, payload -> 'merchant_payout' ->> 'status' from outbox.events"
        " where aggregate_id = %s order by id",
        (payout,),
    ).fetchall()
    assert types == [(f"merchant_payout.{state}", merchant, state) for state in ("asked", "left", "returned")]
    audited = conn.execute("select outcome from audit.entries where outcome like 'merchant payout %' order by at, id")
    assert [row[0] for row in audited] == [f"merchant payout {state}" for state in ("asked", "left", "returned")]


def test_payout_leaves_the_account_where_the_bank_s_lines_arrive(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    line = money(None, "bln", "bank_line", 9680) | {"object_id": "bln_1", "source": "file"}
    conn.execute("select surety.store_unmatched_facts(%s, surety.time_now())", (json.dumps([line]),))
    assert owed(conn) == {"available": 9625, "bank": 9680}
    move(conn, created(conn, merchant), "left", proof="wire 17")
    query = "select account_id, -balance_minor from ledger.balances_at(surety.time_now() + interval '1 hour')"
    banks = conn.execute(f"{query} where kind = 'bank'".encode())
    assert banks.fetchall() == [("bank:stripe/:usd", 9680 - 9625)]


def test_canceled_payout_gives_its_amount_back_and_its_period_free(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    first = created(conn, merchant)
    assert create(conn, merchant) == ("exists", first, 9625)
    assert move(conn, first, "canceled", reason="wrong account") == "changed"
    assert owed(conn) == {"available": 9625}
    assert created(conn, merchant) != first
    assert not violations(conn)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("asked", "returned"),
        ("left", "canceled"),
        ("canceled", "left"),
        ("canceled", "returned"),
        ("returned", "left"),
        ("returned", "canceled"),
    ],
)
def test_state_leads_only_where_money_can_go(conn: Connection, before: str, after: str) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    payout = created(conn, merchant)
    for state in {"asked": (), "returned": ("left", "returned")}.get(before, (before,)):
        move(conn, payout, state, proof="wire 17" if state == "left" else None, reason="why")
    balances = owed(conn)
    assert move(conn, payout, after, proof="wire 18" if after == "left" else None, reason="why") == "refused"
    assert owed(conn) == balances


def test_repeated_mark_changes_nothing_and_another_proof_is_refused(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    payout = created(conn, merchant)
    assert [move(conn, payout, "left", proof="wire 17") for _ in range(2)] == ["changed", "unchanged"]
    assert move(conn, payout, "left", proof="wire 18") == "refused"
    assert move(conn, "mpo_none", "left", proof="wire 19") == "not_found"
    neighbour, key = add_merchant(conn)
    settle(conn, key)
    with pytest.raises(psycopg.errors.UniqueViolation, match="proof_is_of_one_merchant_payout"):
        move(conn, created(conn, neighbour), "left", proof="wire 17")


def test_concurrent_runs_pay_each_merchant_once(conn: Connection, database: str) -> None:
    merchants = [add_merchant(conn) for _ in range(4)]
    for merchant, key in merchants:
        settle(conn, key)
        set_terms(conn, merchant, "daily", None, None, None)

    def run_twice(_: int) -> int:
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            return sum(create_due(connection) for _ in range(2))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(run_twice, range(4))) == len(merchants)
    assert owed(conn) == {"reserved_for_payouts": 4 * 9625}
    assert not violations(conn)


def test_payout_by_hand_waits_for_one_of_a_schedule(conn: Connection, database: str) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    with psycopg.connect(harden(database, "deploy")) as other, ThreadPoolExecutor(1) as pool:
        created(other, merchant, schedule="daily")
        waiting = pool.submit(create, conn, merchant)
        while not other.execute("select from pg_stat_activity where wait_event_type = 'Lock'").fetchall():
            assert not waiting.done()
        other.commit()
        assert waiting.result(timeout=60)[0] == "below_minimum"
    assert owed(conn) == {"reserved_for_payouts": 9625}


def test_run_that_dies_between_two_payouts_is_continued(conn: Connection, database: str) -> None:
    merchants = [add_merchant(conn) for _ in range(3)]
    for merchant, key in merchants:
        settle(conn, key)
        set_terms(conn, merchant, "daily", None, None, None)
    dying = psycopg.connect(harden(database, "deploy"))
    dying.execute("select surety.create_due_merchant_payouts('worker:w', 2)")
    conn.execute("select pg_terminate_backend(%s)", (dying.info.backend_pid,))
    with pytest.raises(psycopg.OperationalError):
        dying.commit()
    dying.close()
    assert owed(conn) == {"available": 3 * 9625}
    assert conn.execute("select surety.create_due_merchant_payouts('worker:w', 1)").fetchone() == (1,)
    assert [create_due(conn), create_due(conn)] == [2, 0]
    assert owed(conn) == {"reserved_for_payouts": 3 * 9625}
    assert not violations(conn)


@pytest.mark.parametrize(("schedule", "unit", "step"), [("daily", "day", 1), ("weekly", "week", 7)])
def test_schedule_pays_once_in_each_period(conn: Connection, schedule: str, unit: str, step: int) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    set_terms(conn, merchant, schedule, None, None, None)
    assert [create_due(conn), create_due(conn)] == [1, 0]
    settle(conn, key)
    assert create_due(conn) == 0, "its period has had its payout"
    move_clock(conn, f"{step} days")
    assert create_due(conn) == 1
    begins = [row[0] for row in conn.execute("select period_begins from surety.merchant_payouts order by id")]
    assert isinstance(begins[0], date) and (begins[1] - begins[0]).days == step
    [(first,)] = conn.execute(
        "select (date_trunc(%s, surety.time_now(), 'UTC') at time zone 'UTC')::date", (unit,)
    ).fetchall()
    assert begins[1] == first


def test_period_without_enough_money_is_paid_later_in_it(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    set_terms(conn, merchant, "monthly", 15000, None, None)
    settle(conn, key)
    assert create_due(conn) == 0
    assert create(conn, merchant) == ("below_minimum", None, 9625)
    settle(conn, key)
    assert create_due(conn) == 1
    assert owed(conn) == {"reserved_for_payouts": 2 * 9625}


def test_reserve_keeps_a_part_of_what_settled_lately(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    set_terms(conn, merchant, "manual", None, 1000, 30)
    settle(conn, key)
    payout = created(conn, merchant)
    # 10 % of 9625 is 962.5, rounded up.
    assert owed(conn) == {"available": 963, "reserved_for_payouts": 9625 - 963}
    move_clock(conn, "29 days")
    assert create(conn, merchant)[0] == "below_minimum"
    move_clock(conn, "31 days")
    assert created(conn, merchant) != payout
    assert owed(conn) == {"reserved_for_payouts": 9625}
    assert not violations(conn)


def test_negative_balance_is_carried_and_never_paid(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    payment = settle(conn, key)
    created(conn, merchant)
    record(conn, [fact(payment, "dispute_opened", "dp", 6000, revision=1)])
    move_clock(conn, "1 day")
    assert create(conn, merchant) == ("negative", None, -6000)
    settle(conn, key)
    assert create(conn, merchant)[::2] == ("created", 9625 - 6000)


def test_amounts_are_in_whole_steps_of_their_own_currency(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    for currency in ("kwd", "jpy"):
        settle(conn, key, currency)
    conn.execute("update ledger.balances set balance_minor = balance_minor - 3 where account_id like 'available:%kwd'")
    assert create(conn, merchant, "kwd")[::2] == ("created", 9540)
    assert create(conn, merchant, "jpy")[::2] == ("created", 9615)
    assert create(conn, merchant, "usd")[::2] == ("below_minimum", 0)


def test_only_active_merchants_of_our_own_account_are_paid(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    set_terms(conn, merchant, "daily", None, None, None)
    conn.execute("select surety.suspend_merchant(%s, true)", (merchant,))
    assert (create(conn, merchant)[0], create_due(conn)) == ("suspended", 0)
    connected, _ = add_merchant(conn, account="acct_1")
    set_terms(conn, connected, "daily", None, None, None)
    assert create(conn, connected)[0] == "own_account"
    assert create(conn, "mer_none")[0] == "no_merchant"
    assert create_due(conn) == 0
