"""The worker loop over a handler's events: they are claimed in batches, handled and finished.

    claim_batch      leases a batch of events
    handle_batch     commits the handler's effects together with the completion of the events, in one part or more
    fail_event       counts an unforeseen failure of one event, which is found by halving the batch
    release_batch    gives a batch back uncounted

A lease is renewed in thirds of its time. Once it is lost, another worker has the batch: no further call is begun, and
the results of calls under way are still recorded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from procrastinate import JobContext
from psycopg.types.json import Jsonb

from db.errors import error_text, is_retryable
from db.tasks import cancel_and_wait
from jobs.database import bisect_on_error
from jobs.handlers.table import HANDLERS, HandleEvents
from jobs.stripe.errors import ReleaseCause
from jobs.worker import Batch, Worker, worker_of

log = logging.getLogger("surety.drain")

DRAIN_SECONDS = 5.0
PACE_SECONDS = 0.1
PAUSE_SECONDS = 1.0
DATABASE_FAILED: ReleaseCause = "database_failed"


async def drain(context: JobContext, handler: str) -> None:
    """Handle due events until none is left, or for DRAIN_SECONDS; then another job continues.

    Each claim announces another one PACE_SECONDS later, so that events that arrive meanwhile need no job of their own
    and make larger batches. The announced claim is made before this ends.
    """
    worker = worker_of(context)
    clock = asyncio.get_running_loop().time
    end = time.monotonic() + DRAIN_SECONDS
    full = worker.handlers[handler].batch_size
    while batch := await claim_batch(worker, handler):
        next_claim_at = clock() + PACE_SECONDS
        if len(batch.event_ids) == full:
            await worker.schedule_handlers([handler], is_urgent=True)
        async with keep_lease(worker, batch, worker.handlers[handler].lease_seconds):
            await handle_batch(worker, batch, HANDLERS[handler])
        if worker.stopping.is_set() or time.monotonic() > end:
            await worker.schedule_handlers([handler], is_urgent=True)
            return
        await asyncio.sleep(next_claim_at - clock())


async def claim_batch(worker: Worker, handler: str) -> Batch | None:
    """The next batch, if there are due events that no other worker has claimed."""
    claimed = await worker.database.rows(
        Batch, "select batch_id, fence, event_ids from outbox.claim_batch(%s, %s, make_interval(secs => %s))",
        handler, worker.name, PACE_SECONDS,
    )  # fmt: skip
    return claimed[0] if claimed else None


@asynccontextmanager
async def keep_lease(worker: Worker, batch: Batch, lease_seconds: float) -> AsyncGenerator[None]:
    """Renew the batch's lease while it is handled; is_lost is set when another worker has it."""

    async def renew() -> None:
        held = True
        try:
            while held:
                await asyncio.sleep(lease_seconds / 3)
                held = await worker.database.value("select outbox.renew_lease(%s, %s)", batch.batch_id, batch.fence)
        finally:
            batch.is_lost = True

    renewing = asyncio.create_task(renew(), name=f"lease of batch {batch.batch_id}")
    try:
        yield
    finally:
        await cancel_and_wait(renewing)


async def handle_batch(worker: Worker, batch: Batch, handler: HandleEvents) -> None:
    """Handle the events of a batch; an event that can't be handled is found by halving."""

    async def give_up(event_id: str, error: Exception) -> None:
        await fail_event(worker, batch, event_id, error)

    try:
        await bisect_on_error(batch.event_ids, partial(handler, worker, batch), give_up)
    except Exception as error:
        if not is_retryable(error):
            raise
        await release_batch(worker, batch, error)


async def fail_event(worker: Worker, batch: Batch, event_id: str, error: Exception) -> None:
    """Count a failure of one event; after the last of its handler's delays it becomes a dead letter."""
    query = "select aggregate_id from outbox.batch_events(%s, %s) where event_id = %s"
    subject = await worker.database.value(query, batch.batch_id, batch.fence, event_id)
    log.error("event %s of %s failed", event_id, subject or "a batch that another worker has", exc_info=error)
    failures = Jsonb([{"event_id": event_id, "error": error_text(error)}])
    await worker.database.value("select outbox.fail_events(%s, %s, %s)", batch.batch_id, batch.fence, failures)


async def release_batch(worker: Worker, batch: Batch, error: Exception) -> None:
    """Give back the rest of a batch uncounted: the database failed, not the events."""
    log.warning("the rest of batch %s is given back: %s", batch.batch_id, error_text(error))
    await worker.database.value(
        "select outbox.release_events(%s, %s, %s, make_interval(secs => %s), %s, %s)",
        batch.batch_id, batch.fence, batch.event_ids, PAUSE_SECONDS, DATABASE_FAILED, error_text(error),
    )  # fmt: skip
