"""Request batching (group commit): requests that wait together share one call of one SQL function, and one commit.

A batching connection is a task with a connection of its own. It takes all queued requests, up to a bound, and calls the
function; requests that arrive meanwhile form the next batch. A request that comes alone does not wait, unless its kind
gathers: then a batch begins after `gather_seconds` without a further request.

A second connection starts while one works in two cases only. Either as many requests wait as are in progress, and
enough of them to make a batch cheap; or the first has waited for QUEUED_SECONDS_MAX. Connections that started at once
would divide the queue into small batches, and a batch of sixteen costs little more than a batch of one.

    the function returns rows              each request gets its row
    an error that one request caused       the batch is bisected until that request is alone: RefusedByDatabase
    a lost connection, a server that       the same batch again on a new connection until retry_seconds_max, then
    restarts, a replaced function          Unavailable; repeating is safe, because requests are idempotent
    a full queue, sustained overload       Unavailable at once; nothing was accepted

Senders are served in turn (app/web/fair_queue.py). Under sustained overload each may have its share of requests under
way, so the one that causes it is refused, and others are not.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec
import psycopg
from psycopg import AsyncConnection

from app.web.fair_queue import FairQueue
from db.errors import is_retryable, kind_of, message_of

log = logging.getLogger("surety.batching")

Row = tuple[Any, ...]
Connect = Callable[[], Awaitable[AsyncConnection[Row]]]

QUERY_CANCELED = "57014"
QUEUED_SECONDS_MAX = 0.025
# From this size on, a batch's fixed cost is small beside its rows' cost, and parallel connections gain more than
# smaller batches lose.
PARALLEL_BATCH_MIN = 32
# A burst may exceed `sustained_max` for so long.
BURST_SECONDS = 0.05
# After so long below `sustained_max`, the next burst is a new one.
OVERLOAD_RESET_SECONDS = 1.0
BACKOFF_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


class BatchedRequest(Protocol):
    """A request as its SQL function takes it; `n` is its place in the batch and in the row that answers it."""

    n: int
    request_id: str


class Unavailable(Exception):
    """The request can't be answered now. It may have taken effect if it was sent; repeating it is safe."""


class DatabaseAway(Unavailable):
    """No database answers, or it can't be used: it is no primary, full, not deployed or restored elsewhere."""


def unavailable_by(error: psycopg.Error) -> Unavailable:
    """The reason why a request can't be answered after an error of the database. Timeouts are signs of overload."""
    is_busy = error.sqlstate == QUERY_CANCELED or kind_of(error) == "conflict"
    return (Unavailable if is_busy else DatabaseAway)(describe_error(error))


