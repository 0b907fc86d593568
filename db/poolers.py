"""Connection poolers between a process and PostgreSQL, such as PgBouncer.

In session mode a client keeps its session, so everything works. A pooler drops the start-up parameter `options`, or
refuses it; what was dropped is set again on each connection. In transaction mode each transaction may run in another
session. Prepared statements, advisory locks, LISTEN and settings of the session then break, or reach other clients:
only kinds of processes that need none of them may use such a pooler, with settings of their login
(`SURETY_POOL_MODE`).

A pooler answers the login itself, so the process id that a client gets from it is not that of the session. Whether
sessions are shared is tried out: two clients of a pooler in session mode never meet in one session.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import conninfo_to_dict

from db.errors import DatabaseNotReady, message_of

POOLERS_PAGE = "docs/high-availability.md, section Poolers"
ROUNDS = 5
SESSION_SECONDS_MAX = 3.0
SESSION_PID = "select pg_backend_pid()"
# Ids repeat on other hosts, times don't.
SESSION = "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()"
SET_AGAIN = "select set_config(name, value, false) from unnest(%s::text[], %s::text[]) as dropped (name, value)"
OPTION = re.compile(r"-c\s*([\w.]+)=((?:\\.|\S)*)")

_session_poolers: set[str] = set()
"""Addresses at which a pooler in session mode was found by this process."""


def open_session(address: str) -> Connection[tuple[Any, ...]]:
    """A connection in autocommit mode whose session has the settings of its address.

    Raises psycopg.Error, and DatabaseNotReady for a pooler that can't be used.
    """
    try:
        connection = psycopg.connect(address, autocommit=True)
    except psycopg.OperationalError as error:
        require_options(error)
        raise
    try:
        if is_behind_pooler(connection, connection.execute(SESSION_PID).fetchone()):
            require_session_mode(address)
            connection.execute(SET_AGAIN, dropped_settings(address))
    except BaseException:
        connection.close()
        raise
    return connection


async def restore_session(connection: AsyncConnection[tuple[Any, ...]], address: str) -> None:
    """Give a new connection the settings of its address if a pooler dropped them. Raises as open_session does."""
    names, values = dropped_settings(address)
    if not names:
        return
    is_autocommit = connection.autocommit
    await connection.set_autocommit(True)
    if is_behind_pooler(connection, await (await connection.execute(SESSION_PID)).fetchone()):
        await asyncio.to_thread(require_session_mode, address)
        await connection.execute(SET_AGAIN, (names, values))
    await connection.set_autocommit(is_autocommit)


def is_behind_pooler(connection: Connection[Any] | AsyncConnection[Any], session: tuple[Any, ...] | None) -> bool:
    """Whether a pooler answered the login: it announced another process id than that of the session."""
    return session != (connection.info.backend_pid,)


def dropped_settings(address: str) -> tuple[list[str], list[str]]:
    """Names and values of the settings in an address's `options`."""
    found = OPTION.findall(str(conninfo_to_dict(address).get("options") or ""))
    return [name for name, _ in found], [re.sub(r"\\(.)", r"\1", value) for _, value in found]


def require_options(error: psycopg.OperationalError) -> None:
    """Raises DatabaseNotReady if a pooler refused the start-up parameter `options`."""
    if "startup parameter" in str(error):
        raise DatabaseNotReady(
            f"a connection pooler refuses a start-up parameter ({message_of(error)}): set"
            f" ignore_startup_parameters = options in PgBouncer; see {POOLERS_PAGE}"
        ) from None


def require_session_mode(address: str) -> None:
    """Raises DatabaseNotReady unless the pooler at an address is in session mode."""
    if address in _session_poolers:
        return
    if shares_sessions(address):
        raise DatabaseNotReady(
            "the connection pooler before the database gives each transaction another session (pool_mode ="
            " transaction): set pool_mode = session for this process's login, or connect directly; API and receiver"
            f" can use it with SURETY_POOL_MODE=transaction; see {POOLERS_PAGE}"
        )
    _session_poolers.add(address)


def shares_sessions(address: str) -> bool:
    """Whether a pooler's client keeps no session of its own. Raises psycopg.Error if there is no session at all.

    A second client that gets no session in time waits for that of the first, as in session mode with a pool that is
    used up.
    """
    firsts, seconds = set[Any](), set[Any]()
    with psycopg.connect(address, autocommit=True, prepare_threshold=None) as first:
        firsts.add(session_of(first))
        with (
            suppress(psycopg.OperationalError),
            psycopg.connect(address, autocommit=True, prepare_threshold=None) as second,
        ):
            for _ in range(ROUNDS):
                seconds.add(session_of(second))
                # An open transaction holds its session, so that the first client can't get it again.
                with answered_in_time(second), second.transaction():
                    seconds.add(session_of(second))
                    if not firsts & seconds:
                        firsts.add(session_of(first))
    return len(firsts) > 1 or len(seconds) > 1 or bool(firsts & seconds)


def session_of(connection: Connection[Any]) -> tuple[Any, ...] | None:
    """The session that a connection has for a statement."""
    with answered_in_time(connection):
        return connection.execute(SESSION).fetchone()


@contextmanager
def answered_in_time(connection: Connection[Any]) -> Generator[None]:
    """Shut down a connection's socket if the block takes longer than SESSION_SECONDS_MAX."""

    def shut_down() -> None:
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(SESSION_SECONDS_MAX, shut_down)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def require_login_settings(connection: Connection[Any], wanted: dict[str, str]) -> None:
    """Raises DatabaseNotReady unless the login itself has these settings, which the pooler can't be given."""
    query = (
        "select name, value, quote_ident(session_user) from unnest(%s::text[], %s::text[]) as wanted (name, value)"
        " where current_setting(name) <> value"
    )
    missing = connection.execute(query, (list(wanted), list(wanted.values()))).fetchall()
    if missing:
        statements = "; ".join(f"alter role {login} set {name} = '{value}'" for name, value, login in missing)
        raise DatabaseNotReady(
            f"with SURETY_POOL_MODE=transaction the settings are those of the login, which lacks some: {statements}"
        )
