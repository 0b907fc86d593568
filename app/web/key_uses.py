"""When keys were last used: noted in memory, and written together for all keys of a process."""

from __future__ import annotations

import asyncio
import logging
import time

import psycopg

from app.web.batching import Unavailable
from app.web.database import DatabasePool
from db.errors import error_text
from db.tasks import cancel_and_wait

log = logging.getLogger("surety.key_uses")

NOTED_KEYS_MAX = 4096


class KeyUses:
    """Writes the last use of each key at most once in `interval_seconds`; a request waits for no write.

    Only keys that the database knows may be noted. A process that is killed, or a write that fails, loses the uses of
    one interval.
    """

    def __init__(self, database: DatabasePool, *, interval_seconds: float = 60.0, gather_seconds: float = 1.0) -> None:
        self._database = database
        self._interval_seconds = interval_seconds
        self._gather_seconds = gather_seconds
        self._noted_at: dict[bytes, float] = {}
        self._unwritten: set[bytes] = set()
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def note(self, key_hash: bytes) -> None:
        """Note that a key is used now."""
        now = time.monotonic()
        if now - self._noted_at.get(key_hash, float("-inf")) < self._interval_seconds:
            return
        if len(self._noted_at) >= NOTED_KEYS_MAX:
            self._noted_at.clear()
        self._noted_at[key_hash] = now
        self._unwritten.add(key_hash)
        self._wanted.set()

    async def close(self) -> None:
        """Write what was noted, and stop."""
        await cancel_and_wait(self._task)
        await self._write()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            await asyncio.sleep(self._gather_seconds)
            self._wanted.clear()
            await self._write()

    async def _write(self) -> None:
        key_hashes, self._unwritten = sorted(self._unwritten), set()
        if not key_hashes:
            return
        try:
            await self._database.fetch_row("select api.note_key_uses(%s)", key_hashes)
        except (psycopg.Error, Unavailable) as error:
            log.warning("the last use of keys can't be written: %s", error_text(error))
