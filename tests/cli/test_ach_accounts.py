"""Bank accounts on the command line: added, validated, revoked, removed, their keys rotated."""

from __future__ import annotations

import json
import logging
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from app.cli import cli
from db.account_numbers import AccountKeys, new_account_key
from db.settings import Secret
from tests.cli.conftest import Run, refused, said
from tests.cli.customers.test_erasures import tables_with
from tests.support.payments import Connection, add_merchant, command

OLD, NEW = new_account_key("old"), new_account_key("new")
NUMBER = "987654321012"
WHY = ("--reason", "why")
ADDED = (
    *("--routing", "011401533", "--type", "checking", "--holder-type", "individual", "--holder-name", "Ada"),
    *("--accepted-at", "2026-11-01T09:00:00Z", "--ip-address", "192.0.2.7", "--mandate-text", "I agree to debits"),
)


@pytest.fixture
def customer(run: Run, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> str:
    """A customer's id; the key of account numbers is set."""
    monkeypatch.setenv("SURETY_ACCOUNT_KEYS", OLD)
    _, key = add_merchant(conn)
    return str(command(conn, "create_customer", key)["body"]["id"])


def add(customer: str, *more: str, number: str = NUMBER) -> Result:
    words = ["ach", "accounts", "add", "--customer", customer, *ADDED, *more]
    return CliRunner().invoke(cli, words, input=f"{number}\n")


def show(run: Run, account: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(run("ach", "accounts", "show", account, "--json")))
    return found


def test_an_account_is_validated_before_a_web_debit_and_again_after_a_change(
    run: Run, conn: Connection, customer: str
) -> None:
    account = said(add(customer))
    assert show(run, account) | {"created_at": "", "validation_changed_at": ""} == {
        "id": account, "merchant": show(run, account)["merchant"], "customer": customer,
        "routing_number": "011401533", "account_type": "checking", "holder_type": "individual", "last4": "1012",
        "key_id": "old", "validation": "unvalidated", "validation_method": None, "version": 1,
        "mandate": {"accepted_at": "2026-11-01T09:00:00Z", "ip_address": "192.0.2.7", "text": "I agree to debits"},
        "web_debit_obstacle": "not_validated", "validation_changed_at": "", "created_at": "",
        "mandate_revoked_at": None, "removed_at": None,
    }  # fmt: skip
    words = ("ach", "accounts", "validate", account, "--method", "prenote", *WHY, "--version")
    said(run(*words, "1", "--result", "pending"))
    assert show(run, account)["web_debit_obstacle"] == "not_validated"
    said(run(*words, "1", "--result", "validated"))
    assert show(run, account)["web_debit_obstacle"] is None
    keys = AccountKeys(Secret(OLD))
    changed = conn.execute(
        "select surety.change_payer_account(%s, 1, '011401533', 'savings', '1013', %s, 'old', %s, 'C01')",
        (account, keys.seal("987654321013", account), keys.fingerprints("011401533", "987654321013")[0]),
    ).fetchone()
    assert changed == (2,)
    assert [show(run, account)[name] for name in ("validation", "last4", "web_debit_obstacle", "version")] == [
        *("unvalidated", "1013", "not_validated", 2)
    ]
    assert "no account" in refused(run(*words, "1", "--result", "validated"))
    said(run(*words, "2", "--result", "failed"))
    assert show(run, account)["web_debit_obstacle"] == "validation_failed"


@pytest.mark.parametrize(
    "change",
    ["account_type = 'savings'", "routing_number = '021000021'", "last4 = '9999'", "fingerprint = sha256('another')"],
)
def test_a_change_that_keeps_the_version_is_refused(conn: Connection, customer: str, change: str) -> None:
    account = said(add(customer))
    with pytest.raises(psycopg.errors.CheckViolation, match="raises its version"):
        conn.execute(f"update surety.payer_accounts set {change} where id = %s".encode(), (account,))
    with pytest.raises(psycopg.errors.CheckViolation, match="validation_is_of_the_accounts_version"):
        conn.execute(
            "update surety.payer_accounts set validation = 'validated', validation_method = 'prenote',"
            " validated_version = 1, version = 2, last4 = '9999'"
        )


def test_a_number_is_in_no_table_no_log_and_no_output(
    run: Run, conn: Connection, customer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    account = said(add(customer))
    shown = [
        add(customer).output,
        add(customer, number=NUMBER + "1" * 9).output,
        add("cus_none").output,
        said(run("ach", "accounts", "validate", account, "--version=1", "--method=prenote", "--result=failed", *WHY)),
        said(run("ach", "accounts", "list")),
        said(run("ach", "accounts", "list", "--json")),
        said(run("ach", "accounts", "show", account)),
        said(run("ach", "accounts", "revoke", account, *WHY)),
        said(run("ach", "accounts", "remove", account, *WHY)),
        caplog.text,
    ]
    assert NUMBER not in "".join(shown)
    assert tables_with(conn, NUMBER) == {}
    # The search would find it.
    conn.execute("update surety.payer_accounts set holder_name = %s", (f"Ada {NUMBER}",))
    assert tables_with(conn, NUMBER) == {"surety.payer_accounts": 1}
    entries = conn.execute("select outcome, snapshot ->> 'last4' from audit.entries where snapshot ? 'payer_account'")
    assert {each for each in entries} == {  # noqa: C416 - a cursor is no set
        ("bank account added", "1012"), ("bank account validation: failed", "1012"), ("mandate revoked", "1012"),
        ("bank account removed", "1012"),
    }  # fmt: skip


def test_an_account_is_stored_once_for_a_customer(conn: Connection, customer: str, run: Run) -> None:
    account = said(add(customer))
    assert refused(add(customer, number="9876-5432-1012")) == f"the customer has this account already: {account}"
    said(run("ach", "accounts", "remove", account, *WHY))
    assert said(add(customer)) != account
    assert "no customer" in refused(add("cus_none"))


def test_keys_are_rotated_without_a_change_of_the_accounts(
    run: Run, conn: Connection, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = said(add(customer))
    said(run("ach", "accounts", "validate", account, "--version=1", "--method=prenote", "--result=validated", *WHY))
    monkeypatch.setenv("SURETY_ACCOUNT_KEYS", NEW)
    assert "has no key old" in refused(run("ach", "accounts", "rotate"))
    monkeypatch.setenv("SURETY_ACCOUNT_KEYS", f"{NEW},{OLD}")
    assert "already" in refused(add(customer))
    assert said(run("ach", "accounts", "rotate")) == "1 numbers are encrypted by new; 0 by another key"
    assert said(run("ach", "accounts", "rotate")) == "0 numbers are encrypted by new; 0 by another key"
    assert (show(run, account)["key_id"], show(run, account)["validation"]) == ("new", "validated")
    monkeypatch.setenv("SURETY_ACCOUNT_KEYS", NEW)
    assert "already" in refused(add(customer))
    row = conn.execute("select sealed_number from surety.payer_accounts").fetchone()
    assert row is not None and AccountKeys(Secret(NEW)).open(row[0], "new", account) == NUMBER


def test_an_erasure_destroys_the_number_and_keeps_the_proof_of_consent(
    run: Run, conn: Connection, customer: str
) -> None:
    account = said(add(customer))
    conn.execute("select surety.erase_customer(%s, surety.time_now())", (customer,))
    row = conn.execute("select holder_name, sealed_number, fingerprint, mandate ? 'text' from surety.payer_accounts")
    assert row.fetchall() == [(None, None, None, True)]
    shown = show(run, account)
    assert shown["removed_at"] is not None and shown["mandate_revoked_at"] is not None


@pytest.mark.parametrize(
    ("words", "number", "message"),
    [
        (("--routing", "011401534"), NUMBER, "--routing: must have nine digits"),
        (("--routing", "٠١١٤٠١٥٣٣"), NUMBER, "--routing: must have nine digits"),
        (("--accepted-at", "2999-01-01T00:00:00Z"), NUMBER, "mandate.accepted_at must not be in the future"),
        (("--accepted-at", "yesterday"), NUMBER, "--accepted-at: must be a time with its offset"),
        (("--accepted-at", "2026-11-01T09:00:00"), NUMBER, "--accepted-at: must be a time with its offset"),
        (("--ip-address", "nowhere"), NUMBER, "mandate.ip_address must be an IPv4 or IPv6 address"),
        (("--mandate-text", " "), NUMBER, "--mandate-text: must have 1 to 5000 characters"),
        ((), "12", "the account number must have 4 to 17"),
    ],
)
def test_wrong_words_are_refused(customer: str, words: tuple[str, ...], number: str, message: str) -> None:
    assert message in refused(add(customer, *words, number=number))


def test_without_a_key_nothing_is_stored(run: Run, customer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SURETY_ACCOUNT_KEYS")
    assert refused(add(customer)) == "SURETY_ACCOUNT_KEYS is not set"
    monkeypatch.setenv("SURETY_ACCOUNT_KEYS", said(run("ach", "accounts", "new-key", "first")))
    assert said(add(customer)).startswith("bac_")


def test_ending_twice_is_no_error_and_an_unknown_account_is_one(run: Run, customer: str) -> None:
    account = said(add(customer))
    for _ in range(2):
        assert said(run("ach", "accounts", "revoke", account, *WHY)) == f"the mandate of {account} is revoked"
        assert said(run("ach", "accounts", "remove", account, *WHY)) == f"{account} is removed"
    for word in ("revoke", "remove"):
        assert "there is no bank account bac_none" in refused(run("ach", "accounts", word, "bac_none", *WHY))
    assert "there is no bank account bac_none" in refused(run("ach", "accounts", "show", "bac_none"))
