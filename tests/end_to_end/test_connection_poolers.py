"""The real PgBouncer before the database: used where it keeps sessions, refused with the setting's name where not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from db.connect import TIMEOUTS, bounded_connection, connect, conninfo, harden
from db.errors import DatabaseNotReady
from db.poolers import open_session, shares_sessions
from db.settings import load_settings
from tests.cli.test_status import read_status, surety
from tests.support.http_client import SECRETS, Merchant, running_server
from tests.support.payments import Connection
from tests.support.pgbouncer import needs_pgbouncer, running_pgbouncer
from tests.support.sandbox_process import eventually, running_sandbox
from tests.support.workers import environment, shorten_delays, wait_for_worker, worker_process

pytestmark = needs_pgbouncer

API_LOGIN = f"surety_test_{os.urandom(4).hex()}"


@pytest.fixture
def api_login(conn: Connection) -> Iterator[str]:
    """A login of the API's own, with the settings of its sessions."""
    conn.execute(sql.SQL("create role {} login in role surety_api").format(sql.Identifier(API_LOGIN)))
    statement, lock, idle = TIMEOUTS["api"]
    set_login(conn, statement_timeout=statement, lock_timeout=lock, idle_in_transaction_session_timeout=idle)
    set_login(conn, timezone="UTC")
    yield API_LOGIN
    conn.execute(sql.SQL("drop role {}").format(sql.Identifier(API_LOGIN)))


def set_login(conn: Connection, **settings: str) -> None:
    for name, value in settings.items():
        statement = sql.SQL("alter role {} set {} = {}")
        conn.execute(statement.format(sql.Identifier(API_LOGIN), sql.Identifier(name), sql.Literal(value)))


