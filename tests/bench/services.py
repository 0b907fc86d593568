"""The processes of a deployment, with a sandbox as the provider: API, webhook receiver, workers."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import LiteralString

from app.local.demo.workspace import demo_folder
from app.local.output import LogFiles
from app.local.processes import ProcessGroup, free_port
from tests.bench.costs import server_pids
from tests.bench.databases import Connection

WEBHOOK_SECRET = "whsec_of_the_benchmark"
SERVICES = {"api": "api", "receiver": "webhooks", "sandbox": "sandbox"}
"""Groups of processes, and the name of the process of each."""

SETTLED = "select id from surety.payments where id = any(%s) and state = 'settled'"


@dataclass(frozen=True, slots=True)
class Services:
    """Running processes, and the port of each that listens."""

    process_group: ProcessGroup
    ports: dict[str, int]
    settled_query: LiteralString = SETTLED
    """Which of some payments are settled."""

    @property
    def sandbox_url(self) -> str:
        """Where the sandbox listens."""
        return f"http://127.0.0.1:{self.ports['sandbox']}"

    def pids(self, conn: Connection) -> dict[str, list[int]]:
        """Processes by group; this process is the client."""
        processes = self.process_group.processes
        return {
            "workers": [process.pid for name, process in processes.items() if name.startswith("worker-")],
            "postgres": server_pids(conn),
            **{group: [processes[name].pid] for group, name in SERVICES.items()},
            "client": [os.getpid()],
        }


@contextmanager
def running_sandbox(url: str, *, poll_seconds: float = 1) -> Generator[Services]:
    """The sandbox, and the ports where API and webhook receiver are going to listen. `url` is the database.

    `poll_seconds` is how often workers poll.
    """
    with demo_folder() as folder:
        ports = {name: free_port(0) for name in SERVICES.values()}
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))
        }
        settings = {
            "DATABASE_URL": url,
            "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "SURETY_POLL_SECONDS": f"{poll_seconds:g}",
            "PYTHONUNBUFFERED": "1",
        }
        process_group = ProcessGroup(inherited | settings, LogFiles(folder))
        try:
            process_group.start(
                "sandbox",
                *("-m", "app.sandbox", "--port", str(ports["sandbox"]), "--memory", str(folder / "sandbox.sqlite")),
                *("--webhook-url", f"http://127.0.0.1:{ports['webhooks']}/stripe"),
                *("--webhook-secret", WEBHOOK_SECRET),
            )
            process_group.wait_for_port("sandbox", ports["sandbox"])
            yield Services(process_group, ports)
        finally:
            process_group.stop()


@contextmanager
def running_services(url: str, *, poll_seconds: float = 1) -> Generator[Services]:
    """Sandbox, API and webhook receiver."""
    with running_sandbox(url, poll_seconds=poll_seconds) as services:
        for name in ("api", "webhooks"):
            services.process_group.start(name, "-m", "app.cli", name, "--port", str(services.ports[name]))
            services.process_group.wait_for_port(name, services.ports[name])
        yield services


@contextmanager
def running_workers(process_group: ProcessGroup, workers: int, provider: str) -> Generator[None]:
    """Workers that call the provider at this address."""
    names = [f"worker-{number}" for number in range(1, workers + 1)]
    process_group.environment["SURETY_SANDBOX_URL"] = provider
    for name in names:
        process_group.start(name, "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", f"bench-{name}")
    try:
        yield
    finally:
        process_group.stop(*names)
