"""The workers' connections to PostgreSQL: a small pool; statements are transactions, repeated if that is harmless."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncCursor
from psycopg.rows import class_row, scalar_row
from psycopg_pool import AsyncConnectionPool

from db.connect import bounded_connection, conninfo
from db.errors import is_retryable, is_unreachable, message_of, outdates_connection
from db.settings import Settings
from db.tasks import cancel_and_wait

log = logging.getLogger("surety.database")

T = TypeVar("T")
Row = TypeVar("Row")

# One of them is the leader's.
WORKER_CONNECTIONS_MAX = 13
# The pool doubles its pauses up to minutes, so it gives up early and is started again.
POOL_SECONDS = 5.0
START_SECONDS_MAX = 30.0
ATTEMPTS_MAX = 5
PAUSE_SECONDS = 0.05
PAUSE_SECONDS_MAX = 1.0

# A connection can break unnoticed at both ends, and its session would keep its locks. So the server ends a session with
# locks that is idle for so long, which exceeds our own timeouts.
LOCK_IDLE_SECONDS = 60.0
TAKE_LOCK = "select surety.take_lock(%s, make_interval(secs => %s))"
UNLOCK = "select pg_advisory_unlock(%s), set_config('idle_session_timeout', %s, false)"


async def bisect_on_error(
    items: list[T], do: Callable[[list[T]], Awaitable[None]], give_up: Callable[[T, Exception], Awaitable[None]]
) -> None:
    """Process all items together; after an error that is not retryable, each half of them.

    An item that fails alone is given up; the others are processed. Raises retryable errors.
    """
    try:
        await do(items)
    except Exception as error:
        if is_retryable(error):
            raise
        if len(items) == 1:
            await give_up(items[0], error)
            return
        middle = len(items) // 2
        await bisect_on_error(items[:middle], do, give_up)
        await bisect_on_error(items[middle:], do, give_up)


class WorkerDatabase:
    """Statements of a worker, each a transaction of its own."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Any]]) -> None:
        self._pool = pool
        self._away_since: float | None = None
        self._locks: AdvisoryLocks | None = None
        self._locks_mutex = asyncio.Lock()

    async def rows(self, kind: type[Row], query: LiteralString, *values: Any) -> list[Row]:
        """The rows of a query, each as a struct with the columns' names."""

        async def fetch(connection: AsyncConnection[Any]) -> list[Row]:
            cursor: AsyncCursor[Row] = connection.cursor(row_factory=class_row(kind))
            return await (await cursor.execute(query, values)).fetchall()

        return await self._try(fetch)

    async def value(self, query: LiteralString, *values: Any) -> Any:
        """The one value that a query gives, None if there is no row."""

        async def fetch(connection: AsyncConnection[Any]) -> Any:
            cursor = connection.cursor(row_factory=scalar_row)
            return await (await cursor.execute(query, values)).fetchone()

        return await self._try(fetch)

    async def commit_if_true(self, query: LiteralString, *values: Any) -> bool:
        """Commit the query if it returns true, roll it back if it returns false; returns that value."""

        async def attempt(connection: AsyncConnection[Any]) -> bool:
            async with connection.transaction() as transaction:
                cursor = connection.cursor(row_factory=scalar_row)
                done = bool(await (await cursor.execute(query, values)).fetchone())
                if not done:
                    raise psycopg.Rollback(transaction)
            return done

        return await self._try(attempt)

    @asynccontextmanager
    async def try_lock(self, name: str) -> AsyncGenerator[bool]:
        """Whether this worker alone holds the lock of that name. A killed worker's lock ends with it."""
        async with self._locks_mutex:
            if self._locks is None or self._locks.is_lost:
                self._locks = AdvisoryLocks(self._pool)
            locks = self._locks
            is_locked = await locks.acquire(name)
        try:
            yield is_locked
        finally:
            if is_locked:
                async with self._locks_mutex:
                    await locks.release(name)

    @asynccontextmanager
    async def try_lead(self, name: str) -> AsyncGenerator[LeaderSession | None]:
        """A session that holds the lock of that name; None if another worker has it. Raises psycopg.Error."""
        async with self._pool.connection() as connection:
            session = LeaderSession(connection)
            key = await session.value(TAKE_LOCK, name, LOCK_IDLE_SECONDS)
            if key is None:
                yield None
                return
            try:
                yield session
            finally:
                with suppress(psycopg.Error):
                    await session.value(UNLOCK, key, None)

    async def _try(self, work: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Run the work on a connection of the pool, and again after a retryable error.

        While the server is unreachable, the attempts never end, because a provider's response must not be lost.
        """
        turn = 0
        while True:
            try:
                async with self._pool.connection() as connection:
                    result = await self._run_on(connection, work)
            except psycopg.Error as error:
                turn += 1
                if is_unreachable(error):
                    self._note_outage(error)
                elif not is_retryable(error) or turn >= ATTEMPTS_MAX:
                    raise
                else:
                    log.info("try %s: %s", turn, message_of(error))
                await asyncio.sleep(min(PAUSE_SECONDS * 2 ** min(turn, 10), PAUSE_SECONDS_MAX))
            else:
                self._note_answer()
                return result

    def _note_outage(self, error: psycopg.Error) -> None:
        """Log the first statement that finds no server."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("the database is away: %s", message_of(error))

    def _note_answer(self) -> None:
        """Log the first statement that is answered after an outage."""
        if self._away_since is not None:
            log.warning("the database is back after %.1f s", time.monotonic() - self._away_since)
            self._away_since = None

    async def _run_on(
        self, connection: AsyncConnection[Any], work: Callable[[AsyncConnection[Any]], Awaitable[T]]
    ) -> T:
        try:
            return await work(connection)
        except psycopg.Error as error:
            if outdates_connection(error):
                await connection.close()
            raise


class LeaderSession:
    """A session whose lock makes its worker the leader. The lock ends with it, also after LOCK_IDLE_SECONDS without a
    statement.
    """

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    @property
    def is_lost(self) -> bool:
        """The connection is gone, and with it the lock."""
        return self._connection.closed

    async def value(self, query: LiteralString, *values: Any) -> Any:
        """The one value that a query gives. Raises psycopg.Error at once."""
        try:
            cursor = self._connection.cursor(row_factory=scalar_row)
            return await (await cursor.execute(query, values)).fetchone()
        except BaseException as error:
            # Its lock must end, also when this call was canceled.
            if not isinstance(error, psycopg.Error) or outdates_connection(error):
                await self._connection.close()
            raise


class AdvisoryLocks:
    """This process's advisory locks, all on one connection, which goes back to the pool with the last of them.

    The holder of a lock needs further connections. If each lock took one, locks could use up the pool and block each
    other for ever.
    """

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Any]]) -> None:
        self.is_lost = False
        """The connection is gone, and with it the locks."""
        self._pool = pool
        self._stack = AsyncExitStack()
        self._connection: AsyncConnection[Any] | None = None
        self._keys: dict[str, int] = {}

    async def acquire(self, name: str) -> bool:
        """Take a lock; False if it is taken. A session can take its own lock twice, so our names are checked first."""
        if name in self._keys:
            return False
        try:
            key = await self._ask(TAKE_LOCK, name, LOCK_IDLE_SECONDS)
            if key is not None:
                self._keys[name] = key
        finally:
            await self._return_connection_if_idle()
        return name in self._keys

    async def release(self, name: str) -> None:
        """Unlock; a lost connection has released its locks already."""
        key = self._keys.pop(name)
        try:
            if not self.is_lost:
                await self._ask(UNLOCK, key, f"{LOCK_IDLE_SECONDS:g}s" if self._keys else None)
        except psycopg.Error as error:
            log.info("%s ends with its connection: %s", name, message_of(error))
        finally:
            await self._return_connection_if_idle()

    async def _ask(self, query: LiteralString, *values: Any) -> int | None:
        """The first value of a query's first row."""
        if self._connection is None:
            self._connection = await self._stack.enter_async_context(self._pool.connection())
            keeping = asyncio.create_task(self._keep_alive(), name="locks")
            self._stack.push_async_callback(cancel_and_wait, keeping)
        connection = self._connection
        try:
            cursor = connection.cursor(row_factory=scalar_row)
            found: int | None = await (await cursor.execute(query, values)).fetchone()
        except BaseException:
            # Its locks must end, also when this call was canceled.
            if not self.is_lost:
                self.is_lost = True
                await connection.close()
            raise
        return found

    async def _keep_alive(self) -> None:
        """Keep the session from idling while its locks are held."""
        try:
            while not self.is_lost:
                await asyncio.sleep(LOCK_IDLE_SECONDS / 3)
                await self._ask("select 1")
        except psycopg.Error as error:
            log.info("the locks end with their connection: %s", message_of(error))

    async def _return_connection_if_idle(self) -> None:
        if self.is_lost or not self._keys:
            self._connection = None
            await self._stack.aclose()


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncGenerator[WorkerDatabase]:
    """The worker's pool of connections. Raises PoolTimeout if there is no server within 30 s."""
    pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
        conninfo("worker", settings),
        connection_class=bounded_connection("worker"),
        kwargs={"autocommit": True},
        min_size=1,
        max_size=WORKER_CONNECTIONS_MAX,
        timeout=POOL_SECONDS,
        reconnect_timeout=POOL_SECONDS,
        open=False,
    )
    await pool.open(wait=True, timeout=START_SECONDS_MAX)
    async with pool:
        yield WorkerDatabase(pool)
