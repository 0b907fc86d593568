"""The sender: finds endpoints with something to be sent, claims batches, and records their results.

Each turn asks once for all endpoints: after the first time, only about merchants that have new events since the last
turn. Every minute it asks at each endpoint's cursor as well. A batch is sent by a task of its own, so a slow endpoint
holds up nothing but itself. A batch whose worker dies is claimed again once its lease ends. So deliveries are sent at
least once, always under the same webhook-id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import psycopg
from msgspec import Struct
from psycopg.types.json import Jsonb

from db.errors import message_of
from db.settings import WebhookNetworks
from db.tasks import cancel_and_wait
from db.webhook_secrets import WebhookKeys
from jobs.database import bisect_on_error
from jobs.webhooks.deliveries import DeliveryBatch, DeliveryResult, DeliverySender
from jobs.worker import Worker

log = logging.getLogger("surety.webhooks")

IDLE_SECONDS = 1.0
BUSY_SECONDS = 0.1
FULL_SECONDS = 60.0
LEASE_SECONDS = 60.0
GATHER_SECONDS = 0.05
STOP_SECONDS_MAX = 20.0
BATCHES_RECORDED_MAX = 100
EVENTS_MAX = 32
"""In a batch."""
CLAIMS_MAX = 50
"""Endpoints in one claim."""
BATCHES_MAX = 500
"""Batches under way in a process. Those of slow endpoints take up half of them at most."""
REQUESTS_MAX = 400
SLOW_SECONDS = 2.0
"""A batch that takes longer makes its endpoint a slow one, until one is quicker."""


class DueEndpoints(Struct):
    """The row of outbox.find_due_endpoints."""

    endpoint_ids: list[str]
    mark: str


class DeliveryDocument(Struct):
    """A row of outbox.read_deliveries."""

    event_id: str
    full_document: str
    thin_document: str


class EndpointSender:
    """Sends merchants' webhooks until the worker stops."""

    def __init__(self, worker: Worker, keys: WebhookKeys) -> None:
        self._worker = worker
        self._sender = DeliverySender(
            keys, worker.settings.surety_webhook_networks or WebhookNetworks(""), REQUESTS_MAX
        )
        self._mark: str | None = None
        self._full_at = 0.0
        self._due: dict[str, None] = {}
        """Endpoints that may have something to be sent, the one that waits longest first."""
        self._batches: dict[str, DeliveryBatch] = {}
        """Under way, by endpoint."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._slow: set[str] = set()
        self._results = DeliveryRecorder(worker)

    async def run(self) -> None:
        """Send until the worker stops; then batches under way have time to end."""
        renewing = asyncio.create_task(self._renew_leases(), name="leases of webhooks")
        try:
            await self._publish_key()
            while not self._worker.stopping.is_set():
                await self._pause(await self._take_turn())
            self._sender.stopping.set()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=STOP_SECONDS_MAX)
        finally:
            await cancel_and_wait(renewing, *self._tasks)
            await self._results.finish()
            self._sender.close()

    async def _publish_key(self) -> None:
        keys = self._sender.keys
        await self._worker.database.value("select outbox.publish_sealing_key(%s, %s)", keys.id, keys.public_key)

    async def _take_turn(self) -> float:
        """Find, claim and start; returns the seconds until the next turn."""
        try:
            found = await self._find_due()
            started = await self._start_batches()
        except psycopg.Error as error:
            log.warning("webhooks wait for the database: %s", message_of(error))
            return IDLE_SECONDS
        except Exception:  # Without this loop, nothing would be sent.
            log.exception("the sender of webhooks failed; it goes on")
            return IDLE_SECONDS
        return BUSY_SECONDS if found or started or self._tasks else IDLE_SECONDS

    async def _pause(self, seconds: float) -> None:
        """Wait for the next turn; events that this worker has just made begin it at once, BUSY_SECONDS after the last.

        A full turn each BUSY_SECONDS is enough under load.
        """
        made = self._worker.events_made
        if seconds > BUSY_SECONDS and not self._worker.stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await made.wait()
        else:
            await asyncio.sleep(seconds)
        made.clear()

    async def _find_due(self) -> bool:
        """Add to the endpoints that may have something to be sent; whether there are any new ones."""
        now = asyncio.get_running_loop().time()
        is_full = self._mark is None or now >= self._full_at
        rows = await self._worker.database.rows(
            DueEndpoints, "select endpoint_ids, mark from outbox.find_due_endpoints(%s::pg_snapshot, %s)",
            self._mark, is_full,
        )  # fmt: skip
        if not rows:
            self._mark = None
            return False
        [found] = rows
        self._mark = found.mark
        if is_full:
            self._full_at = now + FULL_SECONDS
        self._due |= dict.fromkeys(found.endpoint_ids)
        return bool(found.endpoint_ids)

    async def _start_batches(self) -> bool:
        """Claim batches and start them; whether there was any."""
        started = False
        while not self._worker.stopping.is_set() and (chosen := self._choose()):
            for endpoint_id in chosen:
                del self._due[endpoint_id]
            batches = await self._worker.database.rows(
                DeliveryBatch,
                "select endpoint_id, fence, event_ids, url, payload, api_version, concurrency, rate_max, secrets,"
                " is_full from outbox.claim_deliveries(%s, %s, %s, make_interval(secs => %s))",
                self._worker.name, chosen, EVENTS_MAX, LEASE_SECONDS,
            )  # fmt: skip
            if batches:
                started = True
                await self._start(batches)
        return started

    def _choose(self) -> list[str]:
        """The next endpoints to claim for, within the bounds on batches under way."""
        room = min(CLAIMS_MAX, BATCHES_MAX - len(self._batches))
        slow_room = BATCHES_MAX // 2 - len(self._slow & self._batches.keys())
        chosen: list[str] = []
        for endpoint_id in self._due:
            if len(chosen) >= room:
                break
            if endpoint_id in self._batches:
                continue
            if endpoint_id in self._slow:
                if slow_room <= 0:
                    continue
                slow_room -= 1
            chosen.append(endpoint_id)
        return chosen

    async def _start(self, batches: list[DeliveryBatch]) -> None:
        event_ids = sorted({event_id for batch in batches for event_id in batch.event_ids})
        query = "select event_id, full_document, thin_document from outbox.read_deliveries(%s)"
        rows = await self._worker.database.rows(DeliveryDocument, query, event_ids)
        full = {row.event_id: row.full_document.encode() for row in rows}
        thin = {row.event_id: row.thin_document.encode() for row in rows}
        for batch in batches:
            self._batches[batch.endpoint_id] = batch
            documents = thin if batch.payload == "thin" else full
            task = asyncio.create_task(self._run_batch(batch, documents), name=f"webhooks to {batch.endpoint_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run_batch(self, batch: DeliveryBatch, documents: dict[str, bytes]) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            results = await self._sender.send_batch(batch, documents)
            if clock() - began > SLOW_SECONDS:
                self._slow.add(batch.endpoint_id)
            else:
                self._slow.discard(batch.endpoint_id)
            await self._results.record(results)
        except Exception:
            # Its lease ends, and then it is claimed again.
            log.exception("a batch of webhooks to %s failed", batch.endpoint_id)
        finally:
            self._batches.pop(batch.endpoint_id, None)
            if batch.is_full:
                self._due[batch.endpoint_id] = None

    async def _renew_leases(self) -> None:
        """Renew the leases of batches under way. Of one that is lost, nothing more is begun."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            batches = list(self._batches.values())
            if not batches:
                continue
            query = "select outbox.renew_deliveries(%s, make_interval(secs => %s))"
            fences = [batch.fence for batch in batches]
            held = set(await self._worker.database.value(query, fences, LEASE_SECONDS) or ())
            for batch in batches:
                batch.is_lost = batch.is_lost or batch.fence not in held


