"""PostgreSQL stopped, restarted, away for long, or silent on a line that seems open: nothing is lost, all come back."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psycopg
import pytest

from db import connect
from db.connect import bounded_connection
from db.deploy.deploy import deploy
from db.embedded.server import EmbeddedServer
from jobs.worker import Worker
from tests.crash.kills import children_of
from tests.support.http_client import Merchant, connect_as_owner, payment, problem, running_server, unique_name
from tests.support.payments import Connection, violations
from tests.support.postgres_proxy import proxied
from tests.support.sandbox_process import eventually, running_sandbox
from tests.support.workers import in_process_worker, shorten_delays, wait_for_worker, worker_process


@pytest.fixture
def killable_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of this test's own, to be stopped, with everything deployed."""
    with EmbeddedServer(durable=True) as server:
        deploy(server.url)
        with connect_as_owner(server.url) as conn:
            shorten_delays(conn)
            conn.execute("update surety.environment set kind = 'test'")
        yield server


def settled(conn: Connection) -> set[str]:
    return {row[0] for row in conn.execute("select id from surety.payments where state = 'settled'")}


@contextmanager
def create_merchant(conn: Connection, url: str) -> Generator[Merchant]:
    """A merchant who hangs up in the end."""
    merchant = Merchant(conn, url)
    with merchant.client:
        yield merchant


class BackgroundPayers:
    """Requests without a pause, each repeated under its key until it is answered for good."""

    def __init__(self, merchant: Merchant, count: int = 2) -> None:
        self.accepted: dict[str, str] = {}
        self.refused = 0
        self.unavailable: list[httpx.Response] = []
        self._merchant = merchant
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._shopping = [self._pool.submit(self._pay) for _ in range(count)]

    def _pay(self) -> None:
        while not self._done.is_set():
            key = unique_name("order")
            while True:
                answer = self._merchant.post(payment(reference=key), key=key)
                if answer.status_code != 503:
                    break
                self.unavailable.append(answer)
                time.sleep(0.05)
            assert answer.status_code == 201, answer.text
            self.accepted[key] = answer.json()["id"]

    def stop(self) -> None:
        """Let each finish its request; raises what went wrong for one of them."""
        self._done.set()
        for shopping in self._shopping:
            shopping.result(60)
        self._pool.shutdown()


def test_ten_minutes_without_postgresql_lose_nothing_and_need_no_operator(
    killable_server: EmbeddedServer, tmp_path: Path
) -> None:
    with (
        running_sandbox(tmp_path) as sandbox,
        running_server("api", killable_server.url) as api,
        running_server("webhooks", killable_server.url) as receiver,
        worker_process(killable_server.url, sandbox.url, "one") as one,
        worker_process(killable_server.url, sandbox.url, "two") as two,
        ExitStack() as stack,
    ):
        with connect_as_owner(killable_server.url) as conn:
            wait_for_worker(conn, 2)
            assert httpx.get(f"{receiver.url}/health", timeout=30).status_code == 200
            shoppers = BackgroundPayers(stack.enter_context(create_merchant(conn, api.url)))
            eventually(lambda: len(shoppers.accepted) > 10, 60)
        killable_server.halt("immediate")
        eventually(lambda: len(shoppers.unavailable) >= 2, 30)
        refused = problem(shoppers.unavailable[-1], 503, "unavailable")
        assert "same Idempotency-Key" in refused["detail"]
        assert all(answer.headers["retry-after"] for answer in shoppers.unavailable)
        assert httpx.post(f"{receiver.url}/stripe", content=b"{}", timeout=30).status_code == 400, "it is still there"
        killable_server.resume()
        with connect_as_owner(killable_server.url) as conn:
            conn.execute("insert into surety.clock (ahead) values ('10 minutes')")
            sandbox.control("clock", {"advance": 600})
            before = len(shoppers.accepted)
            eventually(lambda: len(shoppers.accepted) > before + 10, 60)
            shoppers.stop()
            accepted = set(shoppers.accepted.values())
            assert len(accepted) == len(shoppers.accepted)
            eventually(lambda: settled(conn) >= accepted, 180)
            assert conn.execute("select count(*) from surety.payments").fetchall() == [(len(accepted),)]
            assert conn.execute("select count(*) from outbox.dead_letters").fetchall() == [(0,)]
            assert not violations(conn)
        assert [one.poll(), two.poll(), api.process.poll(), receiver.process.poll()] == [None] * 4
        assert sandbox.control("charges/summary?metadata_key=surety_payment")["double"] == []


