"""What every test can ask for: a real PostgreSQL, and in it a database with everything deployed, empty for each test.

The server is embedded and in memory; with DATABASE_URL it is that one, where databases named `surety_test_…` come and
go and the one named is never touched. Several runs at once don't meet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from db.connect import ProcessKind, harden, role_of
from db.deploy.deploy import deploy
from db.embedded import EmbeddedServer, temporary_database
from db.settings import Settings, load_settings
from tests.support.linters import Linters
from tests.support.reusable_database import ReusableDatabase

Connection = psycopg.Connection[tuple[Any, ...]]
Connect = Callable[[ProcessKind], Connection]

PREFIX = "surety_test"
LONGEST_FILES = (
    "test_simulation.py",
    "test_provider_faults.py",
    "test_postgres_outage.py",
    "test_circuit_breaker.py",
    "test_crash.py",
    "test_payment_lives.py",
    "test_demo.py",
    "test_bench.py",
    "test_up.py",
    "test_lint.py",
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the tables that tests have recorded as properties of theirs: titles and lines."""
    for report in [one for reports in terminalreporter.stats.values() for one in reports]:
        for title, lines in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            terminalreporter.section(title)
            terminalreporter.write_line("\n".join(lines))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for everything: two cores are never idle then. One for a few tests, which begin at once."""
    return 3 if config.args == config.getini("testpaths") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one in the end."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST_FILES)))


@pytest.fixture(scope="session")
def linters() -> Iterator[Linters]:
    """The linters of style and types, all at work together."""
    at_work = Linters()
    yield at_work
    at_work.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server, by a login that may create databases and roles."""
    if given := os.environ.get("DATABASE_URL"):
        yield given
        return
    with EmbeddedServer() as embedded:
        yield embedded.url


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with everything deployed, to copy."""
    with temporary_database(server, PREFIX) as url:
        deploy(url)
        yield str(conninfo_to_dict(url)["dbname"])


@pytest.fixture
def blank(server: str) -> Iterator[str]:
    """The address of an empty database."""
    with temporary_database(server, PREFIX) as url:
        yield url


@pytest.fixture(scope="session")
def reusable_database(server: str, template: str) -> Iterator[ReusableDatabase]:
    """What gives databases to tests."""
    reusable_database = ReusableDatabase(server, PREFIX, template)
    yield reusable_database
    reusable_database.drop()


@pytest.fixture
def database(reusable_database: ReusableDatabase) -> Iterator[str]:
    """The address of a database with everything deployed and no rows but those of the schema."""
    yield reusable_database.acquire()
    reusable_database.release()


@pytest.fixture
def settings(database: str) -> Settings:
    """Settings that name the test's database and nothing else."""
    return load_settings({"DATABASE_URL": database})


@pytest.fixture
def conn(database: str, reusable_database: ReusableDatabase) -> Connection:
    """A connection in autocommit mode, with all rights."""
    return reusable_database.owner_connection()


@pytest.fixture
def two(database: str) -> Iterator[tuple[Connection, Connection]]:
    """Two connections with all rights, in transactions of their own."""
    with psycopg.connect(harden(database, "deploy")) as one, psycopg.connect(harden(database, "deploy")) as other:
        yield one, other


@pytest.fixture
def connect(database: str) -> Iterator[Connect]:
    """Connections as a kind of process, in autocommit mode, closed after the test: `connect("api")`."""
    with ExitStack() as stack:

        def open_connection(kind: ProcessKind) -> Connection:
            return stack.enter_context(psycopg.connect(harden(database, kind, role=role_of(kind)), autocommit=True))

        yield open_connection
