"""Deploys beside traffic, and beside other sessions that hold locks: no call fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psycopg
import pytest

from db.deploy.deploy import ADVISORY_LOCK, deploy
from db.embedded.processes import wait_until
from db.errors import DeployError
from tests.conftest import Connection
from tests.db.test_deploy import BEHAVIOUR, SourceTree, fetch
from tests.support.payments import add_merchant, fact, pay, record, violations


@pytest.fixture
def shop(tmp_path: Path) -> SourceTree:
    return SourceTree(tmp_path)


class ConcurrentCallers:
    """Clients that call without pause; counts their calls and keeps their errors."""

    def __init__(self, url: str, clients: int, call: Callable[[Connection, int], None]) -> None:
        self.url = url
        self.call = call
        self.ids = itertools.count()
        self.calls = 0
        self.errors: list[psycopg.Error] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def run(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            while not self.over.is_set():
                try:
                    self.call(conn, next(self.ids))
                except psycopg.Error as error:
                    self.errors.append(error)
                self.calls += 1


def test_no_payment_fails_during_repeated_deploys(database: str, conn: Connection) -> None:
    _, key_hash = add_merchant(conn)

    def call(client: Connection, number: int) -> None:
        [payment_id] = pay(client, key_hash)
        record(client, [fact(payment_id, "captured", "ch", 10000)])
        client.execute("select merchant_id, body from api.get_payment(%s, %s)", (key_hash, payment_id))

    with ConcurrentCallers(database, 4, call) as traffic:
        for _ in range(5):
            before = traffic.calls
            conn.execute("delete from deploy.objects")
            assert len(deploy(database, force=True).written) > 10
            assert wait_until(lambda before=before: traffic.calls > before + 10, 20)  # type: ignore[misc]
    assert traffic.errors == []
    assert violations(conn) == {}


def order(client: Connection, number: int) -> None:
    with client.transaction():
        client.execute("insert into shop.orders (id, amount) values (%s, 5)", (number,))
        client.execute("select id, price from shop.prices where id = %s", (number,))
        client.execute("select shop.price(%s)", (number,))


def test_no_call_fails_during_repeated_deploys(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    with ConcurrentCallers(blank, 6, order) as traffic:
        for number in range(12):
            before = traffic.calls
            shop.write(behaviour=BEHAVIOUR)
            shop.change("'v1'", f"'v{number}'")
            shop.change("p_amount * 2", f"p_amount * {number}")
            columns = "".join(f", {n} as more_{n}" for n in range(number))
            shop.change("as price from", f"as price{columns} from")
            shop.change("for each statement execute", "for each statement" + " " * number + " execute")
            if number % 3 == 1:
                shop.migrate(f"{number:04}_column.sql", f"alter table shop.orders add column more_{number} int;")
            assert shop.deploy(blank, force=True).outcome == "changed"
            assert wait_until(lambda before=before: traffic.calls > before, 20)  # type: ignore[misc]
    assert traffic.errors == []
    assert fetch(blank, "select count(*) from shop.orders") == [(traffic.calls,)]
    assert fetch(blank, "select count(*) from shop.log") == [(traffic.calls,)]


def test_deploy_without_its_lock_yields_and_succeeds_later(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.change("for each statement execute", "for each statement  execute")
    result: list[str] = []
    with psycopg.connect(blank) as holder, psycopg.connect(blank, autocommit=True) as other:
        holder.execute("insert into shop.orders values (1, 5)")
        other.execute("set lock_timeout = '2s'")

        def say(text: str) -> None:
            result.append(text)
            if len(result) == 2:
                holder.commit()

        deploying = threading.Thread(target=shop.deploy, args=(blank,), kwargs={"say": say})
        deploying.start()
        for number in itertools.count(2):
            other.execute("insert into shop.orders values (%s, 5)", (number,))
            if not deploying.is_alive():
                break
        deploying.join()
    assert all("lock timeout" in text for text in result)
    assert len(result) >= 2
    assert fetch(blank, "select attempt from (select count(*) as attempt from deploy.deploys) as d") == [(2,)]


def test_a_deploy_that_never_gets_its_lock_gives_up_and_changes_nothing(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.change("p_amount * 2", "p_amount * 3")
    shop.change("for each statement execute", "for each statement  execute")
    with psycopg.connect(blank) as holder:
        holder.execute("insert into shop.orders values (1, 5)")
        with pytest.raises(DeployError, match="gave up after 1 attempts"):
            shop.deploy(blank, lock_seconds_max=0)
    assert fetch(blank, "select shop.price(1)") == [(2,)]


def test_deploy_names_the_session_that_holds_the_lock_of_deploys(
    blank: str, shop: SourceTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.deploy.deploy.OTHER_DEPLOY_SECONDS_MAX", 0.2)
    said: list[str] = []
    with psycopg.connect(blank) as holder:
        holder.execute("select pg_advisory_lock(%s)", (ADVISORY_LOCK,))
        expected = f"process {holder.info.backend_pid} of login {holder.info.user}"
        with pytest.raises(DeployError, match=expected):
            shop.deploy(blank, say=said.append)
    assert said == [f"another deploy is running ({expected}); waiting until it ends"]


@pytest.fixture(autouse=True)
def no_deploy_outlives_its_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
