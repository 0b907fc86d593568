"""Workers for tests: as processes of Procrastinate's, or their handlers worked off here, one batch after another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl

import msgspec

from db.settings import load_settings
from jobs.drain import claim_batch, handle_batch, keep_lease
from jobs.handlers.table import HANDLERS
from jobs.stripe.connections import OutgoingRequest, RawResponse, RequestSender
from jobs.worker import Worker, open_worker
from tests.support.payments import Connection
from tests.support.sandbox_process import eventually
from tests.support.stripe_description import check_answer, check_request, shape

ROOT = Path(__file__).parent.parent.parent
NO_AUTOMATIC_RETRY = "{1 hour,1 hour}"
"""What failed is tried again when the test says so."""
QUICK = {"SURETY_PROVIDER_TIMEOUT": "5", "SURETY_POLL_SECONDS": "1"}


def environment(database: str, sandbox_url: str, **more: str) -> dict[str, str]:
    """The environment of a worker."""
    return {"DATABASE_URL": database, "SURETY_SANDBOX_URL": sandbox_url, **QUICK, **more}


def shorten_delays(conn: Connection, retry_after: str = "{0.05 s,0.1 s}") -> None:
    """Shorten leases and delays from minutes to seconds; call it before workers start."""
    conn.execute("update outbox.handlers set lease = '2 seconds', retry_after = %s::interval[]", (retry_after,))
    conn.execute("update surety.states set poll_after = '1 second' where poll_after = '60 seconds'")


@contextmanager
def worker_process(
    database: str,
    sandbox_url: str,
    name: str = "w",
    app: str = "jobs.app",
    *,
    stderr: IO[bytes] | None = None,
    **more: str,
) -> Generator[subprocess.Popen[bytes]]:
    """A worker as operators start it, ended in the end."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SURETY_", "STRIPE_"))}
    command = [sys.executable, "-m", "procrastinate", "--app", app, "worker", "--name", name]
    process = subprocess.Popen(
        command, cwd=ROOT, env=inherited | environment(database, sandbox_url, **more), stderr=stderr
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_worker(conn: Connection, count: int = 1) -> None:
    """Until so many workers are at work."""
    query = "select count(*) from procrastinate.procrastinate_workers"
    eventually(lambda: (conn.execute(query).fetchone() or (0,))[0] >= count, 15)


@asynccontextmanager
async def in_process_worker(
    database: str,
    sandbox_url: str,
    *,
    judged: bool = True,
    timeout_seconds: float = 5,
    per_second: float = 0,
    **more: str,
) -> AsyncGenerator[Worker]:
    """A worker whose handlers the test runs. At the end, Stripe's description checks its requests and responses."""
    output = {"SURETY_PROVIDER_TIMEOUT": str(timeout_seconds), "SURETY_PROVIDER_RATE": str(per_second), **more}
    async with open_worker(load_settings(environment(database, sandbox_url, **output)), "here") as worker:
        watching = WatchingSender(worker.stripe.http.sender)
        worker.stripe.http.sender = watching
        yield worker
    for request, response in watching.exchanged if judged else ():
        check_exchange(request, response)


class WatchingSender:
    """Sends the requests on, and keeps them and their answers."""

    def __init__(self, sender: RequestSender) -> None:
        self.sender = sender
        self.requests: list[OutgoingRequest] = []
        self.exchanged: list[tuple[OutgoingRequest, RawResponse]] = []

    async def send(self, request: OutgoingRequest) -> RawResponse:
        """Send it once. Raises NoAnswer."""
        self.requests.append(request)
        response = await self.sender.send(request)
        self.exchanged.append((request, response))
        return response


def watch_requests(worker: Worker) -> list[OutgoingRequest]:
    """The requests that the worker sends to Stripe from now on; the list grows."""
    watching = WatchingSender(worker.stripe.http.sender)
    worker.stripe.http.sender = watching
    return watching.requests


def check_exchange(request: OutgoingRequest, response: RawResponse) -> None:
    """Raises if Stripe would not accept the request, or could not have answered that.

    The description knows names, types and listed texts; what differs from something judged before in none of these is
    not judged again.
    """
    form = request.content.decode()
    path, _, query = request.target.partition("?")
    assert request.headers["Stripe-Version"] == "2026-10-28.endive"
    answer = msgspec.json.decode(response.content) if response.content.startswith(b"{") else None
    asked = parse_qsl(query), parse_qsl(form), list(request.headers)
    likeness = (request.method, shape(path.split("/")), response.status, shape([*asked, answer]))
    if likeness in _checked:
        return
    check_request(request.method, request.target, dict(request.headers), form)
    if answer is not None:
        check_answer(request.method, request.target, response.status, answer)
    _checked.add(likeness)


_checked: set[tuple[Any, ...]] = set()


async def run_until_idle(worker: Worker, *handlers: str) -> int:
    """Handle all due events, handler after handler. Returns the number of batches."""
    batches = 0
    while True:
        before = batches
        for name in handlers or list(worker.handlers):
            while batch := await claim_batch(worker, name):
                async with keep_lease(worker, batch, worker.handlers[name].lease_seconds):
                    await handle_batch(worker, batch, HANDLERS[name])
                batches += 1
        if batches == before:
            return batches


def due(conn: Connection) -> None:
    """Make waiting retries due now."""
    conn.execute("update outbox.retries set due_at = now() where due_at is not null")


def attempts(conn: Connection) -> list[tuple[Any, ...]]:
    """Handler, counted failures and errors of each waiting retry."""
    query = "select handler, failures, jsonb_path_query_array(attempts, '$[*].error') from outbox.retries order by 1, 2"
    return conn.execute(query).fetchall()
