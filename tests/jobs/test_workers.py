"""Workers as operators run them: Procrastinate's processes, killed, stopped and restarted; what happens by itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from db.embedded.server import EmbeddedServer
from jobs.database import WORKER_CONNECTIONS_MAX
from jobs.handlers.webhooks import fetch_dispute
from jobs.periodic import PERIODIC_JOBS, cron
from jobs.polling import (
    merge_time_ranges,
    poll_balance_transactions,
    poll_payouts,
    poll_unfinished,
)
from jobs.stripe.facts import FactOrigin
from jobs.stripe.webhook_events import ProviderObject
from tests.support.payments import Connection, add_merchant, command, ledger_of, path_of, pay, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import (
    NO_AUTOMATIC_RETRY,
    ROOT,
    attempts,
    due,
    environment,
    in_process_worker,
    run_until_idle,
    shorten_delays,
    wait_for_worker,
    worker_process,
)

Pay = Callable[..., list[str]]

ENDED = {"settled", "failed", "canceled"}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    options = ("--hang-seconds=30", "--slow-seconds=0.7", "--payout-seconds=0")
    with running_sandbox(tmp_path_factory.mktemp("workers"), *options) as sandbox:
        yield sandbox


@pytest.fixture
def shop(conn: Connection) -> Pay:
    """Makes payments of 100.00 USD."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    return lambda count=1, **fields: pay(conn, key_hash, count, **fields)


def count(conn: Connection, query: str, *values: Any) -> int:
    row = conn.execute(query.encode(), values or None).fetchone()
    assert row is not None
    return int(row[0])


def all_ended(conn: Connection) -> bool:
    return count(conn, "select count(*) from surety.payments where state <> all(%s)", list(ENDED)) == 0


def double(sandbox: SandboxProcess) -> list[str]:
    """Payments that were charged more than once, by the sandbox's own memory."""
    found: list[str] = sandbox.control("charges/summary?metadata_key=surety_payment")["double"]
    return found


def test_without_a_provider_or_a_database_a_worker_refuses_to_start(database: str) -> None:
    command = [sys.executable, "-m", "procrastinate", "--app", "jobs.app", "worker"]
    bare = {"PATH": os.environ["PATH"]}
    for given, result in {
        "DATABASE_URL": "set STRIPE_API_KEY, or SURETY_SANDBOX_URL for the sandbox",
        "SURETY_SANDBOX_URL": "DATABASE_URL is not set",
    }.items():
        known = environment(database, "http://127.0.0.1:9")
        ended = subprocess.run(
            command, cwd=ROOT, env=bare | {given: known[given]}, capture_output=True, text=True, timeout=20, check=False
        )
        assert ended.returncode == 1
        assert result in ended.stderr


def test_processes_refuse_to_start_before_the_deploy_in_one_line(blank: str) -> None:
    with EmbeddedServer() as server:
        for url in (server.url, blank):
            ended = subprocess.run(
                [sys.executable, "-m", "procrastinate", "--app", "jobs.app", "worker"],
                cwd=ROOT, env={"PATH": os.environ["PATH"], **environment(url, "http://127.0.0.1:9")},
                capture_output=True, text=True, timeout=25, check=False,
            )  # fmt: skip
            assert ended.returncode == 1
            missing = "role surety_worker" if url == server.url else "surety.key_check_is_due"
            assert f"the database has no {missing}" in ended.stderr and "run `surety deploy` first" in ended.stderr
            assert "psycopg.pool" not in ended.stderr and len(ended.stderr.strip().splitlines()) <= 2, ended.stderr
            served = subprocess.run(
                [sys.executable, "-m", "app.cli", "api"],
                cwd=ROOT, env={"PATH": os.environ["PATH"], "DATABASE_URL": url},
                capture_output=True, text=True, timeout=25, check=False,
            )  # fmt: skip
            missing = "role surety_api" if url == server.url else "api.create_payments"
            assert f"the database has no {missing}" in served.stderr and "run `surety deploy` first" in served.stderr


