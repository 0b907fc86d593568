"""Limits of an HTTP connection, its refusals, and the watch over all connections of a process.

The sandbox and the services share them, so this module imports nothing of either.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

from uvicorn.server import ServerState

log = logging.getLogger("surety.http")

LOG_SECONDS = 10.0


class ConnectionLimits(NamedTuple):
    """The bounds of one process. A proxy in front must close idle connections before the keep-alive time."""

    connections: int = 1000
    held: int = 5000
    """Requests of known clients that wait for an event, beside `connections`."""
    head_bytes: int = 16 * 1024
    target_bytes: int = 8 * 1024
    """Path and query, part of the head."""
    head_fields: int = 100
    body_bytes: int = 8 * 1024 * 1024
    """With its chunks' framing; endpoints have lower limits."""
    unread_bytes: int = 128 * 1024
    """Of a body that arrives after the response."""
    pipelined: int = 8
    """Requests sent before the response to an earlier one."""
    discarded_bytes: int = 16 * 1024 * 1024
    discard_pause_seconds: float = 0.05
    """Between two parts of a discarded request."""
    head_seconds: float = 10.0
    body_seconds: float = 10.0
    write_seconds: float = 30.0
    close_seconds: float = 2.0
    check_seconds: float = 0.5
    """The time between two checks of the deadlines."""


class Refusal(Exception):
    """A request exceeds a bound or is not HTTP. `name` is its kind, `field` the header that breaks a rule."""

    def __init__(self, status: int, name: str, detail: str, *, limit: int | None = None, field: str = "") -> None:
        super().__init__(detail)
        self.status = status
        self.name = name
        self.detail = detail
        self.limit = limit
        self.field = field


class RefusalResponse(NamedTuple):
    """The response to a refused request; the connection is closed after it."""

    headers: Iterable[tuple[bytes, bytes]]
    body: bytes


class WatchedConnection(Protocol):
    """A connection as the watch sees it."""

    transport: asyncio.Transport
    deadline: float

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request."""

    def check_deadlines(self, now: float) -> None:
        """End what takes too long."""


class ConnectionWatch:
    """The connections of one server: their deadlines, their number, and a log line about refusals."""

    def __init__(self, state: ServerState, loop: asyncio.AbstractEventLoop, limits: ConnectionLimits) -> None:
        self._connections = cast(set[WatchedConnection], state.connections)
        self._loop = loop
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._logged_at = -math.inf
        self.refusals: Counter[str] = Counter()
        self.held = 0

    @property
    def counted(self) -> int:
        """How many connections count towards the bound: those of held requests have one of their own."""
        return len(self._connections) - self.held

    def make_room(self, newest: WatchedConnection) -> bool:
        """Whether one more connection may stay. Above the bound, the longest idle ones are closed for it."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._limits.check_seconds, self._check)
        if self.counted > self._limits.connections:
            idle = [one for one in self._connections if one.is_idle and one is not newest]
            idle.sort(key=attrgetter("deadline"))
            # Several at once, because the search costs more than the closing.
            for one in idle[: 1 + self._limits.connections // 50]:
                one.transport.abort()
            return bool(idle)
        return True

    def _check(self) -> None:
        now = self._loop.time()
        for connection in list(self._connections):
            connection.check_deadlines(now)
        if self.refusals and now > self._logged_at + LOG_SECONDS:
            log.warning("refused: %s", ", ".join(f"{count} {name}" for name, count in sorted(self.refusals.items())))
            self.refusals.clear()
            self._logged_at = now
        waits = bool(self._connections or self.refusals)
        self._timer = self._loop.call_later(self._limits.check_seconds, self._check) if waits else None


WATCHES: WeakKeyDictionary[ServerState, ConnectionWatch] = WeakKeyDictionary()