class RefusedByDatabase(Exception):
    """The database refuses this request with an error that the SQL function does not expect."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(str(error))
        self.error = error


class QueuedRequest:
    """A request in the queue."""

    __slots__ = ("answer", "queued_at", "request", "sender")

    def __init__(
        self, request: BatchedRequest, answer: asyncio.Future[Row], queued_at: float, sender: bytes = b""
    ) -> None:
        self.sender = sender
        self.request = request
        self.answer = answer
        self.queued_at = queued_at


class BatchingConnections:
    """The batching connections of one SQL function in one process.

    `statement` takes a batch as JSON and returns rows whose first column is `n`.
    """

    def __init__(
        self,
        connect: Connect,
        statement: bytes,
        *,
        connections: int = 2,
        gather_seconds: float = 0.0,
        batch_max: int = 200,
        batch_max_of_sender: int | None = None,
        queue_max: int = 2000,
        sustained_max: int = 64,
        retry_seconds_max: float = 5.0,
    ) -> None:
        self.gather_seconds = gather_seconds
        self.batch_max = batch_max
        self.batch_max_of_sender = batch_max_of_sender or batch_max
        self.queue_max = queue_max
        self.sustained_max = sustained_max
        self.retry_seconds_max = retry_seconds_max
        self._connect = connect
        self._statement = statement
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._of_sender: Counter[bytes] = Counter()
        self._idle: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._in_progress = 0
        self._overloaded_at = self._overloaded_since = float("-inf")
        self._is_starting = False
        self._closing = False
        self._connections = [BatchingConnection(self) for _ in range(connections)]
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Connect and start all connections.

        While the database is away they connect with their first batches, so that this process serves once it is back.
        Raises psycopg.Error for an error that waiting does not cure. A refused login has no SQLSTATE and looks like an
        unreachable server; app.web.database.require_deployed reports it before.
        """
        self._loop = asyncio.get_running_loop()
        for failure in await asyncio.gather(
            *(connection.connect() for connection in self._connections), return_exceptions=True
        ):
            if isinstance(failure, psycopg.Error) and is_retryable(failure):
                log.warning("not connected yet: %s", describe_error(failure))
            elif failure is not None:
                raise failure
        self._tasks = [asyncio.create_task(connection.run()) for connection in self._connections]

    async def close(self) -> None:
        """Refuse new requests, finish the queued ones, close the connections."""
        self._closing = True
        while self._idle:
            self._idle.pop().set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._tasks)
        for connection in self._connections:
            await connection.close()

    def submit(self, request: BatchedRequest, sender: bytes = b"") -> asyncio.Future[Row]:
        """Join the queue. The future gets the function's row, RefusedByDatabase or Unavailable.

        Raises Unavailable at once when the queue is full.
        """
        if self._closing or self.is_full(sender):
            raise Unavailable
        answer: asyncio.Future[Row] = self._loop.create_future()
        self._queue.append(sender, QueuedRequest(request, answer, self._loop.time(), sender))
        self._of_sender[sender] += 1
        self._start_idle_connection()
        return answer

    def is_full(self, sender: bytes = b"") -> bool:
        """Whether one more request of a sender would wait too long.

        A burst may fill the whole queue, because it is served soon. A load that lasts longer than BURST_SECONDS is more
        than this process serves. Then `sustained_max` requests may be under way, because a long queue would delay all
        of them, and each sender has a share of that.
        """
        under_way = len(self._queue) + self._in_progress
        if under_way >= self.sustained_max:
            now = self._loop.time()
            if now > self._overloaded_at + OVERLOAD_RESET_SECONDS:
                self._overloaded_since = now
            self._overloaded_at = now
            if now > self._overloaded_since + BURST_SECONDS:
                of_sender = self._of_sender[sender]
                senders = len(self._of_sender) + (not of_sender)
                if senders > self.sustained_max or of_sender >= self.sustained_max // senders:
                    return True
        return len(self._queue) >= self.queue_max

    async def next_batch(self) -> list[QueuedRequest]:
        """All queued requests, up to batch_max, once they are worth a batch; empty once the queue is closed."""
        while not self._is_worth_a_batch():
            if self._closing:
                return []
            idle: asyncio.Future[None] = self._loop.create_future()
            self._idle.append(idle)
            self._start_idle_connection()
            try:
                await idle
            finally:
                if idle in self._idle:
                    self._idle.remove(idle)
                else:
                    self._is_starting = False
        batch = self._queue.take(self.batch_max, self.batch_max_of_sender)
        self._in_progress += len(batch)
        self._start_idle_connection()
        return batch

    def finish_batch(self, batch: Sequence[QueuedRequest]) -> None:
        """Mark the batch as finished: each of its requests has its answer."""
        self._in_progress -= len(batch)
        for queued in batch:
            self._of_sender[queued.sender] -= 1
            if not self._of_sender[queued.sender]:
                del self._of_sender[queued.sender]

    def _is_worth_a_batch(self) -> bool:
        if not self._queue:
            return False
        enough = min(max(self._in_progress, PARALLEL_BATCH_MIN), self.batch_max)
        return self._closing or len(self._queue) >= enough or self._loop.time() >= self._due_at()

    def _due_at(self) -> float:
        """The time from which the queue is worth a batch, whatever its length."""
        overdue_at = self._queue.oldest.queued_at + QUEUED_SECONDS_MAX
        if self._in_progress:
            return overdue_at
        return min(overdue_at, self._queue.newest.queued_at + self.gather_seconds)

    def _start_idle_connection(self) -> None:
        """Start an idle connection if the queue is worth a batch; else check again when it is due."""
        if not self._queue or not self._idle or self._is_starting:
            return
        if self._is_worth_a_batch():
            self._is_starting = True
            self._idle.pop().set_result(None)
        elif self._timer is None or self._due_at() < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = self._due_at()
            self._timer = self._loop.call_at(self._timer_at, self._start_after_wait)

    def _start_after_wait(self) -> None:
        self._timer = None
        self._start_idle_connection()

    async def new_connection(self) -> AsyncConnection[Row]:
        """A new connection."""
        return await self._connect()

    async def execute_batch(self, connection: AsyncConnection[Row], batch: Sequence[QueuedRequest]) -> list[Row]:
        """One call, one commit."""
        for n, queued in enumerate(batch):
            queued.request.n = n
        document = msgspec.json.encode([queued.request for queued in batch]).decode()
        cursor = await connection.execute(self._statement, (document,), prepare=True)
        return await cursor.fetchall()


