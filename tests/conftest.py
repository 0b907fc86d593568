"""Fixtures of all tests: a real PostgreSQL, and in it a database with everything deployed, empty for each test.

The server is embedded and in memory. With DATABASE_URL it is that server: databases named `surety_test_…` are created
and dropped there, and the named database is never touched. Concurrent runs don't affect each other.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from db.connect import ProcessKind, harden, role_of
from db.deploy.deploy import deploy
from db.embedded.databases import drop_stale_databases, own_database, temporary_database, with_database
from db.embedded.server import EmbeddedServer
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
    "test_comparisons.py",
    "test_up.py",
    "test_lint.py",
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests have recorded as user properties: title and lines."""
    for report in [one for reports in terminalreporter.stats.values() for one in reports]:
        for title, lines in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            terminalreporter.section(title)
            terminalreporter.write_line("\n".join(lines))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for the whole suite, so that two cores are never idle. None for a few tests, to start at once."""
    return 3 if config.args == config.getini("testpaths") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no process ends much later than the others."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST_FILES)))


@pytest.fixture(scope="session")
def linters() -> Iterator[Linters]:
    """The linters of style and types, started together."""
    at_work = Linters()
    yield at_work
    at_work.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server, by a login that may create databases and roles."""
    if given := os.environ.get("DATABASE_URL"):
        yield given
        return
    # Statistics that appear in the middle of a test would change its plans.
    with EmbeddedServer(settings={"autovacuum": "off"}) as embedded:
        yield embedded.url


@pytest.fixture(scope="session")
def executor(server: str) -> Iterator[NoopExecutor]:
    """The server as pytest-postgresql sees it. Its template database has everything deployed."""
    given = conninfo_to_dict(harden(server, "deploy"))
    executor = NoopExecutor(
        host=str(given.get("host") or ""),
        port=int(given.get("port") or 5432),
        user=str(given.get("user") or getpass.getuser()),
        password=str(given["password"]) if given.get("password") else None,
        options=str(given["options"]),
        dbname=f"{PREFIX}_{os.urandom(6).hex()}",
        maintenance_dbname=str(given["dbname"]),
    )
    with janitor(server, executor, executor.template_dbname) as template:
        template.load(lambda **where: deploy(with_database(server, where["dbname"])))
        yield executor


@contextmanager
def janitor(server: str, executor: NoopExecutor, name: str, template: str | None = None) -> Generator[DatabaseJanitor]:
    """One database of the server. Those that killed runs have left are dropped."""
    with (
        psycopg.connect(server, autocommit=True) as conn,
        DatabaseJanitor(
            user=executor.user,
            host=executor.host,
            port=executor.port,
            password=executor.password,
            maintenance_dbname=executor.maintenance_dbname,
            dbname=name,
            template_dbname=template,
        ) as made,
    ):
        drop_stale_databases(conn, PREFIX)
        own_database(conn, name)
        yield made


@contextmanager
def cloned_database(server: str, executor: NoopExecutor) -> Generator[str]:
    """The address of a clone of the template, dropped after use."""
    name = f"{PREFIX}_{os.urandom(6).hex()}"
    with janitor(server, executor, name, executor.template_dbname):
        yield with_database(server, name)


# `postgresql` is a connection to a clone of the test's own, for tests that change the schema.
postgresql = factories.postgresql("executor")


@pytest.fixture
def blank(server: str) -> Iterator[str]:
    """The address of an empty database."""
    with temporary_database(server, PREFIX) as url:
        yield url


@pytest.fixture(scope="module")
def module_database(server: str, executor: NoopExecutor) -> Iterator[str]:
    """The address of a database with everything deployed, shared by a file's tests."""
    with cloned_database(server, executor) as url:
        yield url


@pytest.fixture(scope="session")
def reusable_database(server: str, executor: NoopExecutor) -> Iterator[ReusableDatabase]:
    """A clone of the template, emptied after each test."""
    reusable_database = ReusableDatabase(lambda: cloned_database(server, executor))
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
