"""Natural batching: requests that wait together share one call of one SQL function, and so one commit.

A lane is a task with a connection of its own. It takes all that waits, up to a bound, and calls the function; what
comes meanwhile forms the next batch. Alone, a request waits for nobody. While a lane works another one joins in only
when as many wait as are being worked on and a batch of them is large enough to be cheap, or when one has waited for
long: lanes that took whatever there is would share it out in small batches, and sixteen cost little more than one.

    in the batch's rows                    a request's own answer
    an error that one request caused       the batch is bisected until that request stands alone: Refused
    a connection lost, a server that       the same batch again on a new connection while patience lasts, then
    restarts, a function replaced          Unavailable: the functions called here may be repeated
    more waiting than the line holds,      Unavailable at once, and nothing was accepted
    or more than we serve for a while
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec
import psycopg
from psycopg import AsyncConnection

log = logging.getLogger("surety.lanes")

Row = tuple[Any, ...]
Connect = Callable[[], Awaitable[AsyncConnection[Row]]]

# What a repetition may cure: lost connections, servers that start or stop, deadlocks, no room, locks held too long, a
# plan or a function that a deploy replaced, a primary that is none any more.
PASSING = ("08", "57P", "40", "53", "55P03", "0A000", "25006")
# What no request has caused: a function missing, rights missing, a cancelled statement, a database that was restored.
OURS = ("42", "3F", "28", "3D", "57014", "SU005")
HELD_UP_SECONDS = 0.025
# From here on a batch's fixed cost is small beside its rows', and lanes side by side win more than sharing out loses.
SHARED_MIN = 32
# How long more requests may be under way than are served without waiting.
BURST_SECONDS = 0.05
# After so long without that, the next burst is a new one.
CALM_SECONDS = 1.0
BACKOFF_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


class Asked(Protocol):
    """A request as its SQL function takes it; `n` is its place in the batch, by which the answer is found."""

    n: int
    request_id: str


class Unavailable(Exception):
    """The request can't be answered now. Whether it took effect is unknown if it was sent; repeating it is safe."""


