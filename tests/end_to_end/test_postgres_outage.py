"""PostgreSQL stopped, restarted, away for long, or silent on a line that seems open: nothing is lost, all come back."""

from __future__ import annotations

import asyncio
import os
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
from db.connect import patient
from db.deploy.deploy import deploy
from db.embedded import EmbeddedServer
from jobs.worker import Worker
from tests.crash.kills import children_of
from tests.support.http_client import Merchant, connected, fresh, payment, problem, service
from tests.support.payments import Connection, violations
from tests.support.proxy import proxied
from tests.support.sandbox_process import eventually, running_sandbox
from tests.support.workers import hasten, wait_for_worker, worker_here, worker_process


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of this test's own, to be stopped, with everything deployed."""
    with EmbeddedServer(durable=True) as server:
        deploy(server.url)
        with connected(server.url) as conn:
            hasten(conn)
            conn.execute("update surety.environment set kind = 'test'")
        yield server


def settled(conn: Connection) -> set[str]:
    return {row[0] for row in conn.execute("select id from surety.payments where state = 'settled'")}


@contextmanager
def merchant_at(conn: Connection, url: str) -> Generator[Merchant]:
    """A merchant who hangs up in the end."""
    merchant = Merchant(conn, url)
    with merchant.client:
        yield merchant


class Shoppers:
    """Requests without a pause, each repeated under its key until it is answered for good."""

    def __init__(self, merchant: Merchant, count: int = 2) -> None:
        self.accepted: dict[str, str] = {}
        self.refused = 0
        self.unavailable: list[httpx.Response] = []
        self._merchant = merchant
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._shopping = [self._pool.submit(self._shop) for _ in range(count)]

    def _shop(self) -> None:
        while not self._done.is_set():
            key = fresh("order")
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


def test_ten_minutes_without_postgresql_lose_nothing_and_need_nobody(mortal: EmbeddedServer, tmp_path: Path) -> None:
    with (
        running_sandbox(tmp_path) as sandbox,
        service("api", mortal.url) as api,
        service("webhooks", mortal.url) as receiver,
        worker_process(mortal.url, sandbox.url, "one") as one,
        worker_process(mortal.url, sandbox.url, "two") as two,
        ExitStack() as stack,
    ):
        with connected(mortal.url) as conn:
            wait_for_worker(conn, 2)
            assert httpx.get(f"{receiver.url}/health", timeout=30).status_code == 200
            shoppers = Shoppers(stack.enter_context(merchant_at(conn, api.url)))
            eventually(lambda: len(shoppers.accepted) > 10, 60)
        mortal.halt("immediate")
        eventually(lambda: len(shoppers.unavailable) >= 2, 30)
        refused = problem(shoppers.unavailable[-1], 503, "overloaded")
        assert "same Idempotency-Key" in refused["detail"]
        assert all(answer.headers["retry-after"] for answer in shoppers.unavailable)
        assert httpx.post(f"{receiver.url}/stripe", content=b"{}", timeout=30).status_code == 400, "it is still there"
        mortal.resume()
        with connected(mortal.url) as conn:
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


def test_an_api_process_that_is_replaced_while_postgresql_is_away_is_of_use_when_it_is_back(
    mortal: EmbeddedServer,
) -> None:
    with service("api", mortal.url, "--processes", "2") as api:
        eventually(lambda: len(children_of(api.process.pid)) == 2, 30)
        mortal.halt("immediate")
        killed, other = children_of(api.process.pid)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: {*children_of(api.process.pid)} - {killed, other}, 30)
        os.kill(other, signal.SIGSTOP)
        try:
            assert httpx.get(f"{api.url}/health", timeout=30).status_code == 503, "the new one answers"
            mortal.resume()
            with connected(mortal.url) as conn, merchant_at(conn, api.url) as merchant:
                assert merchant.pay()["object"] == "payment"
        finally:
            # Who stands still for long is replaced, too.
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGCONT)
        assert api.process.poll() is None


