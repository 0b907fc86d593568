"""Counts of refused requests, which are written together: a flood costs one statement a second."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from typing import Literal

import psycopg

from app.web.batching import Unavailable, describe_error
from app.web.database import DatabasePool
from db.tasks import cancel_and_wait

log = logging.getLogger("surety.refusals")


class RefusalCounter:
    """Counts refusals in memory and adds them to the hourly counts in the database, at most once in an interval.

    A process that is killed loses the counts of its last interval. A lost connection can count an interval twice.
    """

    def __init__(
        self, kind: Literal["denied", "limited", "webhook"], database: DatabasePool, *, interval_seconds: float = 1.0
    ) -> None:
        self._kind = kind
        self._database = database
        self._interval_seconds = interval_seconds
        self._counts: Counter[str] = Counter()
        self._is_failing = False
        self._wanted = asyncio.Event()
        self._writing = asyncio.Lock()
        self._task = asyncio.create_task(self._run())

    def add(self, reason: str) -> None:
        """Count one refusal. An actor may follow the reason after a space."""
        self._counts[reason] += 1
        self._wanted.set()

    async def close(self) -> None:
        """Write the remaining counts, and stop."""
        await cancel_and_wait(self._task)
        await self._write()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            await asyncio.sleep(self._interval_seconds)
            self._wanted.clear()
            # Closing does not cancel a statement that may have been committed: its counts would be written again.
            await asyncio.shield(asyncio.ensure_future(self._write()))

    async def _write(self) -> None:
        async with self._writing:
            await self._write_counts()

    async def _write_counts(self) -> None:
        counts = dict(self._counts)
        if not counts:
            return
        try:
            await self._database.fetch_row("select surety.count_refusals(%s, %s)", self._kind, json.dumps(counts))
        except (psycopg.Error, Unavailable) as error:
            if not self._is_failing:
                text = describe_error(error) if isinstance(error, psycopg.Error) else error
                log.warning("refusals can't be written, and are counted on: %s", text)
            self._is_failing = True
            self._wanted.set()
        else:
            self._is_failing = False
            self._counts.subtract(counts)
            self._counts = +self._counts
