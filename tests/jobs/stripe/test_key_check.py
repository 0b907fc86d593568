"""The check of the provider's key: its permissions, its own account, and what operators see of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stripe

from db.settings import load_settings
from jobs.periodic import interval_seconds
from jobs.stripe.errors import AccessRefused, PermissionMissing, provider_error
from jobs.stripe.key_check import PERMISSIONS, check_provider_key, check_provider_key_if_due, key_digest
from tests.cli.test_status import add_live_worker, read_status, surety
from tests.support.payments import Connection, add_merchant
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import ROOT, environment, in_process_worker, watch_requests, worker_process

KEY = "rk_test_9aKd0"
OWN_ACCOUNT = "acct_1SuretyPlatform"
READ = {wanted.name for wanted in PERMISSIONS if wanted.access == "Read"}
WRITTEN = {wanted.name for wanted in PERMISSIONS if wanted.access == "Write"}
NEEDED = WRITTEN | {name for name in READ if name.replace("_read", "_write") not in WRITTEN}
"""All that a key needs: write includes read."""


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path) as running:
        yield running


def restrict(sandbox: SandboxProcess, permissions: set[str], connect: set[str] = NEEDED) -> None:
    """Restrict the key to these permissions, at the platform's own account and at connected ones."""
    sandbox.control("keys", {"key": KEY, "permissions": sorted(permissions), "connect": sorted(connect)})


async def check(database: str, sandbox: SandboxProcess, key: str = KEY) -> None:
    """Check the key as a worker does."""
    async with in_process_worker(database, sandbox.url, STRIPE_API_KEY=key) as worker:
        await check_provider_key(worker)


def checked_key(conn: Connection) -> dict[str, Any]:
    """What the last check found."""
    row = conn.execute("select to_jsonb(k) from surety.list_provider_keys() as k").fetchone()
    assert row is not None
    found: dict[str, Any] = row[0]
    return found


def findings(database: str) -> dict[str, tuple[int, str]]:
    """Urgency and description by finding."""
    return {one["id"]: (one["urgency"], one["what"]) for one in read_status(database)[1]["findings"]}


def test_table_of_permissions_names_each_once() -> None:
    names = [wanted.name for wanted in PERMISSIONS]
    assert len(names) == len(set(names))
    assert {name.replace("_write", "_read") for name in WRITTEN} <= READ
    assert [wanted for wanted in PERMISSIONS if (wanted.method == "post") != (wanted.access == "Write")] == []


def test_every_resource_that_the_client_uses_is_checked() -> None:
    client = (ROOT / "jobs" / "stripe" / "client.py").read_text(encoding="utf-8")
    used = set(re.findall(r'"/v1/([a-z_]+)', client))
    assert len(used) > 5
    assert used == {wanted.path.split("/")[2] for wanted in PERMISSIONS}


