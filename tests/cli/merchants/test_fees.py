"""What a merchant pays us: a change takes effect for payments that are accepted from then on."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import Run, refused, said
from tests.db.test_partitions import move_clock
from tests.support.payments import Connection, add_merchant, fact, ledger_of, money, pay, record, violations

NO_TIME = "--from: a time with its offset, such as 2027-01-01T00:00:00Z"


def rates(run: Run, merchant: str, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said(run("merchants", "fees", merchant, *words, "--json")))
    return found


def in_ten_days() -> str:
    return (datetime.now(UTC) + timedelta(days=10)).isoformat()


def charge(conn: Connection, payment_id: str) -> int | None:
    """Our fee of the payment, once it is captured and settled."""
    record(
        conn,
        [
            fact(payment_id, "submitted", "pi", 10000),
            fact(payment_id, "captured", "ch", 10000),
            money(payment_id, "txn", "charge", 10000, 320),
            fact(payment_id, "available", "txn", 10000),
        ],
    )
    return ledger_of(conn, payment_id).get("fee_revenue")


def test_fees_are_shown_with_those_to_come_and_of_the_past(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    [first] = rates(run, merchant, "--currency", "usd")
    beginning = {"merchant": merchant, "currency": "usd", "basis_points": 340, "fixed_minor": 35, "effective_at": None}
    assert first == beginning | {"is_in_force": True, "withdrawn_at": None}
    later = ("--currency", "usd", "--basis-points", "290", "--fixed-minor", "30", "--from", "2099-01-01T01:00:00+01:00")
    [present, change] = rates(run, merchant, *later)
    assert present == first
    assert change == first | {
        "basis_points": 290, "fixed_minor": 30, "effective_at": "2099-01-01T00:00:00.000Z", "is_in_force": False
    }  # fmt: skip
    shown = said(run("merchants", "fees", merchant, "--currency", "usd"))
    assert "the beginning" in shown and "2099-01-01T00:00:00.000Z" in shown
    move_clock(conn, "80 years")
    assert rates(run, merchant, "--currency", "usd") == [change | {"is_in_force": True}]
    assert len(rates(run, merchant, "--currency", "usd", "--all")) == 2
    query = (
        "select actor, snapshot -> 'rates' -> 0 ->> 'basis_points' from audit.entries where outcome = 'fees changed'"
    )
    assert conn.execute(query.encode()).fetchall() == [("operator:tester", "290")]


def test_a_change_alters_no_payment_that_was_accepted_before_it(run: Run, conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    before, captured_before = pay(conn, key_hash, 2)
    record(conn, [fact(captured_before, "submitted", "pi", 10000), fact(captured_before, "captured", "ch", 10000)])
    said(run("merchants", "fees", merchant, "--basis-points", "100"))
    said(run("merchants", "fees", merchant, "--currency", "usd", "--fixed-minor", "0", "--from", in_ten_days()))
    [within_the_minute] = pay(conn, key_hash)
    move_clock(conn, "2 minutes")
    [after] = pay(conn, key_hash)
    move_clock(conn, "11 days")
    assert [charge(conn, payment_id) for payment_id in (before, captured_before, within_the_minute)] == [375] * 3
    assert charge(conn, after) == 135
    [much_later] = pay(conn, key_hash)
    assert charge(conn, much_later) == 100
    assert not violations(conn)


def test_fees_of_one_currency_leave_the_others(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    said(run("merchants", "fees", merchant, "--currency", "eur", "--currency", "usd", "--basis-points", "0"))
    changed = {one["currency"] for one in rates(run, merchant) if one["basis_points"] == 0}
    assert changed == {"eur", "usd"}
    neighbour, _ = add_merchant(conn)
    assert {one["basis_points"] for one in rates(run, neighbour)} == {340}


@pytest.mark.parametrize(
    ("words", "report"),
    [
        (
            ("--from", "2099-01-01T00:00Z"),
            "--from: give --basis-points or --fixed-minor, which take effect then, or --withdraw",
        ),
        (("--withdraw",), "--withdraw: give the time of the change by --from, and no other fees"),
        (
            ("--basis-points", "1", "--from", "2099-01-01"),
            "--from: a time with its offset, such as 2027-01-01T00:00:00Z",
        ),
        (("--basis-points", "1", "--from", "today"), NO_TIME),
        (
            ("--basis-points", "1", "--from", "2020-01-01T00:00Z"),
            "--from must be a minute ahead or more, for payments to come",
        ),
        (("--fixed-minor", "1"), "--fixed-minor: name the currencies of its minor units by --currency"),
        (
            ("--fixed-minor", "50", "--currency", "usd"),
            "--fixed-minor must be less than the smallest amount of a payment",
        ),
    ],
)
def test_fees_that_break_a_rule_are_refused(run: Run, conn: Connection, words: tuple[str, ...], report: str) -> None:
    merchant, _ = add_merchant(conn)
    assert refused(run("merchants", "fees", merchant, *words)) == report
    assert conn.execute("select count(*) from surety.fee_rates").fetchone() == (0,)


def test_fees_of_an_unknown_merchant_or_currency_are_refused(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    for words in ((), ("--basis-points", "1")):
        assert refused(run("merchants", "fees", "mer_none", *words)) == "there is no merchant mer_none"
    assert "--currency: xyz is not accepted" in refused(run("merchants", "fees", merchant, "--currency", "xyz"))
    later = ("--basis-points", "1", "--from", "2099-01-01T00:00Z")
    said(run("merchants", "fees", merchant, *later))
    other = ("--basis-points", "2", *later[2:])
    assert "at this very time already" in refused(run("merchants", "fees", merchant, *other))


def test_withdrawn_change_never_begins(run: Run, conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    later = ("--from", in_ten_days())
    said(run("merchants", "fees", merchant, "--basis-points", "100"))
    said(run("merchants", "fees", merchant, "--basis-points", "0", *later))
    shown = rates(run, merchant, "--currency", "USD", "--withdraw", *later)
    assert [one["basis_points"] for one in shown] == [340, 100]
    assert len(rates(run, merchant, "--currency", "eur")) == 3, "only the named currency's change is withdrawn"
    [_, _, withdrawn] = rates(run, merchant, "--currency", "usd", "--all")
    assert (withdrawn["basis_points"], withdrawn["is_in_force"], withdrawn["withdrawn_at"] is None) == (0, False, False)
    assert "withdrawn" in said(run("merchants", "fees", merchant, "--currency", "usd", "--all"))
    move_clock(conn, "11 days")
    [payment] = pay(conn, key_hash)
    assert charge(conn, payment) == 135
    assert [one["is_in_force"] for one in rates(run, merchant, "--currency", "usd", "--all")] == [False, True, False]
    audited = conn.execute(
        "select actor, snapshot -> 'currencies' from audit.entries where outcome = 'fees withdrawn'"
    ).fetchall()
    assert audited == [("operator:tester", ["usd"])]
    assert not violations(conn)


def test_withdrawal_is_repeated_without_effect_and_frees_no_time(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    change = ("merchants", "fees", merchant, "--from", "2099-01-01T00:00Z")
    said(run(*change, "--basis-points", "1"))
    assert "already" not in said(run(*change, "--withdraw"))
    assert said(run(*change, "--withdraw")).startswith(f"{merchant}: this change of fees is withdrawn already")
    assert "choose another" in refused(run(*change, "--basis-points", "2"))
    with pytest.raises(psycopg.Error, match="append-only"):
        conn.execute("delete from surety.fee_rate_withdrawals")


def test_change_that_has_begun_or_is_unknown_is_not_withdrawn(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    change = ("merchants", "fees", merchant, "--from", in_ten_days())
    said(run(*change, "--basis-points", "1"))
    unknown = refused(run("merchants", "fees", merchant, "--withdraw", "--from", "2099-01-01T00:00Z"))
    assert unknown.startswith(f"--from: no fees of {merchant} change then")
    for passed in ("9 days 23:59:30", "11 days"):
        move_clock(conn, passed)
        assert "can't be withdrawn" in refused(run(*change, "--withdraw"))
    assert refused(run("merchants", "fees", "mer_none", *change[3:], "--withdraw")) == "there is no merchant mer_none"


def test_repeated_fees_change_nothing(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    change = ("merchants", "fees", merchant, "--currency", "USD", "--basis-points", "1")
    later = ("--from", "2099-01-01T00:00Z")
    assert "already" not in said(run(*change, *later))
    assert said(run(*change, *later)).startswith(f"{merchant}: these fees are set already")
    assert len(json.loads(said(run(*change, "--from", "2099-01-02T00:00Z", "--json")))) == 2
    assert conn.execute("select count(*) from surety.fee_rates").fetchone() == (1,)
    said(run("merchants", "fees", merchant, "--currency", "eur", *change[3:], *later))
    audited = conn.execute(
        "select snapshot -> 'rates' -> 0 ->> 'currency', jsonb_array_length(snapshot -> 'rates') from audit.entries"
        " where outcome = 'fees changed' order by at"
    ).fetchall()
    assert audited == [("usd", 1), ("eur", 1)]


def test_fee_rates_are_append_only(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    said(run("merchants", "fees", merchant, "--basis-points", "1"))
    with pytest.raises(psycopg.Error, match="append-only"):
        conn.execute("update surety.fee_rates set basis_points = 2")