class BatchingConnection:
    """A connection and the task that uses it."""

    def __init__(self, batching: BatchingConnections) -> None:
        self._batching = batching
        self._connection: AsyncConnection[Row] | None = None

    async def connect(self) -> None:
        """Connect, unless connected."""
        if self._connection is None:
            self._connection = await self._batching.new_connection()

    async def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with suppress(psycopg.Error):
                await connection.close()

    async def run(self) -> None:
        """Serve until the queue is closed."""
        while batch := await self._batching.next_batch():
            deadline = batch[0].queued_at + self._batching.retry_seconds_max
            try:
                await self._answer(batch, deadline)
            except Exception as error:
                log.exception("a batch failed: %s", request_ids_of(batch))
                for queued in batch:
                    set_failure(queued, Unavailable(str(error)))
            finally:
                self._batching.finish_batch(batch)

    async def _answer(self, batch: Sequence[QueuedRequest], deadline: float) -> None:
        try:
            rows = await self._call(batch, deadline)
        except psycopg.Error as error:
            await self._bisect(batch, deadline, error)
            return
        for row in rows:
            answer = batch[row[0]].answer
            if not answer.done():
                answer.set_result(row)

    async def _call(self, batch: Sequence[QueuedRequest], deadline: float) -> list[Row]:
        """The rows of the batch. Raises psycopg.Error when repeating did not help."""
        attempt = 0
        while True:
            try:
                await self.connect()
                assert self._connection is not None
                return await self._batching.execute_batch(self._connection, batch)
            except psycopg.Error as error:
                if not is_retryable(error):
                    raise
                log.warning("%s; once more: %s", describe_error(error), request_ids_of(batch))
                await self.close()
                pause = BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)] * random.uniform(0.5, 1.5)
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
                attempt += 1
                await asyncio.sleep(pause)

    async def _bisect(self, batch: Sequence[QueuedRequest], deadline: float, error: psycopg.Error) -> None:
        if kind_of(error) != "request":
            log.error("%s; given up: %s", describe_error(error), request_ids_of(batch))
            for queued in batch:
                set_failure(queued, unavailable_by(error))
        elif len(batch) == 1:
            log.error("%s: %s", describe_error(error), request_ids_of(batch))
            set_failure(batch[0], RefusedByDatabase(error))
        else:
            log.warning("%s; divided: %s", describe_error(error), request_ids_of(batch))
            middle = len(batch) // 2
            await self._answer(batch[:middle], deadline)
            await self._answer(batch[middle:], deadline)


def set_failure(queued: QueuedRequest, error: Exception) -> None:
    """Give a request its error, unless it has its answer."""
    if not queued.answer.done():
        queued.answer.set_exception(error)


def describe_error(error: psycopg.Error) -> str:
    """An error in one line, without the values that a server's detail may carry."""
    text = message_of(error)
    return f"{error.sqlstate} {text}" if error.sqlstate else f"connection {text.removeprefix('connection ')}"


def request_ids_of(batch: Sequence[QueuedRequest]) -> str:
    """The request ids of a batch."""
    return " ".join(queued.request.request_id for queued in batch)
