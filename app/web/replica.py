"""Reads from a replica, a streaming standby (SURETY_READER_DATABASE_URL). No client sees less than it may expect.

    a read                          the replica has replayed everything that was committed when the request arrived
    a read with Surety-Position     it has replayed that position, the one of an answer to a write, and everything that
                                    was committed POSITION_SECONDS_MAX before

The second bound is for API keys: a key that was revoked on the primary must not be used on a replica for long.

A replica that does not get there in REPLAY_SECONDS_MAX, cancels the read, is away or no standby of this primary does
not answer: the primary does. Then the replica gets no reads until one of the checks, one a second, finds it usable.
Reads under way share one statement on the primary that reads its position.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from app.web.batching import QUERY_CANCELED, Unavailable, unavailable_by
from app.web.database import DatabasePool, Row
from db.connect import bounded_connection, reader_conninfo
from db.errors import error_text, is_unreachable, outdates_connection
from db.replication import (
    PRIMARY_POSITION,
    REPLICA_POSITION,
    REPLICA_PROBLEMS,
    GivenPosition,
    Position,
    ReplicaState,
    judge_replica,
)
from db.settings import Settings
from db.tasks import cancel_and_wait

log = logging.getLogger("surety.replica")

POSITION_HEADER = b"surety-position"
POSITION_SECONDS_MAX = 0.5
# After a write, its answer waits for so long for the position; without it the answer has none.
ANSWER_SECONDS_MAX = 0.25
REPLAY_SECONDS_MAX = 0.1
LOOK_SECONDS = 0.005
CHECK_SECONDS = 1.0
CHECK_SECONDS_MAX = 3.0
CONNECTIONS_MAX = 8
WAITING_MAX = 100
POOL_TIMEOUT_SECONDS = 0.2
LOG_SECONDS = 10.0


class ReplicaUnusable(Exception):
    """The primary has to answer."""

    def __init__(self, state: ReplicaState, reason: str = "") -> None:
        super().__init__(reason or state)
        self.state: ReplicaState = state


class Replica:
    """The replica of a process: its connections, and its last known state."""

    def __init__(self, settings: Settings, address: str) -> None:
        # Until the first check.
        self.state: ReplicaState | None = None
        # One connection of its own: reads that wait for each other must not delay what they need.
        self._primary = DatabasePool("api", settings, connections_max=1)
        self._pool: AsyncConnectionPool[AsyncConnection[Row]] = AsyncConnectionPool(
            address,
            connection_class=bounded_connection("api"),
            kwargs={"autocommit": True},
            min_size=1,
            max_size=CONNECTIONS_MAX,
            max_waiting=WAITING_MAX,
            timeout=POOL_TIMEOUT_SECONDS,
            reconnect_timeout=CHECK_SECONDS_MAX,
            open=False,
        )
        self._in_use = 0
        self._seen: Position | None = None
        self._seen_at = float("-inf")
        self._reading: asyncio.Task[Position] | None = None
        self._next: asyncio.Task[Position] | None = None
        self._logged_at = float("-inf")

    async def open(self) -> None:
        """Begin to connect, and to check."""
        await self._primary.open()
        await self._pool.open()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop checking, and close the connections."""
        await cancel_and_wait(self._task)
        await self._pool.close()
        await self._primary.close()

    async def fetch_row(self, given: GivenPosition | None, query: LiteralString, *values: Any) -> Row | None:
        """The first row of a query; None if there is none, or if the primary has to answer.

        Raises Unavailable if the primary's position can't be read, or the query took too long.
        """
        if self.state != "ok":
            return None
        try:
            return await self._read(await self._required(given), query, values)
        except ReplicaUnusable as error:
            self._note(error.state, error)
        except PoolTimeout as error:
            if self._in_use < CONNECTIONS_MAX:
                self._note("away", error)
        except TooManyRequests:
            pass
        except psycopg.Error as error:
            if error.sqlstate == QUERY_CANCELED:
                raise unavailable_by(error) from None
            if is_unreachable(error):
                self._note("away", error)
        return None

    async def position_after_write(self) -> Position | None:
        """A position that includes every commit before this call; None if it can't be read soon."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await self.read_position()
        except (TimeoutError, Unavailable, psycopg.Error):
            return None

    async def read_position(self) -> Position:
        """The primary's position, by a statement that begins after this call. Raises Unavailable or psycopg.Error.

        Calls that come while a statement is under way share the next one.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._read_after(self._reading))
            # All requests that wait for it may have left.
            self._next.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._next)

    async def _read_after(self, previous: asyncio.Task[Position] | None) -> Position:
        if previous is not None:
            await asyncio.wait({previous})
        self._reading, self._next = self._next, None
        at = asyncio.get_running_loop().time()
        row = await self._primary.fetch_row(PRIMARY_POSITION)
        assert row is not None
        self._seen, self._seen_at = Position(*row), at
        return self._seen

    async def _required(self, given: GivenPosition | None) -> Position:
        """What the replica must have replayed."""
        seen = self._seen
        is_recent = asyncio.get_running_loop().time() < self._seen_at + POSITION_SECONDS_MAX
        if given is None or seen is None or not is_recent or given.timeline != seen.timeline or given.lsn > seen.lsn:
            # This one includes any position that the primary has ever given.
            seen = await self.read_position()
        return seen

    async def _read(self, required: Position, query: LiteralString, values: tuple[Any, ...]) -> Row | None:
        async with self._pool.connection() as connection:
            self._in_use += 1
            try:
                await self._await_replay(connection, required)
                return await (await connection.execute(query, values)).fetchone()
            except psycopg.Error as error:
                if outdates_connection(error):
                    await connection.close()
                raise
            finally:
                self._in_use -= 1

    async def _await_replay(self, connection: AsyncConnection[Row], required: Position) -> None:
        """Wait until this server shows the position to later statements. Raises ReplicaUnusable."""
        loop = asyncio.get_running_loop()
        until = loop.time() + REPLAY_SECONDS_MAX
        while True:
            row = await (await connection.execute(REPLICA_POSITION)).fetchone()
            assert row is not None
            state = judge_replica(required, row)
            if state == "ok":
                return
            if state != "behind":
                # Another connection may reach another server.
                await connection.close()
            if state != "behind" or loop.time() >= until:
                raise ReplicaUnusable(state, f"{required.lsn - row[3]} bytes" if state == "behind" else "")
            await asyncio.sleep(LOOK_SECONDS)

    async def _run(self) -> None:
        while True:
            await self._check()
            await asyncio.sleep(CHECK_SECONDS)

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(CHECK_SECONDS_MAX):
                required = await self.read_position()
        except (TimeoutError, Unavailable):
            return  # Without a primary, nothing can be said of the replica, and no read is possible.
        except psycopg.Error as error:
            self._note("away", error)
            return
        failure: Exception | None = None
        # A server that came back has left a dead connection for each one that was idle.
        for _ in range(CONNECTIONS_MAX + 1):
            try:
                async with asyncio.timeout(CHECK_SECONDS_MAX), self._pool.connection() as connection:
                    await self._await_replay(connection, required)
            except ReplicaUnusable as error:
                self._note(error.state, error)
                return
            except (TimeoutError, PoolTimeout, TooManyRequests) as error:
                if self._in_use < CONNECTIONS_MAX:
                    self._note("away", failure or error)
                return
            except psycopg.Error as error:
                failure = error
            else:
                self._note("ok")
                return
        self._note("away", failure)

    def _note(self, state: ReplicaState, reason: Exception | None = None) -> None:
        """Keep the state, and log a change. A replica that is sometimes behind has a line every LOG_SECONDS."""
        before, self.state = self.state, state
        if state == before:
            return
        now = asyncio.get_running_loop().time()
        if "behind" in {state, before} and {state, before} <= {"ok", "behind"}:
            if now < self._logged_at + LOG_SECONDS:
                return
            self._logged_at = now
        if state == "ok":
            log.info("reads use the replica")
        else:
            text = f" ({error_text(reason)})" if reason else ""
            log.warning("reads go to the primary: the replica %s%s", REPLICA_PROBLEMS[state], text)


def replica_of(settings: Settings) -> Replica | None:
    """The replica that the settings name; None if they name none."""
    address = reader_conninfo(settings)
    return None if address is None else Replica(settings, address)
