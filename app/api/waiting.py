"""Requests that wait for an event, as `Prefer: wait=N` asks: held without a thread or a database connection each.

One task asks the database for all waiting requests of the process at once, in one statement every LOOK_SECONDS, only
while there are any. No process that changes a payment notifies another, because that would cost each payment a lock at
its commit.

    what it waits for happened      "changed"
    its seconds are over            "over"
    the server stops                "stopped": it is answered at once
    the database can't be asked     "failed": it is answered at once, a read by 503
    its client leaves               "left"
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import psycopg

from app.bounded_http import connection_of
from app.connection_limits import ConnectionLimits
from app.web.batching import DatabaseAway, Unavailable
from app.web.database import DatabasePool
from db.errors import error_text
from db.tasks import cancel_and_wait

log = logging.getLogger("surety.waiting")

LOOK_SECONDS = 0.1
# The database is asked for a fifth of the time at most, however many requests wait.
PAUSE_FACTOR = 4
PAUSE_SECONDS_MAX = 5.0
LOG_SECONDS = 10.0
OF_ONE_KEY_MAX = 1000
# Many waits may end at once; other reads are not delayed by their documents.
FETCHES_AT_ONCE = 2
# Each fetch from a database that is away takes seconds; those that wait for their turn do not try.
AWAY_SECONDS = 3.0

FIND_ENDED_WAITS = (
    "select payments, cancellations, refunds, readers, secret_requests"
    " from api.find_ended_waits(%s, %s, %s, %s, %s::integer[], %s, %s)"
)

AwaitedKind = Literal["payments", "cancellations", "refunds"]
AnyKind = AwaitedKind | Literal["secret_requests"]
Outcome = Literal["changed", "over", "stopped", "failed", "left"]


class AwaitedObject(NamedTuple):
    """A payment that is to leave `pending`, one whose cancellation is to be decided, a refund to leave `pending`, or a
    request for a client secret that is to be answered.
    """

    kind: AnyKind
    id: str


class ReaderPosition(NamedTuple):
    """A reader of a merchant's events, as api.read_position returns it: an event after it is awaited."""

    merchant_id: str
    generation: int
    seen: str


Awaited = AwaitedObject | ReaderPosition


class Waiter:
    """A held request."""

    __slots__ = ("_ended", "_outcome", "_waiting")

    def __init__(self, waiting: WaitingRequests) -> None:
        self._waiting = waiting
        self._ended: Outcome | None = None
        self._outcome: asyncio.Future[Outcome] | None = None

    async def wait(self, awaited: Awaited, until: float) -> Outcome:
        """Wait until it happens, at most until this time of the event loop."""
        if self._ended is not None:
            return self._ended
        loop = asyncio.get_running_loop()
        self._outcome = loop.create_future()
        timer = loop.call_at(until, self.end, "over")
        self._waiting.add(awaited, self)
        try:
            return await self._outcome
        finally:
            timer.cancel()
            self._waiting.remove(awaited, self)

    def end(self, outcome: Outcome) -> None:
        """End the current wait, unless it has ended."""
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    def end_with_connection(self, is_lost: bool) -> None:
        """End this wait and all later ones: the client leaves or the server stops."""
        self._ended = "left" if is_lost else "stopped"
        self.end(self._ended)