class DeliveryRecorder:
    """Records the results of batches that end within GATHER_SECONDS in one transaction."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: list[tuple[list[DeliveryResult], asyncio.Future[None]]] = []
        self._recording: asyncio.Task[None] | None = None

    async def record(self, results: list[DeliveryResult]) -> None:
        """Record the results of a batch. Raises the database's error if they can't be recorded at all."""
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((results, recorded))
        if self._recording is None or self._recording.done():
            self._recording = asyncio.create_task(self._record_waiting(), name="results of webhooks")
        await recorded

    async def finish(self) -> None:
        """Wait until all results are recorded, at most STOP_SECONDS_MAX."""
        if self._recording is not None:
            await asyncio.wait({self._recording}, timeout=STOP_SECONDS_MAX)

    async def _record_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_SECONDS)
            group, self._waiting = self._waiting[:BATCHES_RECORDED_MAX], self._waiting[BATCHES_RECORDED_MAX:]

            async def give_up(one: tuple[list[DeliveryResult], asyncio.Future[None]], error: Exception) -> None:
                if not one[1].done():
                    one[1].set_exception(error)

            writing = asyncio.create_task(bisect_on_error(group, self._write, give_up))
            await asyncio.wait({writing})
            error = writing.exception()
            for one in group:
                if isinstance(error, Exception):
                    await give_up(one, error)
                elif not one[1].done():
                    one[1].set_result(None)

    async def _write(self, group: list[tuple[list[DeliveryResult], asyncio.Future[None]]]) -> None:
        results = [result for one, _ in group for result in one]
        query = "select outbox.record_deliveries(%s, %s)"
        await self._worker.database.value(query, self._worker.name, Jsonb(results))


@asynccontextmanager
async def sending_webhooks(worker: Worker) -> AsyncGenerator[None]:
    """Send merchants' webhooks beside the worker's other tasks, if it has SURETY_WEBHOOK_KEY.

    Raises SettingsError for a text that is no key.
    """
    keys = WebhookKeys.from_settings(worker.settings)
    if keys is None:
        yield
        return
    sending = asyncio.create_task(EndpointSender(worker, keys).run(), name="webhooks")
    try:
        yield
        await sending
    finally:
        await cancel_and_wait(sending)