async def test_restricted_key_with_all_permissions_passes(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    add_live_worker(conn)
    restrict(sandbox, NEEDED)
    await check(database, sandbox)
    found = checked_key(conn)
    assert (found["is_restricted"], found["livemode"], found["missing_permissions"]) == (True, False, [])
    assert (found["account_id"], found["error"]) == (OWN_ACCOUNT, None)
    assert findings(database) == {}
    assert f"key  test key at stripe, restricted, of {OWN_ACCOUNT}, checked " in surety(database, "status").stdout


@pytest.mark.parametrize("missing", sorted(NEEDED))
async def test_missing_permission_is_named(
    database: str, conn: Connection, sandbox: SandboxProcess, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    restrict(sandbox, NEEDED - {missing})
    await check(database, sandbox)
    expected = [missing] if missing in READ else [missing, missing.replace("_write", "_read")]
    assert checked_key(conn)["missing_permissions"] == expected
    assert f"lacks permissions that are needed: {', '.join(expected)}" in caplog.text
    urgency, what = findings(database)["key-permissions"]
    assert urgency == 2
    assert f"lacks {', '.join(expected)}, since " in what
    assert KEY not in caplog.text + what


async def test_read_only_key_lacks_the_permissions_to_write(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    restrict(sandbox, READ)
    await check(database, sandbox)
    assert set(checked_key(conn)["missing_permissions"]) == WRITTEN


async def test_finding_goes_once_the_permission_is_given(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    restrict(sandbox, NEEDED - {"rak_payout_read"})
    await check(database, sandbox)
    since = conn.execute("select missing_since from surety.provider_keys").fetchone()
    await check(database, sandbox)
    assert conn.execute("select missing_since from surety.provider_keys").fetchone() == since
    restrict(sandbox, NEEDED)
    await check(database, sandbox)
    assert "key-permissions" not in findings(database)


async def test_permissions_for_connected_accounts_are_checked_apart(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    add_merchant(conn, account="acct_1")
    restrict(sandbox, READ, NEEDED - {"rak_dispute_write"})
    await check(database, sandbox)
    missing = ["rak_dispute_write (Connect)", "rak_dispute_read (Connect)"]
    assert checked_key(conn)["missing_permissions"] == missing
    restrict(sandbox, READ, set())
    await check(database, sandbox)
    assert len(checked_key(conn)["missing_permissions"]) == len(PERMISSIONS)


async def test_secret_key_is_checked_by_one_read(database: str, conn: Connection, sandbox: SandboxProcess) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        requests = watch_requests(worker)
        await check_provider_key(worker)
    assert [request.target for request in requests] == ["/v1/account"]
    assert (checked_key(conn)["account_id"], checked_key(conn)["is_restricted"]) == (OWN_ACCOUNT, False)


async def test_check_changes_nothing_at_the_provider(database: str, conn: Connection, sandbox: SandboxProcess) -> None:
    restrict(sandbox, NEEDED)
    await check(database, sandbox)
    assert sandbox.get("/v1/events")["data"] == []


def test_accounts_behind_an_open_circuit_are_not_asked(conn: Connection) -> None:
    add_merchant(conn, account="acct_2")
    add_merchant(conn, account="acct_1")
    query = "select account, takes_payments from surety.accounts_to_check('stripe')"
    assert conn.execute(query).fetchall() == [("", False), ("acct_1", True)]
    conn.execute("select surety.open_circuit('stripe', '', 'outage', 'no answer', 'worker:w')")
    conn.execute("select surety.open_circuit('stripe', 'acct_1', 'outage', 'no answer', 'worker:w')")
    assert conn.execute(query).fetchall() == [("acct_2", True)]


async def test_refused_key_is_no_missing_permission(database: str, conn: Connection, sandbox: SandboxProcess) -> None:
    restrict(sandbox, NEEDED)
    sandbox.control("key-state", {"state": "expired"})
    await check(database, sandbox)
    found = checked_key(conn)
    assert (found["missing_permissions"], found["checked_seconds"]) == ([], None)
    assert "Expired API Key provided" in found["error"]
    assert "not checked yet; the last check failed" in surety(database, "status").stdout


async def test_unanswered_check_keeps_what_the_last_one_found(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    restrict(sandbox, NEEDED - {"rak_payout_read"})
    await check(database, sandbox)
    before = checked_key(conn)
    async with in_process_worker(database, "http://127.0.0.1:9", STRIPE_API_KEY=KEY) as worker:
        await check_provider_key(worker)
    after = checked_key(conn)
    assert after["missing_permissions"] == before["missing_permissions"] == ["rak_payout_read"]
    assert (before["error"], after["account_id"]) == (None, OWN_ACCOUNT)
    assert "no answer" in after["error"]
    assert "; the last check failed: no answer" in surety(database, "status").stdout


@pytest.mark.parametrize(
    ("message", "permissions", "account"),
    [
        (
            (
                "The provided key 'rk_test_***9aKd' does not have the required permissions for this endpoint on account"
                " 'acct_1A'. Having the 'rak_charge_read' permission would allow this request to continue."
            ),
            ("rak_charge_read",),
            "acct_1A",
        ),
        (
            (
                "Having the 'rak_confirmation_token_client_read', 'rak_payout_read' permissions would allow this"
                " request to continue."
            ),
            ("rak_confirmation_token_client_read", "rak_payout_read"),
            None,
        ),
        (
            (
                "The provided key 'rk_live_***0Xyz' does not have the required permissions for this endpoint on account"
                " 'acct_1A'.  This is a restricted API key, but the required permissions are not available for use by"
                " restricted keys."
            ),
            (),
            "acct_1A",
        ),
        (
            (
                "You passed a restricted API key with the Stripe-Account header, but the restricted API key does not"
                " have any Connect permissions."
            ),
            (),
            None,
        ),
    ],
)
def test_stripes_words_for_a_missing_permission_are_understood(
    message: str, permissions: tuple[str, ...], account: str | None
) -> None:
    body = {"error": {"type": "invalid_request_error", "message": message}}
    for writes in (True, False):
        error = provider_error(stripe.PermissionError(message, http_status=403, json_body=body), writes=writes)
        assert isinstance(error, PermissionMissing)
        assert (error.permissions, error.account_id) == (permissions, account)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "Invalid API Key provided: rk_test_***9aKd"),
        (
            403,
            (
                "The provided key 'sk_test_***9aKd' does not have access to account 'acct_1' (or that account does not"
                " exist). Application access may have been revoked."
            ),
        ),
    ],
)
def test_other_refusals_are_no_missing_permission(status: int, message: str) -> None:
    body = {"error": {"type": "invalid_request_error", "message": message}}
    error = provider_error(stripe.StripeError(message, http_status=status, json_body=body), writes=False)
    assert isinstance(error, AccessRefused)
    assert not isinstance(error, PermissionMissing)


def test_worker_checks_its_key_at_the_start_and_logs_what_is_missing(
    database: str, conn: Connection, sandbox: SandboxProcess, tmp_path: Path
) -> None:
    restrict(sandbox, NEEDED - {"rak_event_read"})
    log = tmp_path / "worker.log"
    with log.open("wb") as output, worker_process(database, sandbox.url, stderr=output, STRIPE_API_KEY=KEY):
        eventually(lambda: conn.execute("select from surety.provider_keys").fetchone() is not None, 20)
        eventually(lambda: "lacks permissions that are needed: rak_event_read" in log.read_text(), 20)
        eventually(lambda: f"started: test mode, provider {sandbox.url}" in log.read_text(), 20)
    assert KEY not in log.read_text()


async def test_key_is_checked_every_ten_minutes_and_each_minute_after_a_failure_or_with_another_key(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    settings = load_settings(environment(database, sandbox.url))
    assert interval_seconds("check_provider_key", settings) == 60
    restrict(sandbox, NEEDED - {"rak_payout_read"})
    async with in_process_worker(database, sandbox.url, STRIPE_API_KEY=KEY) as worker:
        due = "select surety.key_check_is_due('stripe', %s)", (key_digest(worker),)
        other = "select surety.key_check_is_due('stripe', %s)", (key_digest(worker)[::-1] + "0",)
        assert conn.execute(*due).fetchone() == (True,)
        await check_provider_key(worker)
        assert (conn.execute(*due).fetchone(), conn.execute(*other).fetchone()) == ((False,), (True,))
        conn.execute("update surety.provider_keys set checked_at = checked_at - interval '10 minutes'")
        assert conn.execute(*due).fetchone() == (True,)
        await check_provider_key_if_due(worker)
        assert conn.execute(*due).fetchone() == (False,)
        conn.execute("select surety.open_circuit('stripe', '', 'key_refused', 'Stripe 401', 'test')")
        await check_provider_key(worker)
        assert conn.execute(*due).fetchone() == (True,)
        assert "not asked" in checked_key(conn)["error"]
        conn.execute("select surety.close_circuit('stripe', '', 'it answers', 'test')")
        await check_provider_key_if_due(worker)
    assert (conn.execute(*due).fetchone(), checked_key(conn)["error"]) == ((False,), None)


async def test_failed_check_of_another_key_shows_nothing_of_the_former_one(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    restrict(sandbox, NEEDED - {"rak_payout_read"})
    await check(database, sandbox)
    assert checked_key(conn)["missing_permissions"] == ["rak_payout_read"]
    async with in_process_worker(database, "http://127.0.0.1:9", STRIPE_API_KEY="sk_test_another") as worker:
        await check_provider_key(worker)
    found = checked_key(conn)
    assert (found["missing_permissions"], found["checked_seconds"], found["is_restricted"]) == ([], None, False)
    assert found["account_id"] == OWN_ACCOUNT
    assert "not checked yet; the last check failed: no answer" in surety(database, "status").stdout
    assert "sk_test_another" not in str(conn.execute("select to_jsonb(k) from surety.provider_keys as k").fetchone())