def start(database: str, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The result of a process that is to refuse to start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_"))}
    given = environment(database, "http://127.0.0.1:1") | {"STRIPE_WEBHOOK_SECRET": SECRETS[0]} | settings
    return subprocess.run(
        [sys.executable, "-m", *command], env=inherited | given, capture_output=True, text=True, timeout=60, check=False
    )


ALL_PROCESSES = {
    "api": ("app.cli", "api", "--port", "0"),
    "webhooks": ("app.cli", "webhooks", "--port", "0"),
    "worker": ("procrastinate", "--app", "jobs.app", "worker"),
    "deploy": ("app.cli", "deploy"),
    "status": ("app.cli", "status"),
}


def test_everything_works_through_a_pooler_in_session_mode(database: str, conn: Connection, tmp_path: Path) -> None:
    shorten_delays(conn)
    conn.execute("update surety.environment set kind = 'test'")
    with (
        running_pgbouncer(database, "session") as pooled,
        running_sandbox(tmp_path) as sandbox,
        running_server("api", pooled) as api,
        worker_process(pooled, sandbox.url, "one"),
        worker_process(pooled, sandbox.url, "two"),
    ):
        wait_for_worker(conn, 2)
        merchant = Merchant(conn, api.url)
        with merchant.client, ThreadPoolExecutor(8) as pool:
            paid = [merchant.pay()["id"] for _ in range(3)] + [
                payment["id"] for payment in pool.map(lambda _: merchant.pay(), range(20))
            ]
        confirmed = "select count(*) from surety.payments where state in ('confirmed', 'settled') and id = any(%s)"
        eventually(lambda: conn.execute(confirmed, (paid,)).fetchone() == (len(paid),), 20)
        # The leader's and the periodic jobs' locks are those of sessions; each worker listens for jobs.
        locked = "select count(*) > 0 from pg_locks where locktype = 'advisory' and granted"
        assert conn.execute(locked).fetchone() == (True,)
        assert surety(pooled, "deploy").stdout.startswith("unchanged")
        assert read_status(pooled)[1]["workers"]["alive"] == 2


def test_session_has_its_settings_through_a_pooler_that_drops_them(database: str) -> None:
    with running_pgbouncer(database, "session") as pooled:
        settings = load_settings({"DATABASE_URL": pooled})
        query = "select current_user, current_setting('statement_timeout')"
        with psycopg.connect(conninfo("api", settings), autocommit=True) as conn:
            [(user, _)] = conn.execute(query).fetchall()
            assert user != "surety_api", "PgBouncer dropped nothing"
        with connect("api", settings) as conn:
            assert conn.execute(query).fetchone() == ("surety_api", "10s")
        with open_session(conninfo("worker", settings, search_path="procrastinate")) as conn:
            assert conn.execute(query).fetchone() == ("surety_worker", "30s")
            assert conn.execute("show search_path").fetchone() == ("procrastinate",)
        # The next client of the session gets none of them.
        with psycopg.connect(pooled, autocommit=True) as conn:
            assert conn.execute("select current_setting('role'), current_setting('statement_timeout')").fetchone() == (
                "none",
                "0",
            )


async def test_asyncio_connection_has_its_settings_through_a_pooler(database: str) -> None:
    with running_pgbouncer(database, "session") as pooled:
        address = conninfo("webhook", load_settings({"DATABASE_URL": pooled}))
        for autocommit in (True, False):
            async with await bounded_connection("webhook").connect(address, autocommit=autocommit) as conn:
                assert conn.autocommit == autocommit
                row = await (await conn.execute("select current_user, current_setting('lock_timeout')")).fetchone()
                assert row == ("surety_webhook", "5s")


@pytest.mark.parametrize("process", ALL_PROCESSES)
def test_pooler_in_transaction_mode_is_refused_with_its_setting(process: str, database: str) -> None:
    with running_pgbouncer(database, "transaction") as pooled:
        ended = start(pooled, *ALL_PROCESSES[process])
        assert ended.returncode != 0
        assert "pool_mode = session" in ended.stdout + ended.stderr
        with psycopg.connect(pooled, autocommit=True) as conn:
            left = conn.execute("select current_setting('role'), current_setting('statement_timeout')").fetchone()
            assert left == ("none", "0"), "settings of a refused process reach other clients"


@pytest.mark.parametrize("process", ALL_PROCESSES)
def test_pooler_that_refuses_options_is_named_with_its_setting(process: str, database: str) -> None:
    with running_pgbouncer(database, "session", ignored="extra_float_digits") as pooled:
        ended = start(pooled, *ALL_PROCESSES[process])
        assert ended.returncode != 0
        assert "ignore_startup_parameters = options" in ended.stdout + ended.stderr


def test_api_works_through_a_pooler_in_transaction_mode_by_a_login_with_settings(
    database: str, conn: Connection, api_login: str
) -> None:
    with running_pgbouncer(database, "transaction", api_login, ignored="", default_pool_size=3) as pooled:
        own = make_conninfo(pooled, user=api_login)
        settings = {"SURETY_POOL_MODE": "transaction", "SURETY_API_DATABASE_URL": own}
        with running_server("api", database, **settings) as api:
            merchant = Merchant(conn, api.url)
            with merchant.client, ThreadPoolExecutor(8) as pool:
                paid = list(pool.map(lambda _: merchant.pay()["id"], range(60)))
                listed = merchant.get("/v1/payments", limit=100)["data"]
            assert {document["id"] for document in listed} == set(paid)
            assert len(paid) == merchant.count() == 60


def test_login_without_settings_is_refused_in_transaction_mode(database: str, conn: Connection, api_login: str) -> None:
    set_login(conn, statement_timeout="0")
    with running_pgbouncer(database, "transaction", api_login, ignored="") as pooled:
        own = make_conninfo(pooled, user=api_login)
        command = ALL_PROCESSES["api"]
        ended = start(database, *command, SURETY_POOL_MODE="transaction", SURETY_API_DATABASE_URL=own)
        assert f"alter role {api_login} set statement_timeout = '10s'" in ended.stderr
        ended = start(pooled, *command, SURETY_POOL_MODE="transaction")
        assert "SURETY_API_DATABASE_URL" in ended.stderr
        assert ended.returncode != 0


@pytest.mark.parametrize("settings", [{}, {"default_pool_size": 1}, {"server_round_robin": 1}])
def test_pooler_in_session_mode_raises_no_false_alarm(database: str, settings: dict[str, Any]) -> None:
    with running_pgbouncer(database, "session", **settings) as pooled:
        assert not shares_sessions(pooled)


@pytest.mark.parametrize("settings", [{}, {"default_pool_size": 1}, {"server_round_robin": 1}])
@pytest.mark.parametrize("clients", [0, 1, 4])
def test_transaction_mode_is_noticed_whatever_else_the_pooler_does(
    database: str, settings: dict[str, Any], clients: int
) -> None:
    with running_pgbouncer(database, "transaction", **settings) as pooled, ExitStack() as stack:
        others = [stack.enter_context(psycopg.connect(pooled)) for _ in range(clients)]
        if settings.get("default_pool_size") != 1:
            for other in others:
                other.execute("select 1")
            for other in others:
                other.commit()
        assert shares_sessions(pooled)


def test_direct_connection_is_no_pooler(database: str) -> None:
    address = harden(database, "deploy")
    assert not shares_sessions(address)
    with open_session(address) as conn:
        row = conn.execute("select pg_backend_pid()").fetchone()
        assert row == (conn.info.backend_pid,)
    with running_pgbouncer(database, "transaction") as pooled, pytest.raises(DatabaseNotReady, match="pool_mode"):
        open_session(harden(pooled, "deploy"))
