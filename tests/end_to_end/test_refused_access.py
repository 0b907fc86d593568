"""A refused key, an account that is cut off, a missing permission: what waits, what status says, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.finding import Finding
from app.status_findings import find_problems
from jobs.polling import poll_events
from jobs.stripe.connections import OutgoingRequest
from jobs.worker import Worker
from tests.support.payments import Connection, add_merchant, command, pay, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import (
    NO_AUTOMATIC_RETRY,
    attempts,
    in_process_worker,
    run_until_idle,
    shorten_delays,
    wait_for_worker,
    watch_requests,
    worker_process,
)

ENDED = {"confirmed", "settled"}
SHOP, OTHER_SHOP = "acct_shop", "acct_other"
RESTRICTED_KEY = "rk_test_restricted"
RESOURCES = ("payment_intent", "charge", "dispute", "balance", "balance_transaction_source", "payout", "event")
PERMISSIONS = frozenset(f"rak_{resource}_{access}" for resource in RESOURCES for access in ("read", "write"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("access")) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared: SandboxProcess) -> Iterator[SandboxProcess]:
    """A provider that gives full access, before and after."""
    yield shared
    give_access(shared)


def give_access(sandbox: SandboxProcess) -> None:
    sandbox.control("key-state", {"state": "valid"})
    for account in (SHOP, OTHER_SHOP):
        sandbox.control("accounts", {"id": account, "connected": True})


def refuse_key(sandbox: SandboxProcess, state: str) -> None:
    sandbox.control("key-state", {"state": state})


def cut_off(sandbox: SandboxProcess, account: str) -> None:
    sandbox.control("accounts", {"id": account, "connected": False})


def restrict(sandbox: SandboxProcess, *missing: str) -> None:
    """Give a restricted key all permissions but these."""
    given = sorted(PERMISSIONS - set(missing))
    sandbox.control("keys", {"key": RESTRICTED_KEY, "permissions": given, "connect": given})


@pytest.fixture
def shop(conn: Connection) -> Callable[..., list[str]]:
    """Makes payments of the merchant at an account."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute("insert into procrastinate.procrastinate_workers default values")
    keys = {
        account: add_merchant(conn, account=account, name=account or "platform")[1]
        for account in ("", SHOP, OTHER_SHOP)
    }
    return lambda account="", count=1, **fields: pay(conn, keys[account], count, **fields)


def pass_time(conn: Connection, interval: str) -> None:
    """The database's clock goes on by so much."""
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update"
        " set ahead = clock.ahead + excluded.ahead",
        (interval,),
    )
    conn.execute("update procrastinate.procrastinate_workers set last_heartbeat = now()")


def circuits(conn: Connection) -> dict[str, str]:
    """The causes of the open circuits, by account."""
    return dict(conn.execute("select account, cause from surety.circuit_breakers where cause is not null").fetchall())


def transitions(conn: Connection) -> list[tuple[str, str]]:
    """Cause and change of each audit entry of circuits."""
    return conn.execute(
        "select snapshot ->> 'cause', outcome from audit.entries where kind = 'system' and outcome like 'circuit %'"
        " order by id"
    ).fetchall()


def refusals(conn: Connection) -> list[Finding]:
    """The findings about refused access; each wants a person to act."""
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    found = [finding for finding in find_problems(state) if finding.id == "access-refused"]
    assert {finding.urgency for finding in found} <= {2}
    return found


def states(conn: Connection, payments: list[str]) -> set[str]:
    return {state_of(conn, payment_id) for payment_id in payments}


def receive(conn: Connection, type_: str, account: str, body: dict[str, Any] | None = None) -> None:
    """Store a webhook, as the receiver does."""
    event = {
        "n": 0,
        "provider": "stripe",
        "account": account,
        "livemode": False,
        "event_id": f"evt_{type_}_{account}",
        "type": type_,
        "headers": {"stripe-signature": "valid"},
        "body": json.dumps(body or {}),
        "address": "",
    }
    conn.execute("select surety.receive_webhooks(%s)", (json.dumps([event]),))


async def later(conn: Connection, worker: Worker, interval: str) -> None:
    """Time passes, and the worker does what it does every second."""
    pass_time(conn, interval)
    await worker.circuit_breaker.report_and_probe()
    await run_until_idle(worker)


def accounts(requests: list[OutgoingRequest]) -> list[str]:
    """The account of each request."""
    return [request.headers.get("Stripe-Account", "") for request in requests]


@pytest.mark.parametrize("state", ["expired", "revoked"])
async def test_refused_key_holds_all_accounts_and_is_probed_once_for_all(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]], state: str
) -> None:
    payments = shop(SHOP, 3) + shop(OTHER_SHOP, 2)
    refuse_key(sandbox, state)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert circuits(conn) == dict.fromkeys(("", SHOP, OTHER_SHOP), "key_refused")
        asked = watch_requests(worker)
        for _ in range(10):
            await later(conn, worker, "1 minute")
            [finding] = refusals(conn)
        assert accounts(asked) == [""] * 10, "one probe a minute, for all accounts"
        assert "our key" in finding.what and "API Key provided: sk_test_…" in finding.what
        assert "STRIPE_API_KEY" in finding.next
        give_access(sandbox)
        await later(conn, worker, "1 minute")
    assert states(conn, payments) <= ENDED
    assert refusals(conn) == []
    assert transitions(conn) == [("key_refused", "circuit opened"), ("key_refused", "circuit closed")]
    assert attempts(conn) == []
    assert conn.execute("select count(*) from outbox.dead_letters").fetchone() == (0,)


