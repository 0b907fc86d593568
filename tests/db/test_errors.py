"""The one judgement of database errors: each SQLSTATE as a real PostgreSQL reports it."""

from __future__ import annotations

import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql
from psycopg_pool import ConnectionPool, PoolTimeout

from app.web.database import DatabasePool
from db.errors import ErrorKind, error_text, is_retryable, is_unreachable, kind_of, message_of, outdates_connection
from db.logs import LineFormatter
from db.settings import Settings
from jobs.database import open_database
from tests.conftest import Connection
from tests.db.test_create_payments import until_waiting

KINDS: dict[ErrorKind, str] = {
    "conflict": "40001 40P01 55P03",
    "transient": "0A000 25P03 53000 53100 53200 53300 58000 58030",
    "unreachable": "08000 08001 08003 08006 08P01 25006 57P01 57P02 57P03 57P05",
    "not_deployed": "3F000 42883 42P01",
    "ours": "28000 28P01 3D000 42501 42601 42703 57014 SU005",
    "request": "22003 22021 22P05 23502 23503 23505 23514 25P02 54001 55000 P0001 SU003 SU004 SU006 XX000",
}
CASES = [(sqlstate, kind) for kind, sqlstates in KINDS.items() for sqlstate in sqlstates.split()]


@pytest.mark.parametrize(("sqlstate", "kind"), CASES)
def test_each_sqlstate_has_one_meaning(conn: Connection, sqlstate: str, kind: ErrorKind) -> None:
    statement = sql.SQL("do $$ begin raise exception using errcode = {}, message = 'as raised'; end $$")
    with pytest.raises(psycopg.Error) as raised:
        conn.execute(statement.format(sql.Literal(sqlstate)))
    error = raised.value
    assert (error.sqlstate, kind_of(error), message_of(error)) == (sqlstate, kind, "as raised")
    assert is_retryable(error) == (kind in {"conflict", "transient", "unreachable"})
    assert is_unreachable(error) == (kind == "unreachable")
    assert outdates_connection(error) == (sqlstate in {"0A000", "25006"})


def test_message_names_each_host_that_was_tried() -> None:
    with pytest.raises(psycopg.OperationalError) as refused:
        psycopg.connect("host=127.0.0.1,127.0.0.1 port=1,2 connect_timeout=1")
    message = message_of(refused.value)
    assert "port 1 failed: " in message and "port 2 failed: " in message and "\n" not in message
    with pytest.raises(psycopg.OperationalError) as refused:
        psycopg.connect("host=127.0.0.1 port=1 connect_timeout=1")
    assert message_of(refused.value).startswith('connection to server at "127.0.0.1", port 1 failed: ')


def test_connections_that_fail_or_are_lost_are_unreachable_and_misuse_is_not(conn: Connection, database: str) -> None:
    with pytest.raises(psycopg.OperationalError) as refused:
        psycopg.connect("host=127.0.0.1 port=1 connect_timeout=1")
    with psycopg.connect(database) as other:
        conn.execute("select pg_terminate_backend(%s)", (other.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError) as ended:
            other.execute("select 1")
        with pytest.raises(psycopg.OperationalError) as lost:
            other.execute("select 1")
    pool = ConnectionPool(database, min_size=0, max_size=1, open=True)
    with pool, pool.connection(), pytest.raises(PoolTimeout) as timeout, pool.connection(timeout=0.01):
        pass
    for error in (refused.value, ended.value, lost.value, timeout.value):
        assert kind_of(error) == "unreachable"
    with pytest.raises(psycopg.DataError) as malformed:
        conn.execute("select %s", ("\0",))
    assert kind_of(malformed.value) == kind_of(psycopg.InterfaceError("the cursor is closed")) == "request"
    assert not is_retryable(ValueError()) and not is_retryable(None) and not is_unreachable(None)


def test_concurrent_changes_of_one_catalog_entry_are_a_conflict(
    conn: Connection, two: tuple[Connection, Connection]
) -> None:
    one, other = two
    one.execute("create schema contested")
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(other.execute, "create schema contested")
        until_waiting(conn, other)
        one.commit()
        duplicate = second.exception()
    assert isinstance(duplicate, psycopg.errors.UniqueViolation) and kind_of(duplicate) == "conflict"
    conn.execute("drop schema contested")
    with pytest.raises(psycopg.errors.UniqueViolation) as ours:
        conn.execute("insert into surety.currencies select * from surety.currencies")
    assert kind_of(ours.value) == "request"


async def test_pools_leave_a_server_that_became_read_only(settings: Settings) -> None:
    become_read_only = "select set_config('default_transaction_read_only', 'on', false)"
    write = "select pg_current_xact_id() is not null"
    api = DatabasePool("api", settings)
    await api.open()
    assert await api.fetch_row(become_read_only) == ("on",)
    assert await api.fetch_row(write) == (True,)
    await api.close()
    async with open_database(settings) as database:
        assert await database.value(become_read_only) == "on"
        assert await database.value(write)


def test_logs_and_descriptions_hold_no_row(conn: Connection) -> None:
    conn.execute("create temp table customers (email text, amount integer check (amount > 0))")

    address = os.urandom(8).hex()
    with pytest.raises(psycopg.Error) as violation:
        conn.execute("insert into customers values (%s, 0)", (address,))
    assert address in str(violation.value), "PostgreSQL shows the row"

    def fail() -> None:
        raise ExceptionGroup("both", [violation.value, ValueError("plain")]) from violation.value

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("worker"))
    entry = logging.LogRecord("surety.drain", logging.ERROR, __file__, 1, "event %s failed", ("evt_1",), None)
    try:
        fail()
    except ExceptionGroup as group:
        entry.exc_info = (type(group), group, group.__traceback__)
        handler.handle(entry)
        text = error_text(group.exceptions[0])
    assert text == (
        'CheckViolation: new row for relation "customers" violates check constraint "customers_amount_check"'
    )
    logged = stream.getvalue()
    assert address not in logged
    assert "DETAIL:  (left out)" in logged and "ValueError: plain" in logged and "in fail" in logged
    with pytest.raises(psycopg.Error) as broken:
        conn.execute("select %s::text::json", (f'{{"email": "{address}", "amount": x}}',))
    entry.exc_info = (type(broken.value), broken.value, None)
    handler.handle(entry)
    assert address not in stream.getvalue()
    assert address not in error_text(broken.value)
