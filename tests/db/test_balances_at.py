"""Balances as of any time: by the time of booking, whatever happens later."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from db.connect import harden
from tests.db.test_partitions import move_clock
from tests.support.payments import Connection, Fact, add_merchant, fact, money, pay, record, violations

Balances = dict[str, int]
OF_BALANCES = {
    "debits equal credits, per currency",
    "every balance is the sum of its transfers",
    "every balance of a day is the sum of the transfers until its end",
    "the balances of a closed month stay as they were",
}


def merchant_balances(conn: Connection, merchant: str, at: datetime) -> Balances:
    rows = conn.execute("select account_id, balance_minor from ledger.merchant_balances_at(%s, %s)", (merchant, at))
    return dict(rows.fetchall())


def all_balances(conn: Connection, at: datetime) -> Balances:
    return dict(conn.execute("select account_id, balance_minor from ledger.balances_at(%s)", (at,)).fetchall())


def summed(conn: Connection, at: datetime) -> Balances:
    """The balances by all transfers there are, without an index and without days."""
    rows = conn.execute(
        """
        select l.account_id, sum(l.amount_minor)::bigint
        from ledger.postings as g join ledger.transfers as t on t.posting_id = g.id
        cross join lateral (
            values (t.credit_account, t.amount_minor), (t.debit_account, - t.amount_minor)
        ) as l (account_id, amount_minor)
        where g.at < %s group by 1
        """,
        (at,),
    )
    return dict(rows.fetchall())


def now(conn: Connection) -> datetime:
    row = conn.execute("select date_trunc('milliseconds', surety.time_now())").fetchone()
    assert row is not None
    at: datetime = row[0]
    return at.astimezone(UTC)


def sum_days(conn: Connection) -> int:
    """Ends the days that are over and sums them; returns how many were summed."""
    assert conn.execute("select ledger.end_days()").fetchone() == (True,)
    count = 0
    while conn.execute("select ledger.sum_day()").fetchone() == (True,):
        count += 1
    return count


def live_through(conn: Connection, key: bytes, chance: random.Random, currency: str = "usd") -> None:
    """A payment with some of what may follow."""
    [payment] = pay(conn, key, currency=currency)

    def of_charge(kind: str, object_id: str, amount: int = 10000, **fields: Any) -> Fact:
        return fact(payment, kind, object_id, amount, currency=currency, **fields)

    def moved(object_id: str, category: str, amount: int, fee: int = 0) -> Fact:
        return money(payment, object_id, category, amount, fee, currency=currency)

    record(conn, [of_charge("submitted", "pi"), of_charge("captured", "ch")])
    if chance.random() < 0.8:
        record(conn, [moved("txn", "charge", 10000, 320), of_charge("available", "txn")])
    if chance.random() < 0.4:
        record(conn, [of_charge("refund_succeeded", "re", 2500), moved("txn_r", "refund", -2500)])
    if chance.random() < 0.3:
        record(conn, [of_charge("dispute_opened", "dp", 5000, revision=1), moved("txn_d", "dispute", -5000, 1500)])


@pytest.mark.parametrize("seed", range(4))
def test_balances_of_any_time_are_the_sums_until_then_and_stay_so(conn: Connection, seed: int) -> None:
    chance = random.Random(seed)
    merchants = [add_merchant(conn) for _ in range(2)]
    seen: list[tuple[datetime, Balances]] = []
    hours = 0
    for _ in range(12):
        hours += chance.choice((0, 1, 7, 24, 61))
        move_clock(conn, f"{hours} hours")
        live_through(conn, chance.choice(merchants)[1], chance)
        seen.append((now(conn), summed(conn, now(conn))))
        if chance.random() < 0.5:
            sum_days(conn)
    times = [*(at for at, _ in seen), *(seen[0][0] + timedelta(hours=chance.randrange(hours + 2)) for _ in range(8))]
    for at in times:
        expected = summed(conn, at)
        assert all_balances(conn, at) == expected
        for merchant, _ in merchants:
            owned = {account: total for account, total in expected.items() if account.split(":")[1] == merchant}
            assert merchant_balances(conn, merchant, at) == owned
    for at, then in seen:
        assert all_balances(conn, at) == then, "a balance of the past changed"
    assert not OF_BALANCES.intersection(violations(conn))


def test_posting_after_the_end_of_its_day_is_booked_on_the_next(conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    [payment] = pay(conn, key)
    record(conn, [fact(payment, "submitted", "pi", 10000)])
    move_clock(conn, "2 days")
    sum_days(conn)
    end = now(conn).replace(hour=0, minute=0, second=0, microsecond=0)
    # The clock is set back by two days.
    move_clock(conn, "0")
    record(conn, [fact(payment, "captured", "ch", 10000)])
    assert conn.execute("select at from ledger.postings").fetchall() == [(end,)]
    assert merchant_balances(conn, merchant, end) == {}
    assert merchant_balances(conn, merchant, end + timedelta(milliseconds=1)) == {f"pending:{merchant}:usd": 9625}
    move_clock(conn, "4 days")
    assert sum_days(conn) == 1
    assert not violations(conn)


def test_transaction_that_is_open_across_the_end_of_a_day_is_repeated(conn: Connection, database: str) -> None:
    entry = "select ledger.post(array[ledger.entry(%s, 'foreign', 'stripe/', 'usd', p_net => 5)], now())"
    with psycopg.connect(harden(database, "deploy")) as late:
        late.execute(entry, ("before",))
        move_clock(conn, "1 day")
        assert conn.execute("select ledger.end_days()").fetchone() == (False,), "it waits for open transactions"
        late.commit()
        assert conn.execute("select ledger.end_days()").fetchone() == (True,)
        # A statement that read the end of the days before it moved.
        late.execute("insert into ledger.postings values ('pst_0', 'late', 'foreign', null, null, now())")
        with pytest.raises(psycopg.errors.SerializationFailure, match="ended meanwhile"):
            late.execute(
                "insert into ledger.transfers select 'pst_0', 1, debit_account, credit_account, 5, currency"
                " from ledger.transfers limit 1"
            )
        late.rollback()
        late.execute(entry, ("repeated",))
    [(ends_at,)] = conn.execute("select ends_at from ledger.final_postings").fetchall()
    assert all_balances(conn, ends_at) == {"provider_balance:stripe/:usd": -5, "suspense:platform:usd": 5}
    [(booked_at,)] = conn.execute("select at from ledger.postings where cause = 'repeated'").fetchall()
    assert booked_at >= ends_at


def test_days_and_months_that_were_summed_are_append_only(conn: Connection) -> None:
    for table in ("daily_balances", "closed_months", "closed_balances"):
        with pytest.raises(psycopg.Error, match="append-only"):
            conn.execute(f"delete from ledger.{table}".encode())
