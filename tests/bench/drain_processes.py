"""The processes that `drain` measures: two that drain the outbox, or two of Procrastinate's with a job per event.

Both sides make the same effects by the same SQL function, have the same rights and stand ready before the clock starts.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier

from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool

from db.connect import conninfo
from db.settings import Settings, load_settings
from jobs import drain
from jobs.worker import Batch, Worker, open_worker

PROCESSES = 2
HANDLER = "bench"
START_SECONDS_MAX = 30.0
WAIT_SECONDS_MAX = 600.0

# The server imports everything once; what it forks has neither threads nor connections.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])


@dataclass
class SharedProgress:
    """What the processes of one measurement share: how many events are wanted and taken, and a common start."""

    url: str
    wanted: int
    taken: Synchronized[int]
    start: Barrier
    ended: Queue[tuple[float, float]]

    def take(self, events: int) -> None:
        """Say that as many more have been taken."""
        with self.taken.get_lock():
            self.taken.value += events

    @property
    def is_enough(self) -> bool:
        """Whether as many as were wanted have been taken."""
        return self.taken.value >= self.wanted

    async def begin(self) -> float:
        """Wait for the others, unless they don't come; returns the time."""
        await asyncio.to_thread(self.start.wait, START_SECONDS_MAX)
        return time.monotonic()

    def end(self, began: float) -> None:
        """Report the duration."""
        self.ended.put((began, time.monotonic()))


def measure_rate(run: Callable[..., None], url: str, wanted: int, *arguments: int) -> float:
    """Events per second of two processes that `run` until `wanted` events were taken or nothing is left."""
    work = SharedProgress(url, wanted, FORKSERVER.Value("q", 0), FORKSERVER.Barrier(PROCESSES), FORKSERVER.Queue())
    processes: list[ForkServerProcess] = [
        FORKSERVER.Process(target=run, args=(work, *arguments), daemon=True) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_SECONDS_MAX)
        assert process.exitcode == 0, f"a process that drains ended with {process.exitcode}"
    times = [work.ended.get(timeout=1) for _ in processes]
    return work.taken.value / (max(end for _, end in times) - min(begin for begin, _ in times))


def settings_of(url: str) -> Settings:
    """A worker's settings; its provider is never called."""
    return load_settings({"DATABASE_URL": url, "SURETY_SANDBOX_URL": "http://127.0.0.1:9"})


def drain_outbox(work: SharedProgress) -> None:
    """Claim, handle and finish batches as the product's workers do."""
    asyncio.run(drain_batches(work))


async def drain_batches(work: SharedProgress) -> None:
    """One drain."""
    async with open_worker(settings_of(work.url), f"bench-{os.getpid()}") as worker:
        lease_seconds = worker.handlers[HANDLER].lease_seconds
        began = await work.begin()
        while not work.is_enough and (batch := await drain.claim_batch(worker, HANDLER)):
            work.take(len(batch.event_ids))
            async with drain.keep_lease(worker, batch, lease_seconds):
                await drain.handle_batch(worker, batch, confirm)
        work.end(began)


async def confirm(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """The benchmark's handler."""
    query = "select bench.confirm_batch(%s, %s, %s)"
    batch.is_lost = not await worker.database.commit_if_true(query, batch.batch_id, batch.fence, event_ids)
    assert not batch.is_lost


def run_jobs(work: SharedProgress, concurrency: int) -> None:
    """Let Procrastinate's worker run one job per event until none is left."""
    asyncio.run(run_job_worker(work, concurrency))


async def run_job_worker(work: SharedProgress, concurrency: int) -> None:
    """One worker with as many jobs at once, a connection for each; done jobs are deleted: its table stays small."""
    settings = settings_of(work.url)
    connector = PsycopgConnector(
        conninfo=conninfo("worker", settings, search_path="procrastinate"), min_size=4, max_size=concurrency + 4
    )
    app = App(connector=connector)
    pool = AsyncConnectionPool(
        conninfo("worker", settings),
        kwargs={"autocommit": True},
        min_size=concurrency,
        max_size=concurrency,
        open=False,
    )

    @app.task(name="confirm_one", queue="bench")
    async def confirm_one(payment_id: str) -> None:
        async with pool.connection() as conn:
            await conn.execute("select bench.confirm_one(%s)", (payment_id,))
        work.take(1)

    async with pool, app.open_async():
        await pool.wait()
        began = await work.begin()
        await app.run_worker_async(
            queues=["bench"],
            wait=False,
            concurrency=concurrency,
            delete_jobs="successful",
            install_signal_handlers=False,
        )
        work.end(began)