def test_api_process_started_during_an_outage_serves_after_it(
    killable_server: EmbeddedServer,
) -> None:
    with running_server("api", killable_server.url, "--processes", "2") as api:
        eventually(lambda: len(children_of(api.process.pid)) == 2, 30)
        killable_server.halt("immediate")
        killed, other = children_of(api.process.pid)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: {*children_of(api.process.pid)} - {killed, other}, 30)
        os.kill(other, signal.SIGSTOP)
        try:
            assert httpx.get(f"{api.url}/health", timeout=30).status_code == 503, "the new one answers"
            killable_server.resume()
            with connect_as_owner(killable_server.url) as conn, create_merchant(conn, api.url) as merchant:
                assert merchant.pay()["object"] == "payment"
        finally:
            # Who stands still for long is replaced, too.
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGCONT)
        assert api.process.poll() is None


def test_provider_response_received_during_an_outage_is_recorded_afterwards(
    killable_server: EmbeddedServer, tmp_path: Path
) -> None:
    with (
        running_sandbox(tmp_path, "--slow-seconds=2") as sandbox,
        worker_process(killable_server.url, sandbox.url) as worker,
    ):
        with connect_as_owner(killable_server.url) as conn:
            conn.execute("update outbox.handlers set lease = '60 seconds'")
            wait_for_worker(conn)
            sandbox.order("payment_intents.create", "slow", times=1)
            with running_server("api", killable_server.url) as api, create_merchant(conn, api.url) as merchant:
                paid = merchant.pay()["id"]
            eventually(lambda: sandbox.control("faults")["next"] == [])
        killable_server.restart("immediate")
        with connect_as_owner(killable_server.url) as conn:
            eventually(lambda: settled(conn) == {paid}, 30)
            sent = "select sends from surety.calls where operation = 'create'"
            assert conn.execute(sent).fetchall() == [(1,)], "the call was sent once"
        assert worker.poll() is None


def test_worker_started_during_an_outage_waits_for_postgresql(killable_server: EmbeddedServer, tmp_path: Path) -> None:
    killable_server.halt()
    with running_sandbox(tmp_path) as sandbox, worker_process(killable_server.url, sandbox.url) as worker:
        with pytest.raises(psycopg.OperationalError):
            connect_as_owner(killable_server.url)
        killable_server.resume()
        with connect_as_owner(killable_server.url) as conn:
            wait_for_worker(conn)
        assert worker.poll() is None


async def test_dead_connection_is_closed_after_the_statement_timeout(database: str) -> None:
    with proxied(database) as proxy:
        conn = await bounded_connection("api").connect(proxy.url, autocommit=True)
        conn.answer_seconds_max = 0.3
        assert await (await conn.execute("select 1")).fetchone() == (1,)
        proxy.is_dead = True
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("select 1")
        assert conn.closed