class WaitingRequests:
    """The waiting requests of a process, and the task that asks for them.

    `requests_max` bounds them; by default as many as the process may open files for, beside its other connections.
    """

    def __init__(self, reading: DatabasePool, *, requests_max: int | None = None) -> None:
        self._reading = reading
        self._requests_max = files_to_spare() if requests_max is None else requests_max
        self._waiters: defaultdict[Awaited, set[Waiter]] = defaultdict(set)
        self._admitted: Counter[bytes] = Counter()
        self._wanted = asyncio.Event()
        self._fetches = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._away_until = float("-inf")
        self._admitted_count = 0
        self._logged_at = float("-inf")
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. The server has answered all requests by then."""
        await cancel_and_wait(self._task)

    @contextmanager
    def admit(self, receive: object, key_hash: bytes) -> Generator[Waiter | None]:
        """Hold a request of a key that the database has accepted; None if there is no room, or the server stops.

        The request's connection is not counted as a busy one until the end of the block.
        """
        connection = connection_of(receive)
        if (
            connection is None
            or self._admitted_count >= self._requests_max
            or self._admitted[key_hash] >= OF_ONE_KEY_MAX
        ):
            yield None
            return
        waiter = Waiter(self)
        if not connection.hold(waiter.end_with_connection):
            yield None
            return
        self._admitted_count += 1
        self._admitted[key_hash] += 1
        try:
            yield waiter
        finally:
            connection.release()
            self._admitted_count -= 1
            self._admitted[key_hash] -= 1
            if not self._admitted[key_hash]:
                del self._admitted[key_hash]

    async def fetch(self, fetch: Callable[[], Awaitable[str]]) -> str:
        """The document after a wait. Raises what `fetch` raises, at once while the database is away."""
        loop = asyncio.get_running_loop()
        async with self._fetches:
            if loop.time() < self._away_until:
                raise DatabaseAway("the database was away a moment ago")
            try:
                return await fetch()
            except DatabaseAway:
                self._away_until = loop.time() + AWAY_SECONDS
                raise

    def add(self, awaited: Awaited, waiter: Waiter) -> None:
        """Ask the database for this from now on."""
        self._waiters[awaited].add(waiter)
        self._wanted.set()

    def remove(self, awaited: Awaited, waiter: Waiter) -> None:
        """Ask no more, unless another request waits for the same."""
        self._waiters[awaited].discard(waiter)
        if not self._waiters[awaited]:
            del self._waiters[awaited]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            if not self._waiters:
                self._wanted.clear()
                continue
            started = loop.time()
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001  the task goes on: later requests wait again
                self._end_after(error)
            pause = PAUSE_FACTOR * (loop.time() - started)
            await asyncio.sleep(min(max(LOOK_SECONDS, pause), PAUSE_SECONDS_MAX))

    async def _look(self) -> None:
        """Ask the database for all waiting requests, and end the waits whose event has happened."""
        objects: dict[AnyKind, list[str]] = {"payments": [], "cancellations": [], "refunds": []}
        secrets: list[str] = []
        readers: list[ReaderPosition] = []
        for awaited in self._waiters:
            if isinstance(awaited, ReaderPosition):
                readers.append(awaited)
            elif awaited.kind == "secret_requests":
                secrets.append(awaited.id)
            else:
                objects[awaited.kind].append(awaited.id)
        row = await self._reading.fetch_row(
            FIND_ENDED_WAITS,
            *objects.values(),
            [reader.merchant_id for reader in readers],
            [reader.generation for reader in readers],
            [reader.seen for reader in readers],
            secrets,
        )
        assert row is not None
        payments, cancellations, refunds, places, answered = row
        happened: list[Awaited] = [AwaitedObject("payments", one) for one in payments]
        happened += [AwaitedObject("cancellations", one) for one in cancellations]
        happened += [AwaitedObject("refunds", one) for one in refunds]
        happened += [AwaitedObject("secret_requests", one) for one in answered]
        happened += [readers[place - 1] for place in places]
        for awaited in happened:
            for waiter in self._waiters.get(awaited, ()):
                waiter.end("changed")

    def _end_after(self, error: Exception) -> None:
        """End all waits, unless the database is only busy: then it is asked again."""
        if isinstance(error, Unavailable) and not isinstance(error, DatabaseAway):
            return
        now = asyncio.get_running_loop().time()
        if now > self._logged_at + LOG_SECONDS:
            self._logged_at = now
            expected = isinstance(error, psycopg.Error | DatabaseAway)
            log.warning(
                "%d waiting requests are answered at once: %s",
                sum(map(len, self._waiters.values())), error_text(error), exc_info=None if expected else error,
            )  # fmt: skip
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.end("failed")


def files_to_spare() -> int:
    """How many requests may be held: fewer than the bound if the process may not open a file for each."""
    limits = ConnectionLimits()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = limits.held if files == resource.RLIM_INFINITY else files - 3 * limits.connections
    return max(0, min(spare, limits.held))
