"""The parts that a worker's tasks share: its name, the database, the Stripe client, the handlers and their events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

import psycopg
from msgspec import Struct
from procrastinate import JobContext

from db.connect import conninfo
from db.errors import message_of
from db.settings import Settings
from db.tasks import cancel_and_wait
from jobs.circuit_breaker import CircuitBreaker
from jobs.database import WorkerDatabase, open_database
from jobs.mode import require_open_database
from jobs.recorder import ResultRecorder
from jobs.stripe.client import StripeGateway, open_stripe
from jobs.watchdog import Watchdog

log = logging.getLogger("surety.worker")

CIRCUIT_TURN_SECONDS = 1.0
CALL_REPORT_SECONDS_MAX = 5.0
LOOP_SIGNALS_PER_STALL = 10


class HandlerSettings(Struct, frozen=True):
    """A row of outbox.list_handlers."""

    handler: str
    event_types: list[str]
    batch_size: int
    lease_seconds: float


class Batch(Struct):
    """A row of outbox.claim_batch: events leased to this worker; is_lost is set once another worker has them."""

    batch_id: int
    fence: int
    event_ids: list[str]
    is_lost: bool = False


class Worker:
    """One process; its tasks share this."""

    def __init__(self, name: str, settings: Settings, database: WorkerDatabase, stripe: StripeGateway) -> None:
        self.name = name
        self.settings = settings
        self.database = database
        self.stripe = stripe
        self.watchdog = Watchdog(conninfo("worker", settings), settings.surety_stall_seconds)
        self.circuit_breaker = CircuitBreaker(
            database, stripe, self.actor, min(CALL_REPORT_SECONDS_MAX, settings.surety_stall_seconds / 5)
        )
        self.recorder = ResultRecorder(database, self.actor, self.schedule_handlers_for)
        self.circuit_turn_seconds = min(CIRCUIT_TURN_SECONDS, settings.surety_stall_seconds / 10)
        self.handlers: dict[str, HandlerSettings] = {}
        self.stopping = asyncio.Event()
        self.events_made = asyncio.Event()
        """Set when this worker has made events; the sender of webhooks clears it."""

    @property
    def actor(self) -> str:
        """The worker's name in the audit trail."""
        return f"worker:{self.name}"

    async def schedule_handlers_for(self, event_types: Iterable[str]) -> None:
        """Schedule the handlers of events that were just committed."""
        made = set(event_types)
        if made:
            self.events_made.set()
        await self.schedule_handlers(
            [row.handler for row in self.handlers.values() if made.intersection(row.event_types)]
        )

    async def schedule_handlers(self, handlers: list[str], *, is_urgent: bool = False) -> None:
        """Schedule handlers; a free worker runs them. Urgent: even if a worker has announced another claim."""
        if handlers:
            await self.database.value("select outbox.schedule_handlers(%s, %s)", handlers, is_urgent)


def worker_of(context: JobContext) -> Worker:
    """The worker that runs a job."""
    worker: Worker = context.additional_context["worker"]
    return worker


@asynccontextmanager
async def open_worker(settings: Settings, name: str) -> AsyncGenerator[Worker]:
    """A worker with its connections, its circuit breaker and its watchdog.

    Raises SettingsError if no provider is named, or if its key has another mode than the database. Raises
    DatabaseClosed in a restored database that is not open.
    """
    async with open_database(settings) as database, open_stripe(settings, database) as stripe:
        await require_open_database(settings, database)
        worker = Worker(name, settings, database, stripe)
        found = await database.rows(
            HandlerSettings, "select handler, event_types, batch_size, lease_seconds from outbox.list_handlers()"
        )
        worker.handlers = {row.handler: row for row in found}
        tasks = [asyncio.create_task(run_circuit_breaker(worker)), asyncio.create_task(signal_loop_turns(worker))]
        try:
            yield worker
        finally:
            await worker.recorder.finish()
            worker.watchdog.stop()
            await cancel_and_wait(*tasks)


async def run_circuit_breaker(worker: Worker) -> None:
    """Report calls and probe each second; if a report hangs, the watchdog ends the worker."""
    while True:
        try:
            if await worker.circuit_breaker.report_and_probe():
                worker.watchdog.database_answered()
        except psycopg.Error as error:
            log.warning("the circuit breaker found no database: %s", message_of(error))
        except Exception:  # Its end would be seen only when the watchdog ends the worker, which can't name the reason.
            log.exception("the circuit breaker failed; it goes on")
        await asyncio.sleep(worker.circuit_turn_seconds)


async def signal_loop_turns(worker: Worker) -> None:
    """Show the watchdog that the event loop turns."""
    while True:
        worker.watchdog.loop_turned()
        await asyncio.sleep(worker.settings.surety_stall_seconds / LOOP_SIGNALS_PER_STALL)
