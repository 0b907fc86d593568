"""`surety merchant-payouts`: terms, create, list, mark; and what merchants see of it."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Run, refused, said
from tests.db.test_merchant_payouts import owed, settle
from tests.support.payments import Connection, add_merchant, pay


def test_payout_goes_from_terms_to_its_proof(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    terms = ("merchant-payouts", "terms", merchant, "--currency", "USD", "--schedule", "daily", "--minimum", "500")
    assert said(run(*terms)) == f"{merchant}: terms are set"
    assert said(run(*terms)) == f"{merchant}: these terms are set already"
    [due] = json.loads(said(run("merchant-payouts", "owed", "--json")))
    assert (due["merchant"], due["available"], due["minimum"], due["amount"]) == (merchant, 9625, 500, 9625)
    assert "96.25 USD" in said(run("merchant-payouts", "owed", "--merchant", merchant))
    assert said(run("merchant-payouts", "create")) == "1 payouts created"
    assert json.loads(said(run("merchant-payouts", "create", "--json"))) == {"created": 0}
    [listed] = json.loads(said(run("merchant-payouts", "list", "--state", "asked", "--json")))
    payout = listed["id"]
    assert payout in said(run("merchant-payouts", "list", "--merchant", merchant))
    assert said(run("merchant-payouts", "sent", payout, "--proof", "wire 17")) == f"{payout} is left"
    assert said(run("merchant-payouts", "sent", payout, "--proof", "wire 17")) == f"{payout} is left already"
    assert "can't become canceled" in refused(run("merchant-payouts", "cancel", payout, "--reason", "why"))
    assert owed(conn) == {"bank": -9625}
    assert said(run("merchant-payouts", "returned", payout, "--reason", "closed")) == f"{payout} is returned"
    shown = json.loads(said(run("merchant-payouts", "show", payout, "--json")))
    assert (shown["state"], shown["proof"], shown["reason"]) == ("returned", "wire 17", "closed")
    assert "96.25 USD" in said(run("merchant-payouts", "show", payout))


def test_payout_by_hand_is_made_once_in_a_day(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    words = ("merchant-payouts", "create", "--merchant", merchant, "--currency", "usd")
    first = json.loads(said(run(*words, "--json")))
    assert json.loads(said(run(*words, "--json"))) == first | {"created": False}
    assert "it was created before" in said(run(*words))
    assert said(run("merchant-payouts", "cancel", first["id"], "--reason", "why")) == f"{first['id']} is canceled"


@pytest.mark.parametrize(
    ("words", "report"),
    [
        (("create", "--currency", "usd"), "--merchant and --currency: give both"),
        (("create", "--merchant", "mer_none", "--currency", "usd"), "--merchant: there is no merchant mer_none"),
        (("create", "--merchant", "mer_none", "--currency", "xyz"), "--currency: xyz is not accepted"),
        (("terms", "mer_none", "--currency", "usd"), "give --schedule, --minimum, or"),
        (("terms", "mer_none", "--currency", "usd", "--minimum", "1"), "there is no merchant mer_none"),
        (("show", "mpo_none"), "ID: there is no payout mpo_none to a merchant"),
        (("sent", "mpo_none", "--proof", "x"), "ID: there is no payout mpo_none to a merchant"),
        (("sent", "mpo_none", "--proof", " "), "--proof must be one line"),
        (("list", "--merchant", "mer_none"), "--merchant: there is no merchant mer_none"),
    ],
)
def test_wrong_words_are_refused(run: Run, words: tuple[str, ...], report: str) -> None:
    assert refused(run("merchant-payouts", *words)).startswith(report)


def test_reserve_needs_its_part_and_its_days(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    terms = ("merchant-payouts", "terms", merchant, "--currency", "usd")
    assert refused(run(*terms, "--reserve-days", "30")).startswith("--reserve-basis-points and --reserve-days")
    pay(conn, key)
    assert said(run("merchant-payouts", "owed")) == "nothing is owed"


def test_merchant_that_owes_us_is_named_with_its_balance(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    settle(conn, key)
    conn.execute("update ledger.balances set balance_minor = -5 where account_id like 'available:%'")
    words = ("merchant-payouts", "create", "--merchant", merchant, "--currency", "usd")
    assert refused(run(*words)) == f"{merchant}: its balance is -5 minor units: it owes us"
    assert "-0.05 USD" in said(run("merchant-payouts", "owed"))
