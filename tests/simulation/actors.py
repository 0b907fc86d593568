"""The processes of a schedule, with the product's own code in them, and the merchants' clients outside."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import msgspec
import psycopg
from msgspec import Struct
from procrastinate import JobContext

from app import webhooks
from app.acceptance import STATEMENT
from app.documents import AskedPayment
from app.lanes import Lanes, Refused, Unavailable
from db.settings import load
from jobs import app, periodic
from jobs.database import Database, is_passing
from jobs.drain import drain
from jobs.handlers import HANDLERS
from jobs.stripe_rail import API_VERSION, StripeRail
from jobs.worker import Batch, Worker, keep_pulse
from tests.simulation.ground import Pool
from tests.simulation.loop import PROCESS, Killed, Process
from tests.simulation.provider import make_client

if TYPE_CHECKING:
    import httpx
    from procrastinate.jobs import Job
    from psycopg import AsyncConnection
    from psycopg_pool import AsyncConnectionPool

    from tests.simulation.schedule import Schedule

PATIENCE_SECONDS = 30.0
RETRY_AFTER_SECONDS = 1.0
SETTINGS = load({"SURETY_SANDBOX_URL": "http://provider", "DATABASE_URL": "postgresql:///"})
CLIENT = make_client(API_VERSION)
ROUNDS = tuple(name for name in periodic.TASKS if name != "tick")


async def probe(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Count what is handled, in the transaction that finishes it; poison kills who handles it."""
    process = PROCESS.get()
    assert isinstance(process, WorkerProcess)
    process.schedule.taste(process, event_ids)
    query = "select simulation.count_effects(%s, %s, %s)"
    batch.is_lost = not await worker.database.effect(query, batch.batch_id, batch.fence, event_ids)


HANDLERS["probe"] = probe


class WorkerProcess(Process):
    """A worker, whose jobs are started by lot, not by Procrastinate."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        super().__init__(name)
        self.schedule = schedule
        database = Database(cast("AsyncConnectionPool[AsyncConnection[Any]]", Pool(schedule, self)))
        rail = StripeRail(CLIENT, cast("httpx.AsyncClient", None), SETTINGS, database)
        self.worker = Worker(name, SETTINGS, database, rail)
        self.worker.handlers = schedule.ground.handlers
        self.context = JobContext(
            app=app,
            job=cast("Job", None),
            start_timestamp=0,
            additional_context={"worker": self.worker},
            abort_reason=lambda: None,
        )
        self.running: dict[str, int] = {}
        self.start(keep_pulse(self.worker))

    def drain(self, handler: str) -> asyncio.Task[Any]:
        """Start draining."""
        return self.start(self._run(handler, drain(self.context, handler)))

    def round(self, name: str) -> asyncio.Task[Any]:
        """Start what happens periodically."""
        return self.start(self._run(name, periodic.TASKS[name](self.context, timestamp=0)))

    async def _run(self, name: str, job: Any) -> None:
        self.running[name] = self.running.get(name, 0) + 1
        try:
            await job
        except Exception as error:  # noqa: BLE001
            # Procrastinate forgets a job that failed; what it was to do is found again.
            if not is_passing(error):
                self.schedule.violate("no job breaks down", f"{name}: {error!r}")
        finally:
            self.running[name] -= 1


class ListeningProcess(Process):
    """The API and the receiver, with the product's lanes."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        super().__init__(name)

        async def connect() -> Any:
            return schedule.ground.lease(schedule, self)

        count = schedule.plan.lanes
        self.payments = Lanes(connect, STATEMENT, lanes=count, batch_max=3, patience_seconds=2)
        self.webhooks = Lanes(connect, webhooks.STATEMENT, lanes=2, batch_max=3, patience_seconds=2)

    async def open(self) -> None:
        """Begin to serve."""
        await self.start(self._open())

    async def _open(self) -> None:
        await self.payments.open()
        await self.webhooks.open()


class Wanted(Struct):
    """A payment that a merchant wants, under one key, however often it is asked for."""

    number: int
    merchant: int
    key: str
    amount: int
    currency: str
    token: str
    capture_method: str
    reference: str | None
    answers: list[tuple[Any, ...]] = []
    """What was acknowledged: rows of api.create_payments."""

    commands: dict[str, int] = {}
    """What was told of captures and cancellations that took effect, by function."""

    @property
    def payment_id(self) -> str | None:
        """The payment that was acknowledged."""
        return next((row[6] for row in self.answers if row[1] == 201), None)

    def asked(self, key_hash: bytes) -> AskedPayment:
        """The request."""
        body = f"{self.amount} {self.currency} {self.token} {self.capture_method} {self.reference}"
        return AskedPayment(
            n=0,
            request_id=f"req_{self.number}",
            key_hash=key_hash.hex(),
            address="127.0.0.1",
            idempotency_key=self.key,
            request_hash=hashlib.sha256(body.encode()).hexdigest(),
            amount=self.amount,
            currency=self.currency,
            rail="card",
            method_token=self.token,
            capture_method=self.capture_method,
            reference=self.reference,
            description=None,
            statement_descriptor_suffix=None,
            return_url=None,
            customer=None,
            metadata={},
        )


async def insist(schedule: Schedule, wanted: Wanted) -> None:
    """A client: asks until it is answered, wherever somebody listens."""
    while True:
        await schedule.turn(schedule.clients, "client asks")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                row = await schedule.api.payments.ask(wanted.asked(schedule.keys[wanted.merchant]))
        except (Unavailable, Refused, TimeoutError) as error:
            if isinstance(error, Refused):
                schedule.violate("no statement fails", repr(error))
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        wanted.answers.append(tuple(row))
        return


async def command(schedule: Schedule, wanted: Wanted, function: str, amount: int | None) -> None:
    """A client wants a payment captured or called off, until it is told what becomes of that."""
    asked = {
        "key_hash": schedule.keys[wanted.merchant].hex(),
        "request_id": f"req_{wanted.number}",
        "address": "127.0.0.1",
        "idempotency_key": f"{function}-{wanted.number}",
        "request_hash": f"{amount or 0:08x}",
        "payment_id": wanted.payment_id,
        "amount": amount,
    }
    while True:
        await schedule.turn(schedule.clients, "client asks")
        try:
            async with Pool(schedule, schedule.api).connection() as wire:
                query = f"select status, problem from api.{function}(%s)"
                row = await (await wire.cursor().execute(query.encode(), (json.dumps(asked),))).fetchone()
        except (psycopg.OperationalError, Killed):
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        if row is not None and row[0] in {200, 202}:
            wanted.commands[function] = row[0]
        return


async def deliver(schedule: Schedule, event_id: str) -> None:
    """The provider tells of an event until somebody takes it."""
    _, _, payload = schedule.provider.memory.event(event_id)
    event, text = webhooks.read(payload)
    while True:
        await schedule.turn(schedule.provider.process, "webhook")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await schedule.api.webhooks.ask(
                    webhooks.Webhook(
                        n=0,
                        request_id="req_webhook",
                        provider="stripe",
                        account=event.account or "",
                        livemode=event.livemode,
                        event_id=event.id,
                        type=event.type,
                        headers={},
                        body=text,
                        address="127.0.0.1",
                    )
                )
        except (Unavailable, Refused, TimeoutError) as error:
            if isinstance(error, Refused):
                schedule.violate("no statement fails", repr(error))
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        return


def decoded(row: tuple[Any, ...]) -> Any:
    """The document of an answer."""
    return msgspec.json.decode(row[4])
