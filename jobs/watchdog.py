"""A worker that has stopped working ends, so that whoever supervises it starts another.

A thread of its own sees whether the event loop still turns and whether the database still hears of this process. A
database that nobody reaches is no reason to end; one that answers everybody else is.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading

import psycopg

log = logging.getLogger("surety.watchdog")

CHECKS_PER_STALL = 10
EXIT_STALLED = 70
"""The exit status (EX_SOFTWARE) of a worker that ended itself."""


class Watchdog:
    """Ends the process when `loop_turned` or `database_answered` stays away while others are served."""

    def __init__(self, conninfo: str, patience_seconds: float) -> None:
        self.loop_turns = 0
        self.database_answers = 0
        self._conninfo = conninfo
        self._patience_seconds = patience_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """The process ends in good order: watch no more."""
        self._ended.set()

    def loop_turned(self) -> None:
        """The event loop has turned."""
        self.loop_turns += 1

    def database_answered(self) -> None:
        """The database has heard of us."""
        self.database_answers += 1

    def _watch(self) -> None:
        # Checks are counted, not time: a machine that slept finds everything late, and nothing wrong.
        turns, still, hearings, unheard = -1, 0, -1, 0
        while not self._ended.wait(self._patience_seconds / CHECKS_PER_STALL):
            turns, still = (turns, still + 1) if turns == self.loop_turns else (self.loop_turns, 0)
            if still >= CHECKS_PER_STALL:
                self._end("its event loop has not turned", 1)
            if hearings != self.database_answers:
                hearings, unheard = self.database_answers, 0
            else:
                unheard += 1
                # Whoever has waited for long looks whether it is alone with that; if not, it begins anew.
                if unheard > CHECKS_PER_STALL and not self._others_are_served():
                    unheard = 0
            if unheard >= 3 * CHECKS_PER_STALL:
                self._end("the database serves others, and has not heard of it", 3)

    def _others_are_served(self) -> bool:
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                connection.execute("select 1")
        except psycopg.Error:
            return False
        return True

    def _end(self, reason: str, times: int) -> None:
        seconds = times * self._patience_seconds
        log.critical("this worker ends with status %s, to be replaced: %s for %g s", EXIT_STALLED, reason, seconds)
        faulthandler.dump_traceback()
        os._exit(EXIT_STALLED)