async def test_account_that_is_cut_off_is_held_and_others_are_unaffected(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    held, others = shop(SHOP, 3), shop("", 3) + shop(OTHER_SHOP, 3)
    cut_off(sandbox, SHOP)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert circuits(conn) == {SHOP: "account_refused"}
        assert states(conn, others) <= ENDED
        asked = watch_requests(worker)
        for minute in range(20):
            others += shop(OTHER_SHOP)
            held += shop(SHOP) if minute < 5 else []
            await later(conn, worker, "1 minute")
            [finding] = refusals(conn)
            assert f"account {SHOP} ({SHOP})" in finding.what and "account_invalid" in finding.what
        assert states(conn, others) <= ENDED
        assert states(conn, held) <= {"initiated", "submitting"}
        assert accounts(asked).count(SHOP) <= 8, "probes are five minutes apart in the end"
        give_access(sandbox)
        await later(conn, worker, "5 minutes")
    assert states(conn, held) <= ENDED
    assert transitions(conn) == [("account_refused", "circuit opened"), ("account_refused", "circuit closed")]
    assert attempts(conn) == [] and refusals(conn) == [] and not violations(conn)


@pytest.mark.parametrize("refuse", [refuse_key, cut_off])
async def test_idle_system_notices_a_refusal_by_its_polls(
    conn: Connection,
    database: str,
    sandbox: SandboxProcess,
    shop: Callable[..., list[str]],
    refuse: Callable[..., None],
) -> None:
    refuse(sandbox, "expired" if refuse is refuse_key else SHOP)
    async with in_process_worker(database, sandbox.url) as worker:
        asked = watch_requests(worker)
        await poll_events(worker)
        [finding] = refusals(conn)
        assert "0 events held" in finding.what
        # The list, the probe of its account, and that of the platform's.
        assert len(asked) <= 2 + 3
        give_access(sandbox)
        await later(conn, worker, "5 minutes")
        await poll_events(worker)
    assert refusals(conn) == []


async def test_missing_permission_holds_only_its_calls_and_stays_visible(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(SHOP)
    async with in_process_worker(database, sandbox.url, STRIPE_API_KEY=RESTRICTED_KEY) as worker:
        await run_until_idle(worker)
        restrict(sandbox, "rak_charge_write")
        [(key_hash,)] = conn.execute(
            "select k.hash from surety.api_keys as k join surety.merchants as m on m.id = k.merchant_id"
            " where m.provider_account = %s",
            (SHOP,),
        ).fetchall()
        assert command(conn, "create_refund", key_hash, payment_id=payments[0])["status"] == 201
        asked = watch_requests(worker)
        await run_until_idle(worker)
        assert len(asked) <= 2, "the refund, and at most one probe"
        for _ in range(30):
            payments += shop(SHOP)
            await later(conn, worker, "1 minute")
            [finding] = refusals(conn)
        assert "rak_charge_write" in finding.what and f"account {SHOP}" in finding.what
        assert transitions(conn) == [], "a probe is answered, so the account is well"
        assert states(conn, payments[1:]) <= ENDED
        restrict(sandbox)
        await later(conn, worker, "5 minutes")
    assert conn.execute("select state from surety.refunds").fetchall() == [("succeeded",)]
    assert refusals(conn) == []


async def test_key_without_the_probes_permission_closes_the_circuit_of_an_outage(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    restrict(sandbox, "rak_balance_read", "rak_balance_write")
    conn.execute("select surety.open_circuit('stripe', '', 'outage', 'no answer', 'test')")
    async with in_process_worker(database, sandbox.url, STRIPE_API_KEY=RESTRICTED_KEY) as worker:
        await worker.circuit_breaker._report_calls()
        await later(conn, worker, "10 seconds")
    assert circuits(conn) == {}


async def test_list_without_its_permission_is_a_refusal_at_once(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    restrict(sandbox, "rak_event_read", "rak_event_write")
    async with in_process_worker(database, sandbox.url, STRIPE_API_KEY=RESTRICTED_KEY) as worker:
        await poll_events(worker)
    found = refusals(conn)
    assert len(found) == 3 and all("rak_event_read" in finding.what for finding in found)
    assert circuits(conn) == {}


async def test_refused_key_during_an_outage_becomes_the_cause(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    conn.execute("select surety.open_circuit('stripe', '', 'outage', 'no answer', 'test')")
    refuse_key(sandbox, "revoked")
    async with in_process_worker(database, sandbox.url) as worker:
        await worker.circuit_breaker._report_calls()
        await later(conn, worker, "10 seconds")
        assert circuits(conn) == dict.fromkeys(("", SHOP, OTHER_SHOP), "key_refused")
        conn.execute("select surety.open_circuit('stripe', '', 'outage', 'no answer', 'test')")
        assert circuits(conn)[""] == "key_refused", "an outage does not prove that the key is accepted"


async def test_account_refused_before_the_key_was_waits_for_the_key(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    conn.execute("select surety.open_circuit('stripe', %s, 'account_refused', 'no access', 'test')", (SHOP,))
    refuse_key(sandbox, "revoked")
    async with in_process_worker(database, sandbox.url) as worker:
        await poll_events(worker)
        assert circuits(conn) == {"": "key_refused", OTHER_SHOP: "key_refused", SHOP: "account_refused"}
        asked = watch_requests(worker)
        await later(conn, worker, "10 minutes")
        assert accounts(asked) == [""]
        give_access(sandbox)
        await later(conn, worker, "1 minute")
        await later(conn, worker, "1 second")
    assert circuits(conn) == {}


async def test_more_than_five_refused_accounts_are_counted(
    conn: Connection, database: str, shop: Callable[..., list[str]]
) -> None:
    for number in range(7):
        account = f"acct_{number}"
        merchant, _ = add_merchant(conn, account=account, name=f"shop {number}")
        conn.execute("select surety.open_circuit('stripe', %s, 'account_refused', 'no access', 'test')", (account,))
    assert len(refusals(conn)) == 6
    assert refusals(conn)[-1].what == "2 more accounts refused"
    conn.execute("select surety.suspend_merchant(%s, true, 'test')", (merchant,))
    assert refusals(conn)[-1].what == "1 more account refused", "a suspended merchant's account needs no one"


async def test_webhook_about_access_has_the_account_probed_at_once(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        receive(conn, "account.application.deauthorized", OTHER_SHOP)
        receive(conn, "account.application.deauthorized", "acct_foreign")
        asked = watch_requests(worker)
        await run_until_idle(worker)
        assert accounts(asked) == [OTHER_SHOP] and circuits(conn) == {}, "it proves nothing"
        cut_off(sandbox, SHOP)
        receive(conn, "account.application.deauthorized", SHOP)
        await run_until_idle(worker)
        assert circuits(conn) == {SHOP: "account_refused"}
        give_access(sandbox)
        receive(conn, "account.application.authorized", SHOP)
        await run_until_idle(worker)
        assert circuits(conn) == {}


async def test_webhooks_of_an_account_that_is_cut_off_are_held_until_it_is_not(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    [payment_id] = shop(SHOP)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        [(intent,)] = conn.execute("select provider_id from surety.payments where id = %s", (payment_id,)).fetchall()
        cut_off(sandbox, SHOP)
        conn.execute("select surety.open_circuit('stripe', %s, 'account_refused', 'no access', 'test')", (SHOP,))
        await worker.circuit_breaker._report_calls()
        receive(conn, "refund.failed", SHOP, {"data": {"object": {"id": "re_1", "object": "refund"}}})
        assert await run_until_idle(worker, "apply_webhooks") == 1
        pass_time(conn, "9 minutes")
        assert await run_until_idle(worker, "apply_webhooks") == 0, "it is not claimed again and again"
        conn.execute("select surety.close_circuit('stripe', %s, 'it answers', 'test')", (SHOP,))
        conn.execute("select outbox.schedule_due_handlers()")
        assert conn.execute("select due_at <= surety.time_now() from outbox.retries").fetchall() == [(True,)]
    assert intent


def test_worker_that_starts_with_a_valid_key_closes_the_circuits_of_a_refused_one_at_once(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(SHOP, 2)
    conn.execute("select surety.open_circuit('stripe', '', 'key_refused', 'Stripe 401', 'test')")
    conn.execute("update surety.circuit_breakers set next_probe_at = now() + interval '1 hour' where account = ''")
    with worker_process(database, sandbox.url):
        eventually(lambda: circuits(conn) == {}, 20)
        eventually(lambda: states(conn, payments) <= ENDED, 30)


def test_expired_key_is_reported_within_a_minute_and_what_waits_goes_on(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]], tmp_path: Path
) -> None:
    refuse_key(sandbox, "expired")
    with (
        (tmp_path / "log").open("wb") as log,
        worker_process(database, sandbox.url, stderr=log),
    ):
        wait_for_worker(conn)
        payments = shop(SHOP, 3) + shop("", 2)
        conn.execute("select outbox.schedule_handlers('{submit}')")
        [finding] = eventually(lambda: refusals(conn), 20)
        assert "api_key_expired" in finding.what
        give_access(sandbox)
        eventually(lambda: states(conn, payments) <= ENDED, 30)
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "circuit of account" in line]
    assert "opened (key_refused): Stripe 401 api_key_expired: Expired API Key provided: sk_test_…" in lines[0]
    assert "closed: it answers" in lines[-1]
