"""A merchant's name and account change; payments stay on the account that they were made on."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Run, refused, said
from tests.db.test_partitions import move_clock
from tests.support.payments import Connection, add_merchant, pay

UNCHECKED = (
    "it was not checked whether acct_1 is connected to the platform: STRIPE_API_KEY is not set;"
    " --unchecked does without"
)


def merchant_of(run: Run) -> dict[str, object]:
    [found] = json.loads(said(run("merchants", "list", "--json")))
    return dict(found)


@pytest.fixture(autouse=True)
def no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STRIPE_API_KEY", "SURETY_SANDBOX_URL"):
        monkeypatch.delenv(name, raising=False)


def test_name_and_account_are_set_and_audited_with_what_they_were(run: Run, conn: Connection) -> None:
    merchant = said(run("merchants", "add", "Acme Books"))
    words = ("merchants", "set", merchant, "--name", "Acme Toys", "--account", "acct_1", "--unchecked")
    assert said(run(*words)) == f"{merchant} is changed"
    assert said(run(*words)) == f"{merchant} is unchanged"
    found = merchant_of(run)
    assert (found["name"], found["account"]) == ("Acme Toys", "acct_1")
    said(run("merchants", "set", merchant, "--account", "platform"))
    assert merchant_of(run)["account"] is None
    query = "select snapshot - 'database_user' from audit.entries where outcome = 'merchant changed' order by id"
    assert [row[0] for row in conn.execute(query)] == [
        {
            "name": "Acme Toys",
            "name_before": "Acme Books",
            "provider_account": "acct_1",
            "provider_account_before": "",
        },
        {"provider_account": "", "provider_account_before": "acct_1"},
    ]


def test_account_of_a_merchant_with_payments_stays_and_its_name_may_change(run: Run, conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    pay(conn, key_hash)
    said(run("merchants", "suspend", merchant))
    move_clock(conn, "1 hour")
    refusal = refused(run("merchants", "set", merchant, "--account", "acct_1", "--unchecked"))
    assert refusal == f"--account: {merchant} has payments or customers, which stay on its account; add another one"
    assert said(run("merchants", "set", merchant, "--name", "Acme Toys")) == f"{merchant} is changed"


def test_account_of_a_merchant_with_keys_changes_once_no_request_can_have_read_the_old_one(
    run: Run, conn: Connection
) -> None:
    merchant, _ = add_merchant(conn)
    words = ("merchants", "set", merchant, "--account", "acct_1", "--unchecked")
    refusal = (
        f"--account: {merchant} has keys; suspend it, and set the account a minute later, before its first payment"
    )
    assert refused(run(*words)) == refusal
    said(run("merchants", "suspend", merchant))
    assert refused(run(*words)) == refusal
    move_clock(conn, "61 seconds")
    assert said(run(*words)) == f"{merchant} is changed"


@pytest.mark.parametrize(
    ("words", "report"),
    [
        ((), "give --name, --account or both"),
        (("--name", " "), "a merchant's name has 1 to 200 printable characters, and no space at its ends"),
        (("--account", "ACCT 1"), "--account: an id of the provider's, such as acct_1032D82eZvKYlo2C"),
        (("--account", "acct_2", "--unchecked"), "--account: another merchant has the account acct_2"),
        (("--account", "acct_1"), UNCHECKED),
    ],
)
def test_change_that_breaks_a_rule_is_refused(run: Run, words: tuple[str, ...], report: str) -> None:
    merchant = said(run("merchants", "add", "Acme Books"))
    said(run("merchants", "add", "Acme Toys", "--account", "acct_2", "--unchecked"))
    assert refused(run("merchants", "set", merchant, *words)) == report
    assert refused(run("merchants", "set", "mer_none", "--name", "Acme")) == "there is no merchant mer_none"


def test_empty_account_is_refused_and_changes_nothing(run: Run) -> None:
    merchant = said(run("merchants", "add", "Acme Books", "--account", "acct_1", "--unchecked"))
    assert refused(run("merchants", "set", merchant, "--account", "")).startswith("--account: an id of the provider's")
    assert merchant_of(run)["account"] == "acct_1"