@pytest.mark.parametrize(("livemode", "key"), [(False, "sk_live_1secret1"), (True, "rk_test_1secret1")])
def test_worker_with_a_key_of_the_other_mode_refuses_to_start(
    conn: Connection, database: str, livemode: bool, key: str
) -> None:
    conn.execute("select surety.set_livemode(%s)", (livemode,))
    known = {"PATH": os.environ["PATH"], "DATABASE_URL": database, "STRIPE_API_KEY": key}
    ended = subprocess.run(
        [sys.executable, "-m", "procrastinate", "--app", "jobs.app", "worker"],
        cwd=ROOT, env=known, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    ours, theirs = ("test", "live") if livemode else ("live", "test")
    assert f"STRIPE_API_KEY is a {ours} key, but the database is in {theirs} mode" in ended.stderr
    assert "secret1" not in ended.stderr
    assert conn.execute("select count(*) from procrastinate.procrastinate_workers").fetchone() == (0,)


@pytest.mark.parametrize("key", ["sk_test_surety", "sk_live_sandbox"])
def test_worker_ends_itself_once_its_database_is_of_the_other_mode(
    conn: Connection, database: str, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    livemode = key == "sk_live_sandbox"
    conn.execute("select surety.set_livemode(%s)", (livemode,))
    with worker_process(database, "http://127.0.0.1:9", STRIPE_API_KEY=key) as worker:
        wait_for_worker(conn)
        # One turn of every job, and the modes are the same.
        eventually(lambda: count(conn, "select count(*) from surety.periodic_jobs") >= len(PERIODIC_JOBS) - 1, 30)
        assert worker.poll() is None
        conn.execute("select surety.set_livemode(%s)", (not livemode,))
        assert worker.wait(60) == 1
    assert f"the database is in {'test' if livemode else 'live'} mode" in capfd.readouterr().err
    assert count(conn, "select count(*) from procrastinate.procrastinate_workers") == 0


async def test_worker_makes_no_call_of_the_other_mode(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        # As if the dump of a live database was restored beneath the worker.
        conn.execute("set session_replication_role = replica")
        for table in ("environment", "merchants", "payments"):
            conn.execute(f"update surety.{table} set livemode = true".encode())
        conn.execute("reset session_replication_role")
        await run_until_idle(worker, "submit")
    assert attempts(conn) == [("submit", 0, ["its worker's key is of the other mode"])]
    intents = sandbox.get("/v1/payment_intents", {"limit": 100})["data"]
    assert payment_id not in {intent["metadata"].get("surety_payment") for intent in intents}


def test_importing_the_app_needs_no_settings() -> None:
    subprocess.run(
        [sys.executable, "-c", "import jobs"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )


def test_procrastinate_settings_are_effective() -> None:
    from jobs import app

    assert app.worker_defaults["concurrency"] > 2 * 6 + len(PERIODIC_JOBS)
    assert app.worker_defaults["delete_jobs"] == "always"
    assert app.worker_defaults["fetch_job_polling_interval"] == 1.0
    assert {"drain", "schedule_due_handlers", "poll_unfinished", "poll_balance_transactions"} <= set(app.tasks)
    # The worker accepts every option.
    app._worker(**app.worker_defaults)


def test_payments_settle_without_webhooks_and_after_a_worker_was_killed(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shorten_delays(conn)
    with worker_process(database, sandbox.url, "killed") as killed:
        wait_for_worker(conn)
        held = shop(3)
        hang = {"operation": "payment_intents.create", "fault": "timeout_after", "times": 3}
        sandbox.control("faults", {"next": [hang]})
        conn.execute("select outbox.schedule_handlers('{submit}')")
        eventually(lambda: sandbox.control("faults")["next"] == [], 10)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    leased_until: datetime = conn.execute("select max(leased_until) from outbox.batches").fetchall()[0][0]
    assert leased_until - datetime.now(UTC) < timedelta(seconds=2)
    others = shop(5)
    with worker_process(database, sandbox.url, "second"), worker_process(database, sandbox.url, "third"):
        eventually(lambda: {state_of(conn, payment_id) for payment_id in held + others} == {"settled"}, 20)
        eventually(lambda: count(conn, "select count(*) from surety.expectations where met_at is not null") == 8)
        # The list of events may show the held payments before their batch is taken over, which then has no work left.
        eventually(lambda: count(conn, "select count(*) from outbox.retries") == 0, 20)
        eventually(lambda: count(conn, "select count(*) from outbox.batches") == 0)
    first = count(conn, "select extract(epoch from min(at) - %s) from audit.entries where kind = 'call'", leased_until)
    assert first < 5
    for payment_id in held + others:
        assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "confirmed", "settled"]
    assert double(sandbox) == []
    assert not violations(conn)
    query = "select count(distinct actor) from audit.entries where actor in ('worker:second', 'worker:third')"
    assert count(conn, query) == 2
    gross, fee = 8 * 10000, 8 * 320
    assert ledger_of(conn) == {
        "available": 8 * 9625,
        "provider_balance": gross - fee,
        "fee_revenue": 8 * 375,
        "provider_cost": fee,
    }


def test_stopped_worker_finishes_sent_calls_and_returns_the_rest_uncounted(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shop(60)
    conn.execute("update outbox.handlers set paused_at = now() where handler = 'confirm'")
    slow = {"operation": "payment_intents.create", "fault": "slow", "times": 60}
    sandbox.control("faults", {"next": [slow]})
    with worker_process(database, sandbox.url) as worker:
        wait_for_worker(conn)
        conn.execute("select outbox.schedule_handlers('{submit}')")
        eventually(lambda: sandbox.control("faults")["next"][0]["times"] <= 60 - 10, 10)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
    sandbox.control("faults", {"next": []})
    assert count(conn, "select count(*) from outbox.batches") == 0
    done = count(conn, "select count(*) from surety.payments where state = 'provider_submitted'")
    given_back = [row[:2] for row in attempts(conn)]
    assert 10 <= done < 60
    assert given_back == [("submit", 0)] * (60 - done)
    assert count(conn, "select count(*) from surety.calls where answered_at is not null") == done
    assert count(conn, "select count(*) from procrastinate.procrastinate_workers") == 0


def test_lost_jobs_or_database_connections_lose_no_events(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shorten_delays(conn)
    with worker_process(database, sandbox.url) as worker:
        wait_for_worker(conn)
        shop(20)
        conn.execute("select outbox.schedule_handlers('{submit}')")
        with psycopg.connect(database, autocommit=True) as deleting:
            deleting.execute("set search_path = procrastinate")
            for table in ("periodic_defers", "events", "jobs", "workers"):
                deleting.execute(f"delete from procrastinate_{table}")
        eventually(lambda: all_ended(conn), 20)
        mine = "application_name = 'surety-worker' and datname = current_database()"
        assert count(conn, f"select count(pg_terminate_backend(pid)) from pg_stat_activity where {mine}") > 2
        shop(5)
        eventually(lambda: all_ended(conn), 20)
        assert worker.poll() is None


def test_idle_worker_is_notified_of_a_payment_without_polling(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    delays = []
    with worker_process(database, sandbox.url), psycopg.connect(database) as other:
        wait_for_worker(conn)
        # No periodic job runs now; Procrastinate polls every five seconds.
        eventually(
            lambda: (
                other.execute("select surety.take_lock('schedule_due_handlers', '1 hour') is not null").fetchone()
                == (True,)
            )
        )
        for _ in range(9):
            [payment_id] = shop()
            conn.execute("select outbox.schedule_handlers('{submit}')")
            asked = "select count(*) from audit.entries where kind = 'answer' and payment_id = %s"
            eventually(lambda: count(conn, asked, payment_id) > 0)  # noqa: B023  # it is over before the next turn
            delays.append(
                conn.execute(
                    "select extract(epoch from c.first_sent_at - p.created_at)::float * 1000"
                    " from surety.calls as c join surety.payments as p on p.id = c.payment_id"
                    " where p.id = %s and c.operation = 'create'",
                    (payment_id,),
                ).fetchall()[0][0]
            )
    assert sorted(delays)[len(delays) // 2] < 1000, delays


def test_failing_event_is_found_by_bisection_and_only_it_is_counted(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shorten_delays(conn)
    payments = shop(9)
    poison = payments[4]
    broken = f"alter table surety.expectations add constraint poison check (payment_id <> '{poison}')"
    conn.execute(broken.encode())
    with worker_process(database, sandbox.url):
        eventually(lambda: {state_of(conn, payment_id) for payment_id in payments} == {"settled"}, 20)
        eventually(lambda: count(conn, "select count(*) from outbox.dead_letters") == 2, 20)
    letters = conn.execute(
        "select handler, payment_id, jsonb_array_length(attempts), attempts -> 0 ->> 'error' from outbox.dead_letters"
        " order by handler"
    ).fetchall()
    assert [row[:3] for row in letters] == [("expect_settlement", poison, 3), ("meet_settlement", poison, 3)]
    assert all("poison" in row[3] for row in letters)
    assert count(conn, "select count(*) from surety.expectations") == 8
    assert count(conn, "select count(*) from outbox.retries") == 0


def received(conn: Connection, events: list[dict[str, Any]]) -> None:
    """The receiver's part: stored, with an event for `apply_webhooks`."""
    stored = [
        {
            "n": n,
            "provider": "stripe",
            "account": event.get("account", ""),
            "livemode": event.get("livemode", False),
            "event_id": event["id"],
            "type": event["type"],
            "headers": {},
            "body": event.get("raw") or json.dumps(event),
            "address": "127.0.0.1",
        }
        for n, event in enumerate(events)
    ]
    conn.execute("select from surety.receive_webhooks(%s)", (json.dumps(stored),))


def events_about(sandbox: SandboxProcess, payment_id: str) -> list[dict[str, Any]]:
    """The events of one payment, newest first, as webhooks bring them."""
    page = sandbox.get("/v1/events", {"limit": 100})["data"]
    return [
        event for event in page if (event["data"]["object"].get("metadata") or {}).get("surety_payment") == payment_id
    ]


async def test_reordered_and_repeated_webhooks_end_in_the_same_state(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert state_of(conn, payment_id) == "requires_action"
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.answer_as_payer(pi, "approve")
        eventually(lambda: sandbox.read(pi)["status"] == "succeeded")
        eventually(lambda: "charge.updated" in [event["type"] for event in events_about(sandbox, payment_id)])
        events = events_about(sandbox, payment_id)
        assert {"payment_intent.requires_action", "payment_intent.succeeded", "charge.succeeded"} <= {
            event["type"] for event in events
        }
        received(conn, [*events, *events[::-1]])
        await run_until_idle(worker)
    assert state_of(conn, payment_id) in {"confirmed", "settled"}
    assert count(conn, "select count(*) from surety.facts where kind = 'captured'") == 1
    assert count(conn, "select count(*) from surety.facts where kind = 'money'") == 1, "charge.updated was fetched"
    assert attempts(conn) == []
    assert not violations(conn)


async def test_decline_known_from_a_webhook_only_is_fetched_and_canceled(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.answer_as_payer(pi, "decline")
        [failed] = [e for e in events_about(sandbox, payment_id) if e["type"] == "payment_intent.payment_failed"]
        received(conn, [failed])
        await run_until_idle(worker)
    assert state_of(conn, payment_id) == "failed"
    assert sandbox.read(pi)["status"] == "canceled"
    [(failure,)] = conn.execute("select failure ->> 'code' from surety.payments").fetchall()
    assert failure == "payment_intent_authentication_failure"


async def test_invalid_event_fails_three_times_without_its_batch(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    bodies = ("no json", "[]", '{"data": {}}', '{"api_version": "2026-10-28.endive", "data": {"object": {"id": 1}}}')
    garbage = [{"id": f"evt_{n}", "type": "payment_intent.succeeded", "raw": body} for n, body in enumerate(bodies)]
    unknown: dict[str, Any] = {
        "id": "evt_unknown",
        "type": "customer.created",
        "api_version": None,
        "data": {"object": {}},
    }
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [created] = [e for e in events_about(sandbox, payment_id) if e["type"] == "payment_intent.created"]
        received(conn, [*garbage, created, unknown])
        for _ in range(3):
            await run_until_idle(worker, "apply_webhooks")
            due(conn)
    letters = conn.execute("select handler, jsonb_array_length(attempts) from outbox.dead_letters").fetchall()
    assert letters == [("apply_webhooks", 3)] * len(bodies)
    assert attempts(conn) == []


async def test_event_without_meaning_here_ends_well_whatever_its_form(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shop()
    thin = {"object": "v2.core.event", "created": "2026-11-30T06:00:00Z"}
    events: list[dict[str, Any]] = [
        thin | {"id": "evt_ping", "type": "v2.core.event_destination.ping", "related_object": None},
        thin | {"id": "evt_account", "type": "v2.core.account.updated", "related_object": {"id": "acct_1"}},
        {"id": "evt_no_version", "type": "customer.created", "data": {"object": {}}},
        {"id": "evt_no_data", "type": "customer.created"},
    ]
    async with in_process_worker(database, sandbox.url) as worker:
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
    assert attempts(conn) == []


async def test_thin_event_brings_its_object(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    by_intent, by_charge = shop(2)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        intents: dict[str, str] = dict(conn.execute("select id, provider_id from surety.payments").fetchall())
        charge = {payment_id: sandbox.confirm(pi)["latest_charge"] for payment_id, pi in intents.items()}
        about = {
            "v1.payment_intent.succeeded": intents[by_intent],
            "v1.charge.succeeded": charge[by_charge],
        }
        events = [
            {"id": f"evt_{n}", "object": "v2.core.event", "type": type, "related_object": {"id": named}}
            for n, (type, named) in enumerate(about.items())
        ]
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
    assert [state_of(conn, payment_id) for payment_id in (by_intent, by_charge)] == ["confirmed"] * 2
    assert attempts(conn) == []


async def test_event_without_version_or_previous_attributes_is_fetched(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        data = {"object": sandbox.confirm(pi), "previous_attributes": None}
        received(conn, [{"id": "evt_1", "type": "payment_intent.succeeded", "data": data}])
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) == "confirmed"


async def test_event_of_the_other_mode_is_ignored_with_a_reason(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        types = ("payment_intent.succeeded", "payment_intent.payment_failed", "charge.dispute.created")
        data = {"object": sandbox.read(pi)}
        received(conn, [{"id": f"evt_{type}", "type": type, "livemode": True, "data": data} for type in types])
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) == "provider_submitted"
    assert attempts(conn) == []
    query = "select snapshot ->> 'type', reason from audit.entries where kind = 'answer' and outcome = 'ignored'"
    reason = "an event of live mode, and our key is of test mode"
    assert sorted(conn.execute(query).fetchall()) == sorted((type, reason) for type in types)


@pytest.mark.parametrize(("type", "handler"), [("payment.initiated", "submit"), ("webhook.received", "apply_webhooks")])
async def test_event_about_an_unknown_object_is_dead_lettered(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay, type: str, handler: str
) -> None:
    shop()
    conn.execute("select outbox.emit_event('payment', 'nothing', %s, '{}', null, 1)", (type,))
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, handler)
    assert [row[:2] for row in attempts(conn)] == [(handler, 1)]
    assert count(conn, "select count(*) from outbox.batches") == 0


async def test_webhook_that_cannot_be_recorded_does_not_fail_its_batch(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    payments = shop(5)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        broken = (
            "alter table surety.facts add constraint poison"
            f" check (payment_id <> '{payments[2]}' or kind <> 'captured')"
        )
        conn.execute(broken.encode())
        events = []
        for payment_id in payments:
            [(pi,)] = conn.execute("select provider_id from surety.payments where id = %s", (payment_id,)).fetchall()
            sandbox.confirm(pi)
            events += [e for e in events_about(sandbox, payment_id) if e["type"] == "payment_intent.succeeded"]
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
    states = [state_of(conn, payment_id) for payment_id in payments]
    assert states == ["confirmed", "confirmed", "provider_submitted", "confirmed", "confirmed"]
    [(handler, failures, errors)] = attempts(conn)
    assert (handler, failures) == ("apply_webhooks", 1)
    assert "poison" in errors[0]


async def test_snapshot_of_another_api_version_is_fetched(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        lie = sandbox.read(pi) | {"status": "succeeded", "latest_charge": "ch_lie", "amount_received": 10000}
        old = {
            "id": "evt_old",
            "type": "payment_intent.succeeded",
            "api_version": "2019-02-19",
            "data": {"object": lie},
        }
        received(conn, [old])
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) == "provider_submitted"
    query = "select kind, outcome from audit.entries where snapshot ->> 'operation' = 'fetch' order by id"
    assert conn.execute(query).fetchall() == [("call", "asked"), ("answer", "answered")]


async def test_polling_finds_changes_whose_webhooks_were_lost(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.confirm(pi)
        await poll_unfinished(worker)
        assert state_of(conn, payment_id) == "provider_submitted", "not due yet"
        conn.execute("update surety.payments set poll_at = now()")
        await poll_unfinished(worker)
        assert state_of(conn, payment_id) in {"confirmed", "settled"}
    result = conn.execute(
        "select kind, outcome from audit.entries where snapshot ->> 'operation' = 'fetch' order by id"
    )
    assert result.fetchall() == [("call", "asked"), ("answer", "answered")]


async def test_failed_poll_is_repeated_later(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        conn.execute("update surety.payments set poll_at = now()")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.order("payment_intents.retrieve", "error_500_before", match=pi)
        await poll_unfinished(worker)
    [(poll_count, wait)] = conn.execute(
        "select poll_count, extract(epoch from poll_at - now())::float from surety.payments"
    ).fetchall()
    assert poll_count == 1
    assert 1 < wait <= 2


async def test_expired_action_is_canceled(conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    query = "select surety.emit_expired_actions(%s)"
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert conn.execute(query, (timedelta(minutes=1),)).fetchone() == ([],)
        assert conn.execute(query, (timedelta(),)).fetchone() == (["payment.action_overdue"],)
        assert conn.execute(query, (timedelta(),)).fetchone() == ([],), "once"
        await run_until_idle(worker)
    assert path_of(conn, payment_id)[-2:] == ["requires_action", "canceled"]
    [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
    assert sandbox.read(pi)["status"] == "canceled"


async def test_payment_that_succeeds_during_its_cancellation_is_confirmed(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.answer_as_payer(pi, "approve")
        conn.execute("select surety.emit_expired_actions('0 s')")
        await run_until_idle(worker)
    assert state_of(conn, payment_id) in {"confirmed", "settled"}


async def test_unmatched_money_is_posted_to_suspense_and_a_discrepancy(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    conn.execute("update surety.environment set created_at = now(), kind = 'test'")
    made = sandbox.control("foreign-charge", {"amount": 7777, "currency": "usd"})
    eventually(lambda: sandbox.get(f"/v1/charges/{made['charge']}")["balance_transaction"])
    txn = sandbox.get(f"/v1/charges/{made['charge']}")["balance_transaction"]
    async with in_process_worker(database, sandbox.url) as worker:
        await poll_balance_transactions(worker)
        unmatched = "select count(*) from surety.unmatched_facts where object_id = %s and ended_at is null"
        assert count(conn, unmatched, txn) >= 1
        conn.execute("insert into surety.clock (ahead) values ('16 minutes')")
        conn.execute("select surety.retry_unmatched_facts()")
    found = "select count(*) from surety.discrepancies where kind = 'foreign' and subject = %s"
    assert count(conn, found, "stripe/") == 1
    assert count(conn, "select count(*) from ledger.postings where cause = %s and rule = 'foreign'", txn) == 1


async def test_payouts_are_polled(conn: Connection, database: str, tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--payout-seconds=0.2", "--payout-arrival-seconds=0.1") as sandbox:
        sandbox.pay()
        eventually(lambda: sandbox.get("/v1/payouts")["data"], 10)
        async with in_process_worker(database, sandbox.url) as worker:
            await poll_payouts(worker)
            await poll_balance_transactions(worker)
    assert (
        count(
            conn, "select count(*) from surety.unmatched_facts where kind = 'payout' and ended_as = 'without_payment'"
        )
        > 0
    )
    assert count(conn, "select count(*) from ledger.postings where rule = 'payout'") > 0
    assert count(conn, "select count(*) from surety.poll_cursors") == 2


async def test_a_euro_charge_that_settles_in_dollars_is_exchanged(
    conn: Connection, database: str, tmp_path: Path, shop: Pay
) -> None:
    with running_sandbox(tmp_path, "--settlement-currency=usd", "--available-seconds=0") as sandbox:
        [payment_id] = shop(currency="eur")
        async with in_process_worker(database, sandbox.url) as worker:
            await run_until_idle(worker)
            [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
            eventually(lambda: sandbox.get("/v1/charges", {"payment_intent": pi})["data"][0]["balance_transaction"])
            await poll_balance_transactions(worker)
        [line] = sandbox.get("/v1/balance_transactions")["data"]
    assert state_of(conn, payment_id) == "settled"
    ledger = ledger_of(conn, payment_id)
    assert ledger["provider_balance"] == line["net"]
    assert ledger["fee_revenue eur"] == 375
    assert "provider_receivable eur" not in ledger
    assert not violations(conn)


async def test_euros_that_settled_in_dollars_are_refunded_and_disputed(
    conn: Connection, database: str, tmp_path: Path
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    refunded, disputed = pay(conn, key, 2, currency="eur")
    with running_sandbox(tmp_path, "--settlement-currency=usd", "--available-seconds=0") as sandbox:
        async with in_process_worker(database, sandbox.url) as worker:
            await run_until_idle(worker)
            eventually(lambda: len(sandbox.get("/v1/balance_transactions")["data"]) == 2)
            await poll_balance_transactions(worker)
            assert command(conn, "create_refund", key, payment_id=refunded)["status"] == 201
            await run_until_idle(worker)
            row = conn.execute("select provider_id from surety.payments where id = %s", (disputed,)).fetchone()
            assert row is not None
            dispute = sandbox.control("disputes", {"payment_intent": row[0]})["id"]
            sandbox.control(f"disputes/{dispute}", {"outcome": "partly_lost", "returned": 4000})
            await fetch_dispute(worker, ProviderObject("", False, "dispute", dispute), FactOrigin("", False, "poll"))
            await poll_balance_transactions(worker)
    charged = {"fee_revenue eur": 375, "currency_exchange eur": -375, "currency_exchange": 407}
    assert state_of(conn, refunded) == "refunded"
    assert ledger_of(conn, refunded) == charged | {
        "available": 10443 - 10850,
        "provider_balance": 10505 - 10850,
        "provider_cost": 345,
    }
    row = conn.execute("select withdrawn_minor, currency from surety.disputes").fetchone()
    assert row == (6000, "eur")
    assert ledger_of(conn, disputed) == charged | {
        "available": 10443 - 10850 - 1500 + 4340,
        "provider_balance": 10505 - 10850 - 1500 + 4340,
        "fee_revenue": 1500,
        "provider_cost": 345 + 1500,
    }
    assert not violations(conn)


async def test_more_disputes_than_connections_are_fetched_beside_each_other(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    count = WORKER_CONNECTIONS_MAX + 1
    shop(count)
    origin = FactOrigin("", False, "poll")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        intents = [row[0] for row in conn.execute("select provider_id from surety.payments")]
        opened = [sandbox.control("disputes", {"payment_intent": intent})["id"] for intent in intents]
        async with asyncio.timeout(30):
            await asyncio.gather(
                *(fetch_dispute(worker, ProviderObject("", False, "dispute", id), origin) for id in opened)
            )
    assert conn.execute("select count(*) from surety.disputes").fetchone() == (count,)


async def test_exclusive_job_runs_once_and_a_lost_lock_is_released(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    locks = "pg_locks where locktype = 'advisory' and database = (select oid from pg_database where datname = %s)"
    name = conn.info.dbname
    async with in_process_worker(database, sandbox.url) as here, in_process_worker(database, sandbox.url) as there:
        one, other = here.database, there.database
        async with one.try_lock("a") as first, one.try_lock("a") as again, other.try_lock("a") as second:
            assert (first, again, second) == (True, False, False)
            async with one.try_lock("b") as beside:
                assert beside
        async with other.try_lock("a") as later:
            assert later
        async with one.try_lock("a"), one.try_lock("b"):
            conn.execute(f"select pg_terminate_backend(pid) from {locks}".encode(), (name,))
            with pytest.raises(psycopg.OperationalError):
                async with one.try_lock("c"):
                    raise AssertionError("whether it was committed is unknown")
            async with other.try_lock("a") as taken_over, one.try_lock("b") as anew:
                assert taken_over
                assert anew
        async with one.try_lock("a") as last, one.try_lock("b") as very_last:
            assert last
            assert very_last
    assert conn.execute(f"select count(*) from {locks}".encode(), (name,)).fetchone() == (0,)


def test_pending_money_is_polled_in_time_ranges() -> None:
    day = datetime(2026, 11, 22, tzinfo=UTC)
    minutes = [3, 0, 59, 200, 201]
    found = merge_time_ranges([day + timedelta(minutes=minute) for minute in minutes])
    assert [((a - day).seconds // 60, (b - day).seconds // 60) for a, b in found] == [(0, 59), (200, 201)]
    assert merge_time_ranges([]) == []


def test_intervals_are_converted_to_cron_expressions() -> None:
    assert (cron(1), cron(5), cron(60), cron(600)) == ("* * * * * */1", "* * * * * */5", "*/1 * * * *", "*/10 * * * *")
