"""The mode of the provider's key and of the database. A worker runs only while both are live, or both are test.

The database's mode can change until the first merchant, and the dump of another database may be restored beneath a
running worker. So it is compared at the start, and then again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Generator

import psycopg

from db.errors import SettingsError, message_of
from db.settings import Settings
from jobs.database import WorkerDatabase

log = logging.getLogger("surety.worker")

COMPARE_SECONDS_MAX = 60.0


async def require_same_mode(settings: Settings, database: WorkerDatabase) -> None:
    """Raises SettingsError if the key has another mode than the database. One that is being restored has none yet."""
    livemode = await database.value("select surety.read_livemode()")
    if livemode is not None:
        settings.provider.require_mode(livemode)


class ModeWatch:
    """Compares the modes once a minute, or with each poll if that is more often; `mismatch` is what it found."""

    def __init__(self, settings: Settings, database: WorkerDatabase) -> None:
        self.mismatch: SettingsError | None = None
        self._settings = settings
        self._database = database

    @contextlib.contextmanager
    def stop_on_other_mode(self, stopping: asyncio.Event, running: asyncio.Task[None]) -> Generator[None]:
        """Stop the worker, as a signal does, once the modes differ: no new call is made, sent calls are finished."""
        watching = asyncio.create_task(self._watch(stopping, running))
        try:
            yield
        finally:
            watching.cancel()

    async def _watch(self, stopping: asyncio.Event, running: asyncio.Task[None]) -> None:
        while self.mismatch is None:
            await asyncio.sleep(min(COMPARE_SECONDS_MAX, self._settings.surety_poll_seconds))
            try:
                await require_same_mode(self._settings, self._database)
            except SettingsError as error:
                log.critical("this worker ends: %s", error)
                self.mismatch = error
            except psycopg.Error as error:
                log.warning("the mode of the database can't be read: %s", message_of(error))
        stopping.set()
        running.cancel()
