"""The results of a worker's calls, recorded in groups: one transaction for results of all batches and polls.

A result that comes alone is recorded at once. After it, results gather for GATHER_SECONDS: under load a transaction
then holds many, and costs each of them a fraction of what it would cost alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from msgspec import Struct
from psycopg.types.json import Jsonb

from db.errors import error_text, is_retryable
from jobs.database import WorkerDatabase, bisect_on_error

log = logging.getLogger("surety.recorder")

GATHER_SECONDS = 0.1
# A transaction holds locks on the payments of all its results.
RESULTS_MAX = 300
# At the end of a worker the database may be away.
FINISH_SECONDS_MAX = 5.0

CallResult = dict[str, Any]
"""As surety.record_results takes it."""


class RecordedResults(Struct):
    """The row of surety.record_results."""

    lost_batches: list[int]
    event_types: list[str]


class WaitingResults(Struct):
    """Results that wait for the next transaction; `lost_batches` is known when it has committed."""

    results: list[CallResult]
    lost_batches: asyncio.Future[list[int]]
    error: Exception | None = None
    """Why one of the results is not recorded at all."""


class ResultRecorder:
    """Records results, and schedules the handlers of the events that they make."""

    def __init__(
        self,
        database: WorkerDatabase,
        actor: str,
        schedule_handlers_for: Callable[[list[str]], Awaitable[None]],
    ) -> None:
        self._database = database
        self._actor = actor
        self._schedule_handlers_for = schedule_handlers_for
        self._waiting: list[WaitingResults] = []
        self._recording: asyncio.Task[None] | None = None
        self._begun_at = -GATHER_SECONDS

    async def record(self, results: list[CallResult]) -> list[int]:
        """Record results; returns the batches that another worker holds, once all is committed.

        Raises the database's error if it persists. A caller that is canceled loses nothing: the results are recorded.
        """
        waiting = WaitingResults(results, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._recording is None or self._recording.done():
            self._recording = asyncio.create_task(self._record_waiting(), name="results")
        return await waiting.lost_batches

    async def finish(self) -> None:
        """Wait until all results are recorded, at most FINISH_SECONDS_MAX. Their callers may be canceled by now."""
        if self._recording is not None:
            await asyncio.wait({self._recording}, timeout=FINISH_SECONDS_MAX)

    async def _record_waiting(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._waiting:
            await asyncio.sleep(self._begun_at + GATHER_SECONDS - clock())
            self._begun_at = clock()
            group = self._next_group()
            recording = asyncio.create_task(self._record_group(group))
            try:
                await asyncio.wait({recording})
                for waiting in group:
                    error = recording.exception() or waiting.error
                    if waiting.lost_batches.done():  # Its caller was canceled.
                        continue
                    if error is None:
                        waiting.lost_batches.set_result(recording.result())
                    else:
                        waiting.lost_batches.set_exception(error)
            finally:
                recording.cancel()
                for waiting in group:
                    waiting.lost_batches.cancel()

    def _next_group(self) -> list[WaitingResults]:
        """Take those that waited longest, up to RESULTS_MAX results, at least one."""
        taken, size = 0, 0
        for waiting in self._waiting:
            size += len(waiting.results)
            if taken and size > RESULTS_MAX:
                break
            taken += 1
        group, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return group

    async def _record_group(self, group: list[WaitingResults]) -> list[int]:
        """Record refusals and facts in transactions of their own. A result that can't be recorded is substituted.

        If that fails as well, it is the error of that result's caller alone.
        """
        lost: list[int] = []
        event_types: set[str] = set()
        callers = {id(result): waiting for waiting in group for result in waiting.results}

        async def write(results: list[CallResult]) -> None:
            [recorded] = await self._database.rows(
                RecordedResults, "select lost_batches, event_types from surety.record_results(%s, %s)",
                self._actor, Jsonb(results),
            )  # fmt: skip
            lost.extend(recorded.lost_batches)
            event_types.update(recorded.event_types)

        async def give_up(result: CallResult, error: Exception) -> None:
            about = " ".join(str(result[name]) for name in ("event_id", "payment_id") if name in result) or "a row"
            log.error("the result of %s can't be recorded", about, exc_info=error)
            try:
                await write([unrecordable_result(result, error)])
            except Exception as failure:
                if is_retryable(failure):
                    raise
                callers[id(result)].error = failure

        results = [result for waiting in group for result in waiting.results]
        refusals = [result for result in results if "refused" in result]
        others = [result for result in results if "refused" not in result]
        for part in (refusals, others):
            if part:
                await bisect_on_error(part, write, give_up)
        try:
            await self._schedule_handlers_for(sorted(event_types))
        except psycopg.Error as error:
            # All is recorded. A periodic job schedules handlers with due work as well.
            log.warning("handlers are not scheduled at once: %s", error_text(error))
        return lost


def unrecordable_result(result: CallResult, error: Exception) -> CallResult:
    """A result that the database refuses: the failure of its event, or a discrepancy of the object that was read."""
    if "event_id" not in result:
        objects = [fact["object_id"] for fact in result.get("facts", [])[:1]]
        return unreadable_object(objects[0], error) if objects else {}
    names = ("event_id", "batch_id", "fence", "payment_id", "operation", "status", "duration_ms")
    return {name: result.get(name) for name in names} | {"outcome": "unusable", "error": error_text(error)}


def unreadable_object(object_id: str, error: Exception) -> CallResult:
    """The discrepancy of an object that can't be read or stored. It closes when a later reading records the object."""
    detail = f"{object_id} can't be recorded: {error_text(error)}"
    return {
        "discrepancy": {
            "kind": "unrecorded",
            "subject": object_id,
            "detail": detail[:500],
            # The error's text may differ with each reading, and is no field.
            "fields": [{"field": "record", "here": None, "there": object_id}],
            "source_there": object_id,
        }
    }
