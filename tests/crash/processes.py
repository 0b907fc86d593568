"""The processes that are killed, and the supervisor that restarts them."""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path

import psycopg

from app.local.demo.services import POLL_SECONDS, count_workers, inherited_environment, shorten_delays
from app.local.output import LogFiles
from app.local.processes import ProcessGroup, free_port
from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import create_database, with_database
from db.embedded.server import EmbeddedServer
from db.errors import EmbeddedServerError
from tests.support.postgres_proxy import KEEPALIVE_SECONDS, PostgresProxy

Connection = psycopg.Connection[tuple[object, ...]]

DATABASE = "surety_crash"
# Below the ephemeral ports: a client that retries a port without a listener could be given the port itself, connect to
# itself, and so keep the server from listening.
PORTS = range(20_000, 30_000)
WORKERS = ("worker-1", "worker-2")
START_SECONDS_MAX = 30.0
# Restarts make everything slow. A short timeout would look like an outage of the provider.
PROVIDER_TIMEOUT_SECONDS = "5"
# Days in production. Timely evidence takes a few seconds, and disputes without evidence are lost soon.
EVIDENCE_SECONDS = "5"


class SuretyProcesses:
    """Surety's processes, the sandbox, and the database that they share.

    `database_url` is the database as the processes reach it, `url` as the checks do.
    """

    def __init__(self, scene: Path, seed: int, database_url: str, url: str) -> None:
        self.url = url
        chance = random.Random(os.getpid())
        self.ports = {name: free_port(chance.choice(PORTS)) for name in ("api", "webhooks", "sandbox")}
        secret = f"whsec_{secrets.token_hex(16)}"
        variables = {
            "DATABASE_URL": database_url,
            "STRIPE_WEBHOOK_SECRET": secret,
            "SURETY_SANDBOX_URL": self.http("sandbox"),
            "SURETY_PROVIDER_TIMEOUT": PROVIDER_TIMEOUT_SECONDS,
            "SURETY_POLL_SECONDS": POLL_SECONDS,
            "PYTHONUNBUFFERED": "1",
        }
        self.process_group = ProcessGroup(inherited_environment() | variables, LogFiles(scene))
        cli = ("-m", "app.cli")
        self.commands: dict[str, tuple[str, ...]] = {
            "api": (*cli, "api", "--port", str(self.ports["api"]), "--processes", "2"),
            "webhooks": (*cli, "webhooks", "--port", str(self.ports["webhooks"])),
            "sandbox": (
                *("-m", "app.sandbox", "--port", str(self.ports["sandbox"]), "--seed", str(seed), "--faults"),
                *("--memory", str(scene / "sandbox.sqlite"), "--webhook-secret", secret),
                *("--webhook-url", f"{self.http('webhooks')}/stripe"),
                *("--response-seconds", EVIDENCE_SECONDS, "--inquiry-seconds", EVIDENCE_SECONDS),
            ),
            **{name: ("-m", "procrastinate", "--app", "jobs.app", "worker", "--name", name) for name in WORKERS},
        }

    def http(self, name: str) -> str:
        """The address on which a process listens."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def open(self) -> None:
        """Start everything. Returns once all listen and the workers are registered."""
        for name, command in self.commands.items():
            self.process_group.start(name, *command)
        for name, port in self.ports.items():
            self.process_group.wait_for_port(name, port)
        with self.connect() as conn:
            self.process_group.wait_for(WORKERS[0], lambda: count_workers(conn) >= len(WORKERS))

    def connect(self) -> Connection:
        """A connection of the checks."""
        return psycopg.connect(harden(self.url, "deploy"), autocommit=True)

    def revive(self) -> list[str]:
        """Restart the processes that ended; returns their names."""
        return self.process_group.revive()

    def close(self) -> None:
        """End everything."""
        self.process_group.stop()


def prepare_database(server_url: str) -> str:
    """Create the database of a run on a server, with short delays; returns its address."""
    with psycopg.connect(harden(server_url, "deploy"), autocommit=True) as conn:
        create_database(conn, DATABASE)
    url = with_database(server_url, DATABASE)
    deploy(url)
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        shorten_delays(conn)
    return url


class SystemUnderTest(SuretyProcesses):
    """PostgreSQL, the proxy between it and Surety's processes, which the checks bypass, and these processes."""

    def __init__(self, scene: Path, seed: int) -> None:
        self.server = EmbeddedServer(durable=True)
        self.server.start()
        url = prepare_database(self.server.url)
        self.proxy = PostgresProxy(url, reset_seconds=KEEPALIVE_SECONDS)
        super().__init__(scene, seed, self.proxy.url, url)

    def kill_server(self) -> None:
        """Kill PostgreSQL's first process. Its backends end by themselves, some of them late."""
        assert self.server.process is not None
        self.server.process.kill()
        self.server.process.wait()

    def start_server(self) -> None:
        """Start it on the same data, as soon as the last server's processes are gone."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                self.server.restart("immediate")
            except EmbeddedServerError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def close(self) -> None:
        """End everything."""
        super().close()
        self.proxy.close()
        self.server.stop()
