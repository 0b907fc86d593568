"""A merchant's own account at the provider: it must be connected to the platform, and not be the platform's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from click.testing import CliRunner, Result

from app.cli import cli
from tests.cli.conftest import refused, said
from tests.cli.test_status import add_live_worker, read_status
from tests.support.operators import admin_key
from tests.support.payments import Connection, add_merchant
from tests.support.sandbox_process import SandboxProcess, running_sandbox

OWN_ACCOUNT = "acct_1SuretyPlatform"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("merchant_accounts")) as running:
        yield running


@pytest.fixture
def run(database: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`surety merchants add …` in the test's database, with these settings."""
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("SURETY_OPERATOR_KEY", admin_key(database))
    for name in ("STRIPE_API_KEY", "SURETY_SANDBOX_URL"):
        monkeypatch.delenv(name, raising=False)

    def add(account: str, *options: str, **settings: str) -> Result:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(cli, ["merchants", "add", "Acme Books", "--account", account, *options])

    return add


def merchants(conn: Connection) -> int:
    row = conn.execute("select count(*) from surety.merchants").fetchone()
    assert row is not None
    return int(row[0])


def know_own_account(conn: Connection) -> None:
    """As if a worker had checked its key."""
    conn.execute("select surety.record_key_check('stripe', false, false, %s, '{}')", (OWN_ACCOUNT,))


def test_platforms_own_account_is_refused_by_the_provider(run: Run, sandbox: SandboxProcess, conn: Connection) -> None:
    said = refused(run(OWN_ACCOUNT, SURETY_SANDBOX_URL=sandbox.url))
    assert said == (f"--account: {OWN_ACCOUNT} is the platform's own account; leave --account out for a merchant on it")
    assert merchants(conn) == 0


def test_platforms_own_account_is_refused_once_a_worker_has_found_it(run: Run, conn: Connection) -> None:
    know_own_account(conn)
    assert "is the platform's own account" in refused(run(OWN_ACCOUNT, "--unchecked"))
    with pytest.raises(psycopg.errors.CheckViolation) as violation:
        add_merchant(conn, account=OWN_ACCOUNT)
    assert violation.value.diag.constraint_name == "merchant_has_no_account_of_the_platform"
    assert merchants(conn) == 0


def test_account_that_is_not_connected_is_refused(run: Run, sandbox: SandboxProcess, conn: Connection) -> None:
    sandbox.control("accounts", {"id": "acct_1Foreign", "connected": False})
    report = refused(run("acct_1Foreign", SURETY_SANDBOX_URL=sandbox.url))
    assert report.startswith("--account: acct_1Foreign is no account that is connected to the platform: Stripe 403")
    assert merchants(conn) == 0


def test_connected_account_is_added_without_a_word(run: Run, sandbox: SandboxProcess, conn: Connection) -> None:
    add_merchant(conn)
    result = run("acct_1Books", SURETY_SANDBOX_URL=sandbox.url)
    assert said(result).startswith("mer_")
    assert result.stderr == ""


def test_account_that_is_empty_is_refused(run: Run, conn: Connection) -> None:
    assert "--account: an id of the provider's" in refused(run(""))
    assert merchants(conn) == 0


@pytest.mark.parametrize("state", ["revoked", "expired"])
def test_account_that_could_not_be_checked_is_refused(
    run: Run, sandbox: SandboxProcess, conn: Connection, state: str
) -> None:
    assert "STRIPE_API_KEY is not set; --unchecked" in refused(run("acct_1Books"))
    sandbox.control("key-state", {"state": state})
    try:
        assert "Stripe 401" in refused(run("acct_1Books", SURETY_SANDBOX_URL=sandbox.url))
    finally:
        sandbox.control("key-state", {"state": "valid"})
    assert "no answer" in refused(run("acct_1Books", SURETY_SANDBOX_URL="http://127.0.0.1:9"))
    assert merchants(conn) == 0


def test_account_that_could_not_be_checked_is_added_with_a_warning_if_that_is_wanted(
    run: Run, sandbox: SandboxProcess, conn: Connection
) -> None:
    add_merchant(conn)
    result = run("acct_1Books", "--unchecked")
    assert said(result).startswith("mer_")
    assert result.stderr == (
        "it was not checked whether acct_1Books is connected to the platform: STRIPE_API_KEY is not set\n"
    )
    key = "rk_test_merchants"
    sandbox.control("keys", {"key": key, "permissions": [], "connect": []})
    result = run("acct_1Toys", "--unchecked", SURETY_SANDBOX_URL=sandbox.url, STRIPE_API_KEY=key)
    assert said(result).startswith("mer_")
    assert "does not have any Connect permissions" in result.stderr
    assert key not in result.stderr
    result = run("acct_1Tools", "--unchecked", SURETY_SANDBOX_URL="http://127.0.0.1:9")
    assert "no answer" in result.stderr
    assert merchants(conn) == 4


def test_own_account_is_known_from_the_refusal_to_read_it(run: Run, sandbox: SandboxProcess, conn: Connection) -> None:
    key = "rk_test_unreadable"
    sandbox.control("keys", {"key": key, "permissions": ["rak_balance_read"], "connect": ["rak_balance_read"]})
    assert "own account" in refused(run(OWN_ACCOUNT, SURETY_SANDBOX_URL=sandbox.url, STRIPE_API_KEY=key))


def test_key_of_the_other_mode_is_not_asked(run: Run, sandbox: SandboxProcess, conn: Connection) -> None:
    reason = refused(run("acct_1Books", SURETY_SANDBOX_URL=sandbox.url, STRIPE_API_KEY="sk_live_sandbox"))
    assert "the database is in test mode" in reason
    assert merchants(conn) == 0


def test_key_of_another_account_is_a_critical_finding(database: str, conn: Connection) -> None:
    add_live_worker(conn)
    conn.execute("select surety.record_key_check('stripe', false, false, 'acct_1Tried', '{}')")
    know_own_account(conn)
    assert read_status(database)[1]["findings"] == []
    add_merchant(conn)
    conn.execute("select surety.record_key_check('stripe', false, false, 'acct_1Books', '{}')")
    code, state = read_status(database)
    [finding] = state["findings"]
    assert (code, finding["id"], finding["urgency"]) == (2, "key-of-another-account", 2)
    assert "one of acct_1Books" in finding["what"] and OWN_ACCOUNT in finding["what"]
    with pytest.raises(psycopg.errors.CheckViolation):
        add_merchant(conn, account="acct_1Books")
    conn.execute("select surety.record_key_check('stripe', false, false, null, '{}')")
    assert read_status(database)[1]["findings"] == []
    know_own_account(conn)
    assert read_status(database)[1]["findings"] == []


def test_merchant_on_the_platforms_own_account_is_a_critical_finding(database: str, conn: Connection) -> None:
    add_live_worker(conn)
    merchant, _ = add_merchant(conn, account=OWN_ACCOUNT)
    know_own_account(conn)
    code, state = read_status(database)
    [finding] = state["findings"]
    assert (code, finding["id"], finding["urgency"]) == (2, "merchant-on-own-account", 2)
    assert finding["next"] == f"surety merchants suspend {merchant}"
    assert "the platform's own account" in finding["what"]
    conn.execute("update surety.merchants set provider_account = '' where id = %s", (merchant,))
    assert read_status(database)[1]["findings"] == []
