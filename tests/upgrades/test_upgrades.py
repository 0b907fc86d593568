"""A populated database of each release is brought to this version beside the calls of that release."""

from __future__ import annotations

import importlib
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import psycopg
import pytest

from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.processes import wait_until
from tests.bench.databases import ROOT
from tests.conftest import PREFIX
from tests.db.test_deploy import dump
from tests.support.payments import Connection, violations
from tests.upgrades.dumps import RELEASES, load_dump, restart_business, write_dump
from tests.upgrades.population import populate
from tests.upgrades.rolling import COUNTED, Version, roll

CLIENTS = 2
STATES = 14
CONTENTS = """
select
    (select count(distinct state) from surety.payments), (select count(*) from surety.payments),
    (select count(*) from surety.refunds), (select count(*) from surety.disputes),
    (select count(*) from surety.discrepancies), (select count(*) from surety.payment_holds),
    (select count(*) from surety.payment_methods), (select count(*) from surety.customers where erased_at is not null),
    (select count(*) from outbox.dead_letters where closed_at is null), (select count(*) from outbox.batches),
    (select count(*) from outbox.retries), (select count(*) from ledger.transfers)
"""


class OldClients:
    """Clients of a release: they lead payments through their lives and keep the errors."""

    def __init__(self, url: str, calls: ModuleType) -> None:
        self.url = url
        self.live: Callable[[Connection, bytes, int], str] = calls.live_payment
        self.errors: list[BaseException] = []
        self.lived: list[str] = []
        self.numbers = itertools.count()
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(CLIENTS)]

    def work(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            [(key_hash,)] = conn.execute(
                "select k.hash from surety.api_keys as k join surety.merchants as m on m.id = k.merchant_id"
                " where m.suspended_at is null limit 1"
            ).fetchall()
            while not self.is_over.is_set():
                try:
                    self.lived.append(self.live(conn, key_hash, next(self.numbers)))
                except (psycopg.Error, AssertionError) as error:
                    self.errors.append(error)

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        for thread in self.threads:
            thread.join()

    def until_lived(self, count: int) -> None:
        """Wait until so many further payments have ended."""
        wanted = len(self.lived) + count
        assert wait_until(lambda: len(self.lived) >= wanted or bool(self.errors), 60)
        assert self.errors == []


def rows(conn: Connection, query: str) -> list[tuple[Any, ...]]:
    return conn.execute(query.encode()).fetchall()


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_populated_release_is_upgraded_beside_its_own_calls(
    server: str, blank: str, release: Path, tmp_path: Path
) -> None:
    load_dump(blank, release / "dump.sql")
    restart_business(blank)
    with psycopg.connect(blank, autocommit=True) as conn:
        calls = importlib.import_module(f"tests.upgrades.{release.name}.calls")
        before = rows(conn, "select id, amount_minor from surety.payments order by id")
        with OldClients(blank, calls) as clients:
            clients.until_lived(2)
            deploy(blank)
            clients.until_lived(4)
        assert clients.errors == []
        assert violations(conn) == {}
        assert set(before) <= set(rows(conn, "select id, amount_minor from surety.payments"))
    # Loading a dump groups the terms of some expressions anew.
    with temporary_database(server, PREFIX) as new, temporary_database(server, PREFIX) as loaded:
        deploy(new)
        write_dump(new, dumped := tmp_path / "dump.sql")
        load_dump(loaded, dumped)
        assert dump(blank) == dump(loaded), "an upgraded database has the structure of a new one"


def test_a_dump_of_this_version_is_of_payments_in_all_states(blank: str, server: str, tmp_path: Path) -> None:
    deploy(blank)
    with psycopg.connect(blank, autocommit=True) as conn:
        populate(conn)
        assert violations(conn) == {}
        before = rows(conn, CONTENTS)
    write_dump(blank, dumped := tmp_path / "dump.sql")
    with temporary_database(server, PREFIX) as loaded:
        load_dump(loaded, dumped)
        with psycopg.connect(loaded, autocommit=True) as conn:
            assert rows(conn, CONTENTS) == before
    states, payments, *others = before[0]
    assert (states, payments >= 200) == (STATES, True)
    assert min(others) > 0


def test_processes_are_replaced_and_back_without_a_failed_call(tmp_path: Path) -> None:
    old, new = (Version(name, ROOT, sys.executable) for name in ("old", "new"))
    result = roll(old, new, tmp_path, payments=5)
    assert {name: result[name] for name in COUNTED if result[name]} == {}
    assert result["acknowledged"] >= 30
