"""The processes of a schedule, which run the product's own code, and the provider's webhook deliveries."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from procrastinate import JobContext

from app import receiver
from app.api.create_payment import CREATE_PAYMENTS
from app.web.batching import BatchingConnections, RefusedByDatabase, Unavailable
from db.errors import is_retryable
from db.settings import load_settings
from jobs import app
from jobs.database import WorkerDatabase
from jobs.drain import drain
from jobs.handlers.table import HANDLERS
from jobs.periodic import PERIODIC_JOBS, run_and_record
from jobs.stripe.client import StripeGateway, StripeHttpClient
from jobs.worker import Batch, Worker, run_circuit_breaker
from tests.simulation.clients import PATIENCE_SECONDS, RETRY_AFTER_SECONDS
from tests.simulation.database import Pool
from tests.simulation.loop import PROCESS, Process
from tests.simulation.provider import SENDER

if TYPE_CHECKING:
    from procrastinate.jobs import Job
    from psycopg import AsyncConnection
    from psycopg_pool import AsyncConnectionPool

    from tests.simulation.schedule import Schedule

SETTINGS = load_settings({"SURETY_SANDBOX_URL": "http://provider", "DATABASE_URL": "postgresql:///"})
HTTP_CLIENT = StripeHttpClient("http://provider", SENDER)
PERIODIC_JOB_NAMES = tuple(PERIODIC_JOBS)


async def probe(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Count the handled events in the transaction that completes them. The poison event kills its worker."""
    process = PROCESS.get()
    assert isinstance(process, WorkerProcess)
    process.schedule.note_handled(process, event_ids)
    query = "select simulation.count_effects(%s, %s, %s)"
    batch.is_lost = not await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids)


HANDLERS["probe"] = probe


class WorkerProcess(Process):
    """A worker whose jobs are started at random instead of by Procrastinate."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        super().__init__(name)
        self.schedule = schedule
        database = WorkerDatabase(cast("AsyncConnectionPool[AsyncConnection[Any]]", Pool(schedule, self)))
        rail = StripeGateway(HTTP_CLIENT, SETTINGS, database)
        self.worker = Worker(name, SETTINGS, database, rail)
        self.worker.handlers = schedule.database.handlers
        self.context = JobContext(
            app=app,
            job=cast("Job", None),
            start_timestamp=0,
            additional_context={"worker": self.worker},
            abort_reason=lambda: None,
        )
        self.running: dict[str, int] = {}
        self.jobs: dict[asyncio.Task[Any], None] = {}
        self.idle_mark: str | None = None
        self.start(run_circuit_breaker(self.worker))

    def drain(self, handler: str) -> asyncio.Task[Any]:
        """Start draining a handler's events."""
        return self._start_job(handler, drain(self.context, handler))

    def run_periodic_job(self, name: str, *, is_leader: bool = False) -> asyncio.Task[Any]:
        """Start a periodic job: as the leader, which runs all of them and has recorded successes, or as any process."""
        if not is_leader:
            return self._start_job(name, self._run_periodic_job(name))
        job = run_and_record(self.worker, name, PERIODIC_JOBS[name], success_is_recorded=True)
        return self._start_job(name, job)

    def stop(self) -> None:
        """Stop as by SIGTERM: running jobs finish, then the process ends."""
        self.worker.stopping.set()
        if not any(self.running.values()):
            self.kill()

    def _start_job(self, name: str, job: Any) -> asyncio.Task[Any]:
        task = self.start(self._run(name, job))
        self.jobs[task] = None
        task.add_done_callback(self.jobs.pop)
        return task

    async def _run_periodic_job(self, name: str) -> None:
        """Run a periodic job unless another process runs it. Leaders that change may leave it to any process."""
        async with self.worker.database.try_lock(name) as is_locked:
            if is_locked:
                await run_and_record(self.worker, name, PERIODIC_JOBS[name])

    async def _run(self, name: str, job: Any) -> None:
        self.running[name] = self.running.get(name, 0) + 1
        try:
            await job
        except Exception as error:  # noqa: BLE001
            # Procrastinate drops a failed job. The scheduler finds its work again.
            if not is_retryable(error):
                self.schedule.report_violation("no job fails", f"{name}: {error!r}")
        finally:
            self.running[name] -= 1
            if self.worker.stopping.is_set():
                self.stop()


class ListeningProcess(Process):
    """The API and the receiver, with the product's batching connections."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        super().__init__(name)

        async def connect() -> Any:
            return schedule.database.lease(schedule, self)

        count = schedule.plan.batching_connections
        self.payments = BatchingConnections(
            connect, CREATE_PAYMENTS, connections=count, batch_max=3, retry_seconds_max=2
        )
        self.webhooks = BatchingConnections(
            connect, receiver.RECEIVE_WEBHOOKS, connections=2, batch_max=3, retry_seconds_max=2
        )

    async def open(self) -> None:
        """Open the connections."""
        await self.start(self._open())

    async def _open(self) -> None:
        await self.payments.open()
        await self.webhooks.open()


async def deliver(schedule: Schedule, event_id: str) -> None:
    """Deliver a webhook."""
    for payload in schedule.provider.webhook_payloads(event_id):
        await deliver_payload(schedule, payload)


async def deliver_payload(schedule: Schedule, payload: bytes) -> None:
    """Deliver an event, repeatedly until it is accepted."""
    event, text = receiver.parse_event(payload)
    while True:
        await schedule.turn(schedule.provider.process, "webhook")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await schedule.api.webhooks.submit(
                    receiver.WebhookRequest(
                        n=0,
                        request_id="req_webhook",
                        provider="stripe",
                        account=event.stripe_account,
                        livemode=event.livemode,
                        event_id=event.id,
                        type=event.type,
                        headers={},
                        body=text,
                        address="127.0.0.1",
                    )
                )
        except (Unavailable, RefusedByDatabase, TimeoutError) as error:
            if isinstance(error, RefusedByDatabase):
                schedule.report_violation("no statement fails", repr(error))
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        schedule.schedule_handlers("apply_webhooks")
        return