async def test_locks_of_a_dead_connection_are_released(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.database.LOCK_IDLE_SECONDS", 3.0)
    monkeypatch.setitem(connect.ANSWER_SECONDS_MAX, "worker", 0.5)
    with proxied(database) as proxy:
        async with (
            in_process_worker(proxy.url, "http://unused") as here,
            in_process_worker(database, "http://unused") as there,
        ):
            async with here.database.try_lock("schedule_due_handlers") as is_locked:
                assert is_locked
                await asyncio.sleep(4)
                assert not await can_lock(there), "who is heard keeps it, however long it takes"
                proxy.is_dead = True
                await asyncio.sleep(4)
                assert await can_lock(there)
            proxy.is_dead = False
            assert await can_lock(here)


async def test_connection_without_advisory_locks_may_be_idle(
    conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines() -> set[int]:
        workers = "application_name = 'surety-worker' and datname = current_database()"
        return {row[0] for row in conn.execute(f"select pid from pg_stat_activity where {workers}")}

    monkeypatch.setattr("jobs.database.LOCK_IDLE_SECONDS", 0.3)
    async with in_process_worker(database, "http://unused") as here:
        async with here.database.try_lock("one"), here.database.try_lock("two"):
            pass
        before = lines()
        await asyncio.sleep(1)
        assert before <= lines()


async def can_lock(worker: Worker) -> bool:
    async with worker.database.try_lock("schedule_due_handlers") as is_locked:
        return is_locked


def test_api_with_dead_connections_answers_503_and_recovers(conn: Connection, database: str) -> None:
    with (
        proxied(database) as proxy,
        running_server("api", proxy.url) as api,
        create_merchant(conn, api.url) as merchant,
    ):
        first = merchant.pay()
        proxy.is_dead = True
        key = unique_name("order")
        problem(merchant.post(payment(reference=key), key=key), 503, "unavailable")
        proxy.is_dead = False
        eventually(lambda: merchant.post(payment(reference=key), key=key).status_code == 201, 60)
        again = merchant.post(payment(reference=key), key=key)
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["id"] != first["id"]
        assert merchant.count() == 2


def test_worker_with_dead_connections_recovers(conn: Connection, database: str, tmp_path: Path) -> None:
    shorten_delays(conn)
    with (
        running_sandbox(tmp_path) as sandbox,
        running_server("api", database) as api,
        proxied(database) as proxy,
        worker_process(proxy.url, sandbox.url, app="tests.support.stalled_worker.app") as worker,
        create_merchant(conn, api.url) as merchant,
    ):
        wait_for_worker(conn)
        first = merchant.pay()["id"]
        eventually(lambda: settled(conn) == {first}, 20)
        proxy.is_dead = True
        second = merchant.pay()["id"]
        eventually(lambda: proxy.swallowed > 0, 20)
        proxy.is_dead = False
        eventually(lambda: settled(conn) == {first, second}, 90)
        assert worker.poll() is None


def test_connection_losses_are_single_lines_in_the_logs_of_all_processes(
    killable_server: EmbeddedServer, tmp_path: Path
) -> None:
    worker_log = tmp_path / "worker.log"
    with (
        running_sandbox(tmp_path) as sandbox,
        running_server("api", killable_server.url) as api,
        running_server("webhooks", killable_server.url) as receiver,
        worker_log.open("wb") as stderr,
        worker_process(killable_server.url, sandbox.url, stderr=stderr),
        ExitStack() as stack,
    ):
        with connect_as_owner(killable_server.url) as conn:
            wait_for_worker(conn)
            merchant = stack.enter_context(create_merchant(conn, api.url))
            merchant.pay()
        killable_server.halt("immediate")
        problem(merchant.post(payment()), 503, "unavailable")
        problem(merchant.client.get("/v1/payments"), 503, "unavailable")
        assert httpx.post(f"{receiver.url}/stripe", content=b"{}", timeout=30).status_code == 400
        eventually(lambda: "the worker ended by itself" in worker_log.read_text(), 60)
        killable_server.resume()
        with connect_as_owner(killable_server.url) as conn:
            eventually(lambda: settled(conn), 60)
        logs = {"api": api.stop()[1], "webhooks": receiver.stop()[1], "worker": worker_log.read_text()}
    assert "surety.database: the database is back after " in logs["worker"]
    # Procrastinate prints this line, which is no entry of the log.
    logs["worker"] = logs["worker"].replace("Launching a worker on all queues\n", "")
    for name, log in logs.items():
        line = re.compile(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z [A-Z]+ {name}\[\d+\] [\w.]+: .+")
        assert log and [other for other in log.splitlines() if not line.fullmatch(other)] == [], log
