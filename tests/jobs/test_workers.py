"""Workers as operators run them: Procrastinate's processes, killed, stopped and restarted; what happens by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from db.embedded.server import EmbeddedServer
from jobs.periodic import PERIODIC_JOBS
from tests.jobs.conftest import Pay
from tests.support.payments import Connection, ledger_of, path_of, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually
from tests.support.workers import (
    ROOT,
    attempts,
    environment,
    in_process_worker,
    run_until_idle,
    shorten_delays,
    wait_for_worker,
    worker_process,
)

ENDED = {"settled", "failed", "canceled"}


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
        eventually(lambda: count(conn, "select count(*) from surety.periodic_jobs") >= len(PERIODIC_JOBS), 30)
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

    assert app.worker_defaults["concurrency"] > 2 * 6
    assert app.worker_defaults["delete_jobs"] == "always"
    assert app.worker_defaults["fetch_job_polling_interval"] == 1.0
    assert {"drain", "delete_orphaned_jobs"} <= set(app.tasks)
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
    # One of the two may do all of it: a worker that drains a handler claims its later events as well.
    query = "select count(distinct actor) from audit.entries where actor in ('worker:second', 'worker:third')"
    assert count(conn, query) >= 1
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


def take_leadership(conn: Connection, other: psycopg.Connection[Any]) -> bool:
    """End the leader's session; whether the other connection leads in its place."""
    conn.execute("select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and objsubid = 1")
    return other.execute("select surety.take_lock('periodic_jobs', '1 hour') is not null").fetchone() == (True,)


def test_idle_worker_is_notified_of_a_payment_without_polling(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    delays = []
    with worker_process(database, sandbox.url), psycopg.connect(database) as other:
        wait_for_worker(conn)
        # No worker leads now; Procrastinate polls every second.
        eventually(lambda: take_leadership(conn, other))
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


def test_event_that_kills_its_worker_three_times_is_dead_lettered_alone(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shorten_delays(conn)
    payments = shop(20)
    poison = payments[3]
    for _ in range(3):
        # If it took effect, the provider's list of events shows it, and no call is left to make.
        hang = {"operation": "payment_intents.create", "fault": "timeout_before", "match": poison}
        sandbox.control("faults", {"next": [hang]})
        with worker_process(database, sandbox.url, SURETY_PROVIDER_TIMEOUT="60") as worker:
            eventually(lambda: sandbox.control("faults")["next"] == [], 20)
            worker.send_signal(signal.SIGKILL)
    with worker_process(database, sandbox.url):
        eventually(lambda: count(conn, "select count(*) from outbox.dead_letters") == 1, 20)
        eventually(lambda: count(conn, "select count(*) from surety.payments where state = 'settled'") == 19, 30)
        eventually(lambda: count(conn, "select count(*) from outbox.retries") == 0, 20)
    [(payment_id, reason)] = conn.execute("select payment_id, reason from outbox.dead_letters").fetchall()
    assert (payment_id, reason) == (poison, "its worker died 3 times")