class Refused(Exception):
    """The database refuses this very request, and nothing foresaw it; `error` says why."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(str(error))
        self.error = error


class Waiting:
    """A request in the line."""

    __slots__ = ("answer", "asked", "since")

    def __init__(self, asked: Asked, answer: asyncio.Future[Row], since: float) -> None:
        self.asked = asked
        self.answer = answer
        self.since = since


class Lanes:
    """The lanes of one SQL function in one process. `statement` takes a batch as JSON and returns rows led by `n`."""

    def __init__(
        self,
        connect: Connect,
        statement: bytes,
        *,
        lanes: int = 2,
        batch_max: int = 200,
        waiting_max: int = 2000,
        standing_max: int = 64,
        patience_seconds: float = 5.0,
    ) -> None:
        self.batch_max = batch_max
        self.waiting_max = waiting_max
        self.standing_max = standing_max
        self.patience_seconds = patience_seconds
        self._connect = connect
        self._statement = statement
        self._line: deque[Waiting] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._at_work = 0
        self._strained_at = self._strained_since = float("-inf")
        self._is_beginning = False
        self._closing = False
        self._lanes = [Lane(self) for _ in range(lanes)]
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Connect all lanes and let them work.

        While the database is away they connect with their first batches: whoever begins then is of use once it is back.
        Raises psycopg.Error where a code tells that no waiting cures it. Of a login that is refused libpq tells none:
        that is found before, by app.web.database.require_deployed.
        """
        self._loop = asyncio.get_running_loop()
        for failure in await asyncio.gather(*(lane.connect() for lane in self._lanes), return_exceptions=True):
            if isinstance(failure, psycopg.Error) and is_passing(failure):
                log.warning("not connected yet: %s", told(failure))
            elif failure is not None:
                raise failure
        self._tasks = [asyncio.create_task(lane.run()) for lane in self._lanes]

    async def close(self) -> None:
        """Refuse what comes, finish what waits, hang up."""
        self._closing = True
        while self._idle:
            self._idle.pop().set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._tasks)
        for lane in self._lanes:
            await lane.hang_up()

    def ask(self, asked: Asked) -> asyncio.Future[Row]:
        """Join the line: the future brings the function's row, Refused or Unavailable. Raises Unavailable at once."""
        if self._closing or self.is_full():
            raise Unavailable
        answer: asyncio.Future[Row] = self._loop.create_future()
        self._line.append(Waiting(asked, answer, self._loop.time()))
        self._look()
        return answer

    def is_full(self) -> bool:
        """Whether one more would have to wait too long.

        A burst may fill the whole line, for it will be served soon. What stands for longer than BURST_SECONDS is more
        than we can serve: a long line would only make everybody wait, so then few may be under way.
        """
        under_way = len(self._line) + self._at_work
        if under_way >= self.standing_max:
            now = self._loop.time()
            if now > self._strained_at + CALM_SECONDS:
                self._strained_since = now
            self._strained_at = now
            if now > self._strained_since + BURST_SECONDS:
                return True
        return len(self._line) >= self.waiting_max

    async def next_batch(self) -> list[Waiting]:
        """All that waits, up to the bound, once that is worth a batch; empty when the line is closed and done."""
        while not self._is_worth_a_batch():
            if self._closing:
                return []
            idle: asyncio.Future[None] = self._loop.create_future()
            self._idle.append(idle)
            self._look()
            try:
                await idle
            finally:
                if idle in self._idle:
                    self._idle.remove(idle)
                else:
                    self._is_beginning = False
        batch = [self._line.popleft() for _ in range(min(len(self._line), self.batch_max))]
        self._at_work += len(batch)
        self._look()
        return batch

    def done(self, batch: Sequence[Waiting]) -> None:
        """Every request of the batch has its answer."""
        self._at_work -= len(batch)

    def _is_worth_a_batch(self) -> bool:
        if not self._line:
            return False
        enough = 0 if self._closing or not self._at_work else min(max(self._at_work, SHARED_MIN), self.batch_max)
        return len(self._line) >= enough or self._loop.time() >= self._line[0].since + HELD_UP_SECONDS

    def _look(self) -> None:
        """Let an idle lane begin, if that is worth it; else look again when the first in line has waited for long."""
        if not self._line or not self._idle or self._is_beginning:
            return
        if self._is_worth_a_batch():
            self._is_beginning = True
            self._idle.pop().set_result(None)
        elif self._timer is None:
            self._timer = self._loop.call_at(self._line[0].since + HELD_UP_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._look()

    async def connection(self) -> AsyncConnection[Row]:
        """A new connection."""
        return await self._connect()

    async def call(self, connection: AsyncConnection[Row], batch: Sequence[Waiting]) -> list[Row]:
        """One call, one commit."""
        for n, waiting in enumerate(batch):
            waiting.asked.n = n
        document = msgspec.json.encode([waiting.asked for waiting in batch]).decode()
        cursor = await connection.execute(self._statement, (document,), prepare=True)
        return await cursor.fetchall()


class Lane:
    """A connection and the task that uses it."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._connection: AsyncConnection[Row] | None = None

    async def connect(self) -> None:
        """Connect, if need be."""
        if self._connection is None:
            self._connection = await self._lanes.connection()

    async def hang_up(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with suppress(psycopg.Error):
                await connection.close()

    async def run(self) -> None:
        """Serve until the line is closed."""
        while batch := await self._lanes.next_batch():
            deadline = batch[0].since + self._lanes.patience_seconds
            try:
                await self._answer(batch, deadline)
            except Exception as error:
                log.exception("a batch failed: %s", ids_of(batch))
                for waiting in batch:
                    fail(waiting, Unavailable(str(error)))
            finally:
                self._lanes.done(batch)

    async def _answer(self, batch: Sequence[Waiting], deadline: float) -> None:
        try:
            rows = await self._call(batch, deadline)
        except psycopg.Error as error:
            await self._divide(batch, deadline, error)
            return
        for row in rows:
            answer = batch[row[0]].answer
            if not answer.done():
                answer.set_result(row)

    async def _call(self, batch: Sequence[Waiting], deadline: float) -> list[Row]:
        """The batch's rows; raises what no repetition cured."""
        attempt = 0
        while True:
            try:
                await self.connect()
                assert self._connection is not None
                return await self._lanes.call(self._connection, batch)
            except psycopg.Error as error:
                if not is_passing(error):
                    raise
                log.warning("%s; once more: %s", told(error), ids_of(batch))
                await self.hang_up()
                pause = BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)] * random.uniform(0.5, 1.5)
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
                attempt += 1
                await asyncio.sleep(pause)

    async def _divide(self, batch: Sequence[Waiting], deadline: float, error: psycopg.Error) -> None:
        if is_passing(error) or is_ours(error):
            log.error("%s; given up: %s", told(error), ids_of(batch))
            for waiting in batch:
                fail(waiting, Unavailable(told(error)))
        elif len(batch) == 1:
            log.error("%s: %s", told(error), ids_of(batch))
            fail(batch[0], Refused(error))
        else:
            log.warning("%s; divided: %s", told(error), ids_of(batch))
            middle = len(batch) // 2
            await self._answer(batch[:middle], deadline)
            await self._answer(batch[middle:], deadline)


def is_passing(error: psycopg.Error) -> bool:
    """Whether a repetition, on a new connection, may succeed."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(PASSING)


def is_ours(error: psycopg.Error) -> bool:
    """Whether no request can have caused this, so that dividing the batch would not help."""
    return error.sqlstate is not None and error.sqlstate.startswith(OURS)


def fail(waiting: Waiting, error: Exception) -> None:
    """Give a request its error, unless it has its answer."""
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def told(error: psycopg.Error) -> str:
    """An error in one line, without the values that a server's detail may carry."""
    message = error.diag.message_primary or str(error)
    return f"{error.sqlstate or 'connection'} {message.strip().splitlines()[0] if message.strip() else ''}"


def ids_of(batch: Sequence[Waiting]) -> str:
    """The request ids of a batch."""
    return " ".join(waiting.asked.request_id for waiting in batch)


class Kicker:
    """Wakes workers after commits: at once when none was woken lately, else a little later, never twice at a time.

    A kick that fails loses nothing, for the workers' tick finds the work a second later.
    """

    def __init__(self, kick: Callable[[], Awaitable[object]], *, every_seconds: float = 0.05) -> None:
        self._kick = kick
        self._every_seconds = every_seconds
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def kick(self) -> None:
        """Ask for a kick and go on."""
        self._wanted.set()

    async def close(self) -> None:
        """Stop."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._kick()
            except (psycopg.Error, Unavailable) as error:
                log.warning("kick failed: %s", told(error) if isinstance(error, psycopg.Error) else error)
            await asyncio.sleep(self._every_seconds)