def test_what_was_asked_of_the_provider_while_postgresql_went_is_recorded_when_it_is_back(
    mortal: EmbeddedServer, tmp_path: Path
) -> None:
    with running_sandbox(tmp_path, "--slow-seconds=2") as sandbox, worker_process(mortal.url, sandbox.url) as worker:
        with connected(mortal.url) as conn:
            conn.execute("update outbox.handlers set lease = '60 seconds'")
            wait_for_worker(conn)
            sandbox.order("payment_intents.create", "slow", times=1)
            with service("api", mortal.url) as api, merchant_at(conn, api.url) as merchant:
                paid = merchant.pay()["id"]
            eventually(lambda: sandbox.control("faults")["next"] == [])
        mortal.restart("immediate")
        with connected(mortal.url) as conn:
            eventually(lambda: settled(conn) == {paid}, 30)
            sent = "select sends from surety.calls where operation = 'create'"
            assert conn.execute(sent).fetchall() == [(1,)], "nobody had to ask again"
        assert worker.poll() is None


def test_a_worker_that_is_started_while_postgresql_is_away_waits_for_it(mortal: EmbeddedServer, tmp_path: Path) -> None:
    mortal.halt()
    with running_sandbox(tmp_path) as sandbox, worker_process(mortal.url, sandbox.url) as worker:
        with pytest.raises(psycopg.OperationalError):
            connected(mortal.url)
        mortal.resume()
        with connected(mortal.url) as conn:
            wait_for_worker(conn)
        assert worker.poll() is None


async def test_a_line_that_is_dead_is_hung_up_after_the_statements_time(database: str) -> None:
    with proxied(database) as proxy:
        conn = await patient("api").connect(proxy.url, autocommit=True)
        conn.patience_seconds = 0.3
        assert await (await conn.execute("select 1")).fetchone() == (1,)
        proxy.is_dead = True
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("select 1")
        assert conn.closed


async def test_what_a_dead_line_has_locked_is_free_again(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.database.SILENCE_SECONDS", 3.0)
    monkeypatch.setitem(connect.PATIENCE_SECONDS, "worker", 0.5)
    with proxied(database) as proxy:
        async with worker_here(proxy.url, "http://unused") as here, worker_here(database, "http://unused") as there:
            async with here.database.alone("tick") as is_alone:
                assert is_alone
                await asyncio.sleep(4)
                assert not await found_alone(there), "who is heard keeps it, however long it takes"
                proxy.is_dead = True
                await asyncio.sleep(4)
                assert await found_alone(there)
            proxy.is_dead = False
            assert await found_alone(here)


async def test_a_line_whose_locks_are_given_back_may_be_silent(
    conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines() -> set[int]:
        workers = "application_name = 'surety-worker' and datname = current_database()"
        return {row[0] for row in conn.execute(f"select pid from pg_stat_activity where {workers}")}

    monkeypatch.setattr("jobs.database.SILENCE_SECONDS", 0.3)
    async with worker_here(database, "http://unused") as here:
        async with here.database.alone("one"), here.database.alone("two"):
            pass
        before = lines()
        await asyncio.sleep(1)
        assert before <= lines()


async def found_alone(worker: Worker) -> bool:
    async with worker.database.alone("tick") as is_alone:
        return is_alone


def test_an_api_whose_lines_have_died_says_503_and_comes_back(conn: Connection, database: str) -> None:
    with (
        proxied(database) as proxy,
        service("api", proxy.url) as api,
        merchant_at(conn, api.url) as merchant,
    ):
        first = merchant.pay()
        proxy.is_dead = True
        key = fresh("order")
        problem(merchant.post(payment(reference=key), key=key), 503, "overloaded")
        proxy.is_dead = False
        eventually(lambda: merchant.post(payment(reference=key), key=key).status_code == 201, 60)
        again = merchant.post(payment(reference=key), key=key)
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["id"] != first["id"]
        assert merchant.count() == 2


def test_a_worker_whose_lines_have_died_comes_back(conn: Connection, database: str, tmp_path: Path) -> None:
    hasten(conn)
    with (
        running_sandbox(tmp_path) as sandbox,
        service("api", database) as api,
        proxied(database) as proxy,
        worker_process(proxy.url, sandbox.url, app="tests.support.stalled_worker.app") as worker,
        merchant_at(conn, api.url) as merchant,
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
