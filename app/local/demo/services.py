"""The demo's services: API, webhook receiver, sandbox and workers, with short delays."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from app.local.demo.checks import Connection, query_count
from app.local.output import LogFiles
from app.local.processes import ProcessGroup, free_port
from app.local.up import LOOPBACK, new_webhook_key

WORKERS = 2

# Production delays are minutes. The demo shortens them in its own database and processes.
LEASE = "4 seconds"
RETRY_AFTER = ["0.5 seconds", "2 seconds", "5 seconds"]
POLL_AFTER = "2 seconds"
PROVIDER_TIMEOUT_SECONDS = "2"
POLL_SECONDS = "1"


def decide_mode(conn: Connection, *, livemode: bool) -> None:
    """Mark the database as one for tests, or as live, which no database for tests can be."""
    if livemode:
        conn.execute("select surety.set_livemode(true)")
    else:
        conn.execute("update surety.environment set kind = 'test'")


def shorten_delays(conn: Connection) -> None:
    """Shorten leases, retries and polling of a database."""
    conn.execute("update outbox.handlers set lease = %s::interval, retry_after = %s::interval[]", (LEASE, RETRY_AFTER))
    conn.execute("update surety.states set poll_after = %s::interval where poll_after is not null", (POLL_AFTER,))
    conn.execute(
        "update surety.dispute_statuses set poll_after = %s::interval where poll_after is not null", (POLL_AFTER,)
    )
    conn.execute(
        "update surety.refund_states set poll_after = %s::interval where poll_after is not null", (POLL_AFTER,)
    )


def count_workers(conn: Connection) -> int:
    """Workers that have registered."""
    return query_count(conn, "select count(*) from procrastinate.procrastinate_workers")


def inherited_environment() -> dict[str, str]:
    """This process's environment without settings of Surety, Stripe and PostgreSQL; only SURETY_PG_BIN is kept."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SURETY_PG_BIN" or not name.startswith(("SURETY_", "STRIPE_", "PG", "DATABASE_URL"))
    }


class DemoServices:
    """The service processes and their ports."""

    def __init__(self, workspace: Path, url: str, seed: int, *, faults: bool, livemode: bool) -> None:
        self.seed, self.faults, self.livemode, self.workspace = seed, faults, livemode, workspace
        self.ports = {name: free_port(port) for name, port in (("api", 8000), ("webhooks", 8001), ("sandbox", 8002))}
        self.secret = f"whsec_{secrets.token_hex(16)}"
        self.process_group = ProcessGroup(
            inherited_environment()
            | {
                "DATABASE_URL": url,
                "STRIPE_WEBHOOK_SECRET": self.secret,
                "SURETY_WEBHOOK_KEY": new_webhook_key(),
                "SURETY_WEBHOOK_NETWORKS": LOOPBACK,
                "STRIPE_API_KEY": f"sk_{'live' if livemode else 'test'}_sandbox",
                "SURETY_SANDBOX_URL": self.url("sandbox"),
                "SURETY_PROVIDER_TIMEOUT": PROVIDER_TIMEOUT_SECONDS,
                "SURETY_POLL_SECONDS": POLL_SECONDS,
                "PYTHONUNBUFFERED": "1",
            },
            LogFiles(workspace),
        )

    def url(self, name: str) -> str:
        """The address of a service."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def start(self, conn: Connection) -> None:
        """Start all services; returns once all listen and the workers have registered. Raises ProcessError."""
        start = self.process_group.start
        start("api", "-m", "app.cli", "api", "--port", str(self.ports["api"]))
        start("webhooks", "-m", "app.cli", "webhooks", "--port", str(self.ports["webhooks"]))
        start(
            "sandbox",
            *("-m", "app.sandbox", "--port", str(self.ports["sandbox"]), "--seed", str(self.seed)),
            *("--memory", str(self.workspace / "sandbox.sqlite"), "--webhook-secret", self.secret),
            *("--webhook-url", f"{self.url('webhooks')}/stripe"),
            *(("--faults",) if self.faults else ("--auto-payer",)),
            *(("--live",) if self.livemode else ()),
        )
        for number in range(1, WORKERS + 1):
            self.start_worker(f"worker-{number}")
        for name, port in self.ports.items():
            self.process_group.wait_for_port(name, port)
        self.process_group.wait_for("worker-1", lambda: count_workers(conn) >= WORKERS)

    def start_worker(self, name: str) -> None:
        """Start a worker; leases carry its name."""
        self.process_group.start(name, "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", name)
