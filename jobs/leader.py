"""The leader: the one worker that runs the periodic jobs and schedules handlers, until it stops or dies.

A lock of its session makes a worker the leader. The others try to take the lock every second, so a killed leader is
replaced within seconds. The leader's turn, every second, is one statement on that session: it schedules the handlers
that have due work, and shows that the leader still leads. If it fails for want of the session, the running jobs are
canceled, because the next leader starts them again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import psycopg

from db.errors import is_unreachable, message_of
from db.tasks import cancel_and_wait
from jobs.database import LeaderSession
from jobs.periodic import PERIODIC_JOBS, SCHEDULING, PeriodicJob, interval_seconds, run_and_record
from jobs.worker import Worker

log = logging.getLogger("surety.leader")

LOCK = "periodic_jobs"
TURN_SECONDS = 1.0
# surety.record_periodic_job writes no further success within this time.
RECORD_SECONDS = 10.0
STOP_SECONDS_MAX = 30.0


async def run_periodic_jobs(worker: Worker) -> None:
    """Lead, or try to lead, until the worker stops."""
    while not worker.stopping.is_set():
        try:
            async with worker.database.try_lead(LOCK) as session:
                if session is not None:
                    log.info("worker %s runs the periodic jobs", worker.name)
                    await Leader(worker, session).lead()
        except psycopg.Error as error:
            log.log(
                logging.INFO if is_unreachable(error) else logging.WARNING,
                "worker %s does not run the periodic jobs: %s", worker.name, message_of(error),
            )  # fmt: skip
        except Exception:  # Without this loop, no worker might run the periodic jobs.
            log.exception("the periodic jobs failed; they are started again")
        await pause_for_turn(worker)


async def pause_for_turn(worker: Worker) -> None:
    """Wait for the next turn, or until the worker stops."""
    with suppress(TimeoutError):
        async with asyncio.timeout(TURN_SECONDS):
            await worker.stopping.wait()


class Leader:
    """The running periodic jobs, and when each starts next."""

    def __init__(self, worker: Worker, session: LeaderSession) -> None:
        self._worker = worker
        self._session = session
        self._running: dict[str, asyncio.Task[None]] = {}
        self._next_start: dict[str, int] = {}
        self._recorded_at: dict[str, float] = {}
        """When each job's last success was recorded, on the monotonic clock; absent after a failure."""
        self._idle_mark: str | None = None

    async def lead(self) -> None:
        """Take turns until the worker stops; then the running jobs have time to end. Raises if the session is lost."""
        began = time.monotonic()
        try:
            while not self._worker.stopping.is_set():
                self._start_due(int((time.monotonic() - began) / TURN_SECONDS))
                await self._schedule_handlers()
                await pause_for_turn(self._worker)
            if self._running:
                await asyncio.wait(self._running.values(), timeout=STOP_SECONDS_MAX)
        finally:
            await cancel_and_wait(*self._running.values())

    def _start_due(self, turn: int) -> None:
        """Start the jobs that are due, unless their last run still goes on."""
        for name, job in PERIODIC_JOBS.items():
            if turn >= self._next_start.get(name, 0) and name not in self._running:
                self._next_start[name] = turn + interval_seconds(name, self._worker.settings)
                self._start(name, job)

    async def _schedule_handlers(self) -> None:
        """Schedule the handlers that have due work: missed notifications, retries, batches of dead workers."""
        failure: psycopg.Error | None = None
        try:
            query = "select outbox.schedule_work_since(%s)"
            self._idle_mark = await self._session.value(query, self._idle_mark)
        except psycopg.Error as error:
            if self._session.is_lost:
                raise
            self._idle_mark, failure = None, error

        async def report(_worker: Worker) -> None:
            if failure is not None:
                raise failure

        # Recorded beside the turns: while the database is away, a record waits.
        if (failure is not None or not self._is_recorded(SCHEDULING)) and SCHEDULING not in self._running:
            self._start(SCHEDULING, report)

    def _start(self, name: str, job: PeriodicJob) -> None:
        task = asyncio.create_task(self._run(name, job), name=name)
        self._running[name] = task
        task.add_done_callback(lambda _: self._running.pop(name))

    async def _run(self, name: str, job: PeriodicJob) -> None:
        """Run a job; its end is recorded, a repeated success only once in RECORD_SECONDS."""
        is_recorded = self._is_recorded(name)
        try:
            has_succeeded = await run_and_record(self._worker, name, job, success_is_recorded=is_recorded)
        except Exception:
            log.exception("%s failed", name)
            has_succeeded = False
        if not has_succeeded:
            self._recorded_at.pop(name, None)
        elif not is_recorded:
            self._recorded_at[name] = time.monotonic()

    def _is_recorded(self, name: str) -> bool:
        recorded_at = self._recorded_at.get(name)
        return recorded_at is not None and time.monotonic() - recorded_at < RECORD_SECONDS
