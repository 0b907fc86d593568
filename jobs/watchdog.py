"""The watchdog ends a hanging worker process, so that its supervisor starts another.

Its thread checks that the event loop turns and that the database answers this process. If the database does not answer,
the process ends only if a new connection gets an answer: then the fault is in the process, not in the database.
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
    """Ends the process when `loop_turned` or `database_answered` is not called, although the database is up."""

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
        """Stop watching: the process is shutting down."""
        self._ended.set()

    def loop_turned(self) -> None:
        """The event loop has turned."""
        self.loop_turns += 1

    def database_answered(self) -> None:
        """The database has answered this process."""
        self.database_answers += 1

    def _watch(self) -> None:
        try:
            self._check_again_and_again()
        except BaseException:
            log.critical("the watchdog failed, and nothing would notice a stall", exc_info=True)
            os._exit(EXIT_STALLED)

    def _check_again_and_again(self) -> None:
        # Checks are counted instead of time, because a machine that slept would find every deadline missed.
        turns, still, answers, unanswered = -1, 0, -1, 0
        while not self._ended.wait(self._patience_seconds / CHECKS_PER_STALL):
            turns, still = (turns, still + 1) if turns == self.loop_turns else (self.loop_turns, 0)
            if still >= CHECKS_PER_STALL:
                self._end("its event loop has not turned", 1)
            if answers != self.database_answers:
                answers, unanswered = self.database_answers, 0
            else:
                unanswered += 1
                # If a new connection is not answered either, the count starts again.
                if unanswered > CHECKS_PER_STALL and not self._database_is_up():
                    unanswered = 0
            if unanswered >= 3 * CHECKS_PER_STALL:
                self._end("the database answers new connections, but not this process", 3)

    def _database_is_up(self) -> bool:
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
