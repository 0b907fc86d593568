"""Workers scheduled after commits, at most once in an interval."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import psycopg

from app.web.batching import Unavailable, describe_error
from db.tasks import cancel_and_wait

log = logging.getLogger("surety.worker_scheduler")


class WorkerScheduler:
    """Schedules workers after commits: at once if the last call is `interval_seconds` ago, else then; one at a time.

    A call that fails loses nothing, because the workers look for due events every second.
    """

    def __init__(self, schedule_workers: Callable[[], Awaitable[object]], *, interval_seconds: float = 0.05) -> None:
        self._schedule = schedule_workers
        self._interval_seconds = interval_seconds
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def schedule(self) -> None:
        """Request a run of the workers and return at once."""
        self._wanted.set()

    async def close(self) -> None:
        """Stop."""
        await cancel_and_wait(self._task)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._schedule()
            except (psycopg.Error, Unavailable) as error:
                log.warning(
                    "scheduling workers failed: %s",
                    describe_error(error) if isinstance(error, psycopg.Error) else error,
                )
            await asyncio.sleep(self._interval_seconds)
