"""Whether a worker may call the provider from its database: the key has the database's mode, and the database is open.

The database's mode can change until the first merchant, and another database may be restored beneath a running worker.
So both are compared at the start, and then again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Generator

import psycopg

from db.errors import DatabaseClosed, SettingsError, message_of
from db.settings import Settings
from jobs.database import WorkerDatabase

log = logging.getLogger("surety.worker")

COMPARE_SECONDS_MAX = 60.0


async def require_open_database(settings: Settings, database: WorkerDatabase) -> None:
    """Raises SettingsError if the key has another mode than the database. One that is being restored has none yet.

    Raises DatabaseClosed for a restored database whose operator has not said yet whether it does business, and for a
    copy of a drill unless the provider is a sandbox.
    """
    livemode = await database.value("select surety.read_livemode()")
    if livemode is not None:
        settings.provider.require_mode(livemode)
    refusal = await database.value("select outbox.provider_refusal(%s)", settings.provider.url is not None)
    if refusal is not None:
        raise DatabaseClosed(refusal)


class ModeWatch:
    """Looks once a minute, or with each poll if that is more often; `mismatch` is what it found."""

    def __init__(self, settings: Settings, database: WorkerDatabase) -> None:
        self.mismatch: SettingsError | DatabaseClosed | None = None
        self._settings = settings
        self._database = database

    @contextlib.contextmanager
    def stop_on_mismatch(self, stopping: asyncio.Event, running: asyncio.Task[None]) -> Generator[None]:
        """Stop the worker, as a signal does, once it may not call: no new call is made, sent calls are finished."""
        watching = asyncio.create_task(self._watch(stopping, running))
        try:
            yield
        finally:
            watching.cancel()

    async def _watch(self, stopping: asyncio.Event, running: asyncio.Task[None]) -> None:
        while self.mismatch is None:
            await asyncio.sleep(min(COMPARE_SECONDS_MAX, self._settings.surety_poll_seconds))
            try:
                await require_open_database(self._settings, self._database)
            except (SettingsError, DatabaseClosed) as error:
                log.critical("this worker ends: %s", error)
                self.mismatch = error
            except psycopg.Error as error:
                log.warning("whether the database is open can't be read: %s", message_of(error))
        stopping.set()
        running.cancel()
