"""A small pool for single calls of the API and the receiver, beside the batching connections."""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from app.web.batching import DatabaseAway, Unavailable, unavailable_by
from db.connect import ProcessKind, bounded_connection, connection_options, conninfo, find_undeployed
from db.errors import DatabaseNotReady, is_read_only, is_retryable, message_of, outdates_connection
from db.settings import Settings

Row = tuple[Any, ...]

CONNECTIONS_MAX = 4
POOL_TIMEOUT_SECONDS = 3.0
WAITING_MAX = 100


class DatabasePool:
    """Single calls, each a transaction of its own; a call that fails by a lost connection is repeated.

    Up to WAITING_MAX calls wait for a connection; more are refused at once.
    """

    def __init__(self, kind: ProcessKind, settings: Settings, *, connections_max: int = CONNECTIONS_MAX) -> None:
        self._in_use = 0
        self._pool: AsyncConnectionPool[AsyncConnection[Row]] = AsyncConnectionPool(
            conninfo(kind, settings),
            connection_class=bounded_connection(kind),
            kwargs=connection_options(kind, settings),
            min_size=1,
            max_size=connections_max,
            max_waiting=WAITING_MAX,
            timeout=POOL_TIMEOUT_SECONDS,
            # The pool doubles its pauses between attempts, so it gives up early; the next request makes it try again.
            reconnect_timeout=POOL_TIMEOUT_SECONDS,
            open=False,
        )

    async def open(self) -> None:
        """Begin to connect."""
        await self._pool.open()

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    async def fetch_row(self, query: LiteralString, *values: Any) -> Row | None:
        """The first row of a query that may be repeated. Raises Unavailable, or psycopg.Error if the query is wrong."""
        for _ in range(CONNECTIONS_MAX + 1):
            try:
                async with self._pool.connection() as connection:
                    return await self._fetch_row(connection, query, values)
            except TooManyRequests as error:
                raise Unavailable(str(error)) from None
            except PoolTimeout as error:
                is_busy = self._in_use >= self._pool.max_size
                raise (Unavailable if is_busy else DatabaseAway)(str(error)) from None
            except psycopg.Error as error:
                if not is_retryable(error):
                    raise
                failure = error
        raise unavailable_by(failure)

    async def _fetch_row(
        self, connection: AsyncConnection[Row], query: LiteralString, values: tuple[Any, ...]
    ) -> Row | None:
        self._in_use += 1
        try:
            return await (await connection.execute(query, values)).fetchone()
        except psycopg.Error as error:
            if outdates_connection(error):
                await connection.close()
            raise
        finally:
            self._in_use -= 1


def require_deployed(kind: ProcessKind, settings: Settings, function: str) -> None:
    """Raises DatabaseNotReady unless the database can be reached and knows a function that this version calls."""
    try:
        missing = find_undeployed(kind, settings, function)
    except psycopg.Error as error:
        need = (
            "this process needs the primary, and PostgreSQL is read-only here"
            if is_read_only(error)
            else ("the database can't be used")
        )
        raise DatabaseNotReady(f"{need}: {message_of(error)}") from None
    if missing is not None:
        raise DatabaseNotReady(f"the database has no {missing}: run `surety deploy` first")
