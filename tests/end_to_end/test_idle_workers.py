"""Idle workers: what they cost, and that what comes is found whichever of them dies and whatever goes unnoticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.jobs.conftest import Pay
from tests.support.payments import Connection, add_merchant, pay
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import shorten_delays, wait_for_worker, worker_process

WINDOWS = 4
# Measured: 2.4. A job of Procrastinate's each second took 9.
TRANSACTIONS_PER_WORKER_AND_SECOND_MAX = 4.0
LISTENERS = (
    "select pid from pg_stat_activity where datname = current_database() and application_name = 'surety-worker'"
    " and query ~* '^listen '"
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("idle"), "--payout-seconds=0") as sandbox:
        yield sandbox


@pytest.fixture
def shop(conn: Connection) -> Pay:
    """Makes payments of 100.00 USD."""
    shorten_delays(conn)
    _, key_hash = add_merchant(conn)
    return lambda count=1, **fields: pay(conn, key_hash, count, **fields)


def count(conn: Connection, query: str, *values: Any) -> int:
    row = conn.execute(query.encode(), values or None).fetchone()
    assert row is not None
    return int(row[0])


def leader(conn: Connection) -> int | None:
    """The process id of the session that leads."""
    row = conn.execute(
        "select max(pid) from pg_locks where locktype = 'advisory' and granted"
        " and database = (select oid from pg_database where datname = current_database())"
    ).fetchone()
    assert row is not None
    return None if row[0] is None else int(row[0])


def polls_of(conn: Connection, worker: str) -> int:
    """The lists that a worker has asked the provider for."""
    query = (
        "select count(*) from audit.entries where kind = 'call' and actor = %s and snapshot ->> 'operation' ~ '^list'"
    )
    return count(conn, query, f"worker:{worker}")


def transactions_per_second(conn: Connection) -> float:
    """The transactions of the database in a few seconds, by the server's clock."""
    query = (
        "select xact_commit + xact_rollback, extract(epoch from clock_timestamp())::float8 from pg_stat_database"
        " where datname = current_database()"
    )
    [(before, began)] = conn.execute(query).fetchall()
    conn.execute("select pg_sleep(4)")
    [(after, ended)] = conn.execute(query).fetchall()
    return float((after - before) / (ended - began))


def test_idle_workers_make_few_transactions(conn: Connection, database: str, sandbox: SandboxProcess) -> None:
    workers = 2
    with (
        worker_process(database, sandbox.url, "a", SURETY_POLL_SECONDS="60"),
        worker_process(database, sandbox.url, "b", SURETY_POLL_SECONDS="60"),
    ):
        wait_for_worker(conn, workers)
        eventually(lambda: polls_of(conn, "a") + polls_of(conn, "b") >= 3, 10)
        # The jobs of a minute may fall into one window or two.
        rates = [transactions_per_second(conn) for _ in range(WINDOWS)]
    assert min(rates) < workers * TRANSACTIONS_PER_WORKER_AND_SECOND_MAX, rates


def test_killed_leader_is_replaced(conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay) -> None:
    with worker_process(database, sandbox.url, "first") as first:
        eventually(lambda: polls_of(conn, "first") > 0, 15)
        with worker_process(database, sandbox.url, "second"):
            wait_for_worker(conn, 2)
            before = polls_of(conn, "first")
            eventually(lambda: polls_of(conn, "first") > before + 6)
            assert polls_of(conn, "second") == 0, "one worker at a time"
            first.kill()
            shop()
            eventually(lambda: count(conn, "select count(*) from surety.payments where state = 'settled'") == 1, 20)
            assert polls_of(conn, "second") > 0


def test_event_without_a_job_and_job_without_a_notification_are_found(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    submitted = "select count(*) from surety.calls where operation = 'create' and answered_at is not null"
    with worker_process(database, sandbox.url, SURETY_POLL_SECONDS="60"):
        wait_for_worker(conn)
        eventually(lambda: leader(conn) is not None)
        shop()
        eventually(lambda: count(conn, submitted) == 1)
        with conn.transaction():
            # Triggers notify the workers.
            conn.execute("set local session_replication_role = replica")
            conn.execute("select outbox.schedule_handlers('{submit}')")
        shop()
        eventually(lambda: count(conn, submitted) == 2)


def test_worker_whose_listener_can_not_connect_again_is_restarted(
    conn: Connection, database: str, server: str, sandbox: SandboxProcess
) -> None:
    # A worker that is started again registers for moments only, until its listener fails again.
    registered = "select last_value from procrastinate.procrastinate_workers_id_seq"
    name = sql.Identifier(conn.info.dbname)
    with (
        worker_process(database, sandbox.url, SURETY_POLL_SECONDS="60") as worker,
        psycopg.connect(server, autocommit=True) as elsewhere,
    ):
        eventually(lambda: conn.execute(LISTENERS).fetchall() != [], 15)
        before = conn.execute(registered).fetchone()
        elsewhere.execute(sql.SQL("alter database {} allow_connections false").format(name))
        try:
            conn.execute(f"select pg_terminate_backend(pid) from ({LISTENERS}) as listeners".encode())
            eventually(lambda: conn.execute(registered).fetchone() != before, 15)
        finally:
            elsewhere.execute(sql.SQL("alter database {} allow_connections true").format(name))
        eventually(lambda: conn.execute(LISTENERS).fetchall() != [], 15)
        assert worker.poll() is None
