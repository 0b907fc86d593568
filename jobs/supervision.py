"""Supervision of Procrastinate's worker: it is restarted when it ends by itself, and stopped by signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from importlib.metadata import version
from typing import Any, Unpack
from weakref import WeakKeyDictionary

import psycopg
from procrastinate import App
from procrastinate.app import WorkerOptions
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from db.connect import bounded_connection, conninfo, find_undeployed
from db.errors import DatabaseNotReady, is_unreachable, message_of
from db.logs import format_root_handlers
from db.settings import load_settings
from db.tasks import cancel_and_wait
from jobs.database import POOL_SECONDS
from jobs.leader import run_periodic_jobs
from jobs.mode import ModeWatch
from jobs.stripe.key_check import check_provider_key
from jobs.webhooks.sender import sending_webhooks
from jobs.worker import Worker, open_worker

log = logging.getLogger("surety.worker")

RESTART_SECONDS = 1.0
CHECK_UNUSED_SECONDS = 10.0


class WorkerApp(App):
    """Procrastinate's app with a supervisor: the worker is restarted until the process is asked to stop.

    Procrastinate's worker ends, even with status 0, when one of its side tasks fails, as by a restart of the database.
    """

    async def run_worker_async(self, **options: Unpack[WorkerOptions]) -> None:
        """Work until asked to stop.

        Raises SettingsError if no provider or no database is named, and as soon as the provider's key and the database
        are of different modes. Raises DatabaseClosed as soon as the database is one that was restored, and not opened.
        """
        settings = load_settings()
        name = options.get("name") or f"{socket.gethostname()}-{os.getpid()}"
        by_signals = options.get("install_signal_handlers", True)
        async with open_worker(settings, name) as worker, checking_key_at_start(worker):
            worker.watchdog.start()
            mode = "live" if worker.stripe.livemode else "test"
            provider = settings.provider.url or "Stripe"
            log.info("worker %s of Surety %s started: %s mode, provider %s", name, version("surety"), mode, provider)
            # Upkeep runs each hour. After months without a worker, the present month may have no partitions.
            await worker.database.value("select surety.maintain_partitions()")
            work: WorkerOptions = {
                **options,
                "name": name,
                "install_signal_handlers": False,
                "additional_context": {"worker": worker},
            }
            watch = ModeWatch(settings, worker.database)
            async with running_periodic_jobs(worker), sending_webhooks(worker):
                while not worker.stopping.is_set():
                    running = asyncio.create_task(super().run_worker_async(**work))
                    with (
                        stop_on_signals(worker.stopping, running) if by_signals else contextlib.nullcontext(),
                        watch.stop_on_mismatch(worker.stopping, running),
                    ):
                        await wait_until_worker_ends(worker.stopping, running)
            if watch.mismatch is not None:
                raise watch.mismatch


@contextlib.asynccontextmanager
async def running_periodic_jobs(worker: Worker) -> AsyncGenerator[None]:
    """Lead, or try to lead, beside Procrastinate's worker. After that has stopped, wait for the periodic jobs."""
    jobs = asyncio.create_task(run_periodic_jobs(worker), name="periodic jobs")
    try:
        yield
        await jobs
    finally:
        await cancel_and_wait(jobs)


@contextlib.asynccontextmanager
async def checking_key_at_start(worker: Worker) -> AsyncGenerator[None]:
    """Check this worker's key at the provider beside its work, which needs no result of it."""
    check = asyncio.create_task(log_failure(check_key_at_start(worker)))
    try:
        yield
    finally:
        await cancel_and_wait(check)


async def check_key_at_start(worker: Worker) -> None:
    """Check the key. If the circuit of the platform's account is open, probe it first: the key may be another one."""
    await worker.circuit_breaker.probe_platform_if_open()
    await check_provider_key(worker)


async def log_failure(check: Coroutine[Any, Any, None]) -> None:
    """Run a check; if it fails, log the error. The periodic job of the same name repeats it."""
    try:
        await check
    except psycopg.Error as error:
        log.warning("the provider's key was not checked at the start: %s", message_of(error))
    except Exception:
        log.exception("the check of the provider's key at the start failed")


async def wait_until_worker_ends(stopping: asyncio.Event, running: asyncio.Task[None]) -> None:
    """Wait for Procrastinate's worker to end; unless the process is stopping, log the reason and pause."""
    try:
        await running
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
    except Exception as error:
        if is_unreachable(error) or is_unreachable(error.__cause__):
            log.warning("the database is away: %s", str(error.__cause__ or error).strip())
        else:
            log.exception("the worker broke down")
    if not stopping.is_set():
        log.error("the worker ended by itself; it is started again in %s s", RESTART_SECONDS)
        await asyncio.sleep(RESTART_SECONDS)


@contextlib.contextmanager
def stop_on_signals(stopping: asyncio.Event, running: asyncio.Task[None]) -> Generator[None]:
    """The first SIGINT or SIGTERM lets the worker finish what it holds; a second one ends it at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        stopping.set()
        # Procrastinate takes the cancellation of its runner for a graceful stop.
        running.cancel()

    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def quiet_library_logs() -> None:
    """Raise libraries' log levels: they log every job and request; Stripe's logs client secrets at debug level."""
    for name in ("procrastinate", "stripe"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The pool logs each attempt to connect; jobs/database.py logs once.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)


def open_pool(**options: Any) -> AsyncConnectionPool:
    """Procrastinate's own connections, the first thing that a worker opens.

    Raises SettingsError without settings, and DatabaseNotReady if Surety was not deployed.
    """
    settings = load_settings()
    quiet_library_logs()
    format_root_handlers("worker")
    where = conninfo("worker", settings, search_path="procrastinate")
    # A server that can't be reached is waited for.
    with contextlib.suppress(psycopg.Error):
        if (missing := find_undeployed("worker", settings, "surety.key_check_is_due(text, text)")) is not None:
            raise DatabaseNotReady(f"the database has no {missing}: run `surety deploy` first")
    options["check"] = check_if_unused
    return AsyncConnectionPool(
        where,
        connection_class=bounded_connection("worker"),
        configure=set_autocommit,
        min_size=1,
        max_size=4,
        timeout=POOL_SECONDS,
        reconnect_timeout=POOL_SECONDS,
        **options,
    )


async def set_autocommit(connection: AsyncConnection[Any]) -> None:
    """Make each statement a transaction: Procrastinate's are single function calls."""
    await connection.set_autocommit(True)


async def check_if_unused(connection: AsyncConnection[Any]) -> None:
    """Check a connection that was not taken for a while. Raises psycopg.OperationalError if it is broken."""
    now = time.monotonic()
    if now - _taken_at.get(connection, 0.0) > CHECK_UNUSED_SECONDS:
        await AsyncConnectionPool.check_connection(connection)
    _taken_at[connection] = now


_taken_at: WeakKeyDictionary[AsyncConnection[Any], float] = WeakKeyDictionary()
"""When each of Procrastinate's connections was last taken from the pool, on the monotonic clock."""
