"""Old and new processes beside each other under traffic: the way up, and the way back.

1. The old version has deployed; its API, receiver and worker run.
2. The new version deploys beside them.
3. The new processes start beside the old ones, then the old ones stop.
4. Back: the old processes start on the new version's database, then the new ones stop.

A client posts payments all the time. A request that finds no listener goes to the other one, as behind a load
balancer; any other answer than the payment's is a failed call.
"""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

from app.local.demo.services import POLL_SECONDS, inherited_environment, shorten_delays
from app.local.processes import free_port, is_listening
from app.web.keys import new_key
from db.connect import harden
from db.embedded.databases import temporary_database
from db.embedded.processes import die_with_parent, wait_until
from db.embedded.server import EmbeddedServer
from tests.support.payments import violations

ROLES = ("api", "webhooks", "worker")
START_SECONDS_MAX = 90.0
END_SECONDS_MAX = 180.0
PAUSE_SECONDS = 0.05
COUNTED = ("lost", "failed_calls", "not_ended", "violations", "logged_errors")
"""What must be empty in a result."""
LOGGED_ERROR = re.compile(r"^Traceback|\b(ERROR|CRITICAL)\b", re.MULTILINE)

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Version:
    """An installation: the folder of its code and its Python."""

    name: str
    folder: Path
    python: str


@dataclass
class RunningProcesses:
    """The processes of one version, by role."""

    version: Version
    environment: dict[str, str]
    ports: dict[str, int]
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *arguments: str) -> None:
        """A command of the version, to its end. Raises CalledProcessError."""
        subprocess.run(
            [self.version.python, *arguments], cwd=self.version.folder, env=self.environment, check=True,
            capture_output=True,
        )  # fmt: skip

    def start(self, role: str, *arguments: str) -> None:
        """Start a process and wait until it listens, if it has a port."""
        with (self.logs / f"{self.version.name}-{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(
                [self.version.python, *arguments], cwd=self.version.folder, env=self.environment, stdout=log,
                stderr=log, start_new_session=True, preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )  # fmt: skip
        port = self.ports.get(role)
        if port is not None and not wait_until(lambda: is_listening(port), START_SECONDS_MAX):
            raise AssertionError(f"{role} of {self.version.name} does not listen")

    def start_role(self, role: str) -> None:
        """Start one of ROLES."""
        if role == "worker":
            self.start(role, "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", self.version.name)
        else:
            self.start(role, "-m", "app.cli", role, "--port", str(self.ports[role]))

    def stop(self, role: str) -> None:
        """End a process in good order. Raises AssertionError if it fails."""
        process = self.processes.pop(role)
        process.terminate()
        status = process.wait(START_SECONDS_MAX)
        assert status == 0, f"{role} of {self.version.name} ended with {status}"

    def kill(self) -> None:
        """End whatever is left."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def errors(self) -> list[str]:
        """The errors in their logs."""
        return [
            f"{path.name}: {line}"
            for path in sorted(self.logs.glob(f"{self.version.name}-*.log"))
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if LOGGED_ERROR.search(line)
        ]


class Traffic:
    """A merchant that posts payments without pause, in a thread of its own."""

    def __init__(self, urls: list[str], key: str) -> None:
        self.urls = urls
        self.key = key
        self.acknowledged: list[str] = []
        self.failed: list[str] = []
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.work)

    def work(self) -> None:
        number = 0
        with httpx.Client(timeout=30, headers={"Authorization": f"Bearer {self.key}"}) as client:
            while not self.is_over.is_set():
                number += 1
                self.post(client, number)
                time.sleep(PAUSE_SECONDS)

    def post(self, client: httpx.Client, number: int) -> None:
        """One payment, at the first process that takes it."""
        body = {
            "amount": 1000 + number, "currency": "usd", "payment_method": {"type": "card", "token": "pm_card_visa"},
            "return_url": "https://shop.example/thanks",
        }  # fmt: skip
        errors = []
        turns = self.urls[number % len(self.urls) :] + self.urls[: number % len(self.urls)]
        for url in turns:
            try:
                answer = client.post(f"{url}/v1/payments", json=body, headers={"Idempotency-Key": f"order-{number}"})
            except httpx.TransportError as error:
                errors.append(repr(error))
                continue
            if answer.status_code == 201:
                self.acknowledged.append(answer.json()["id"])
            else:
                self.failed.append(f"{answer.status_code} {answer.text}")
            return
        self.failed.append("; ".join(errors))

    def until_acknowledged(self, more: int) -> int:
        """Wait for so many further payments; returns how many there are."""
        wanted = len(self.acknowledged) + more
        assert wait_until(lambda: len(self.acknowledged) >= wanted, END_SECONDS_MAX), self.failed[-3:]
        return len(self.acknowledged)


@contextmanager
def running(
    server_url: str, old: Version, new: Version, logs: Path
) -> Generator[tuple[RunningProcesses, RunningProcesses, str]]:
    """Both versions over one database, which the old one has deployed; a sandbox, and the old processes, run."""
    with temporary_database(server_url, "surety_test") as url:
        shared = {name: free_port(0) for name in ("webhooks", "sandbox")}
        secret = f"whsec_{secrets.token_hex(16)}"
        environment = inherited_environment() | {
            "DATABASE_URL": url,
            "STRIPE_WEBHOOK_SECRET": secret,
            "STRIPE_API_KEY": "sk_test_sandbox",
            "SURETY_SANDBOX_URL": f"http://127.0.0.1:{shared['sandbox']}",
            "SURETY_POLL_SECONDS": POLL_SECONDS,
            "PYTHONUNBUFFERED": "1",
        }
        both = [RunningProcesses(version, environment, shared | {"api": free_port(0)}, logs) for version in (old, new)]
        try:
            both[0].run("-m", "app.cli", "deploy")
            with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
                shorten_delays(conn)
            both[1].start(
                "sandbox", "-m", "app.sandbox", "--port", str(shared["sandbox"]), "--auto-payer",
                "--memory", str(logs / "sandbox.sqlite"), "--webhook-secret", secret,
                "--webhook-url", f"http://127.0.0.1:{shared['webhooks']}/stripe",
            )  # fmt: skip
            yield both[0], both[1], url
        finally:
            for each in both:
                each.kill()


def roll(old: Version, new: Version, logs: Path, *, payments: int) -> dict[str, Any]:
    """The way up and back, with so many payments in each phase; what was counted."""
    with (
        EmbeddedServer(durable=True) as server,
        running(server.url, old, new, logs) as (before, after, url),
        psycopg.connect(harden(url, "deploy"), autocommit=True) as conn,
    ):
        for role in ROLES:
            before.start_role(role)
        traffic = Traffic([f"http://127.0.0.1:{each.ports['api']}" for each in (before, after)], add_key(conn))
        traffic.thread.start()
        try:
            phases = {"old": traffic.until_acknowledged(payments)}
            after.run("-m", "app.cli", "deploy")
            phases["old, deployed"] = traffic.until_acknowledged(payments)
            replace(before, after, traffic, phases, payments)
            replace(after, before, traffic, phases, payments)
        finally:
            traffic.is_over.set()
            traffic.thread.join()
        unfinished = "select count(*) from surety.payments where state not in ('settled', 'failed', 'canceled')"
        wait_until(lambda: conn.execute(unfinished).fetchall() == [(0,)], END_SECONDS_MAX)
        [(not_ended,)] = conn.execute(unfinished).fetchall()
        stored = {id for (id,) in conn.execute("select id from surety.payments").fetchall()}
        for role in ROLES:
            before.stop(role)
        return {
            "old": old.name,
            "acknowledged": len(traffic.acknowledged),
            "lost": len(set(traffic.acknowledged) - stored),
            "failed_calls": traffic.failed,
            "not_ended": not_ended,
            "violations": violations(conn),
            "logged_errors": before.errors() + after.errors(),
            "phases": phases,
        }


def replace(
    leaving: RunningProcesses, coming: RunningProcesses, traffic: Traffic, phases: dict[str, int], payments: int
) -> None:
    """Start the processes of one version beside those of the other, which end then."""
    for role in ("api", "worker"):
        coming.start_role(role)
    phases[f"{leaving.version.name} and {coming.version.name}"] = traffic.until_acknowledged(payments)
    for role in ("api", "worker"):
        leaving.stop(role)
    # Both receivers have one address. Webhooks that find no listener are sent again.
    leaving.stop("webhooks")
    coming.start_role("webhooks")
    phases[f"{coming.version.name} after {leaving.version.name}"] = traffic.until_acknowledged(payments)


def add_key(conn: Connection) -> str:
    """A key of a new merchant."""
    [(merchant,)] = conn.execute("select surety.add_merchant('Acme Books', '')").fetchall()
    key = new_key(livemode=False)
    scopes = ["payments:write", "refunds:write", "disputes:write", "read"]
    conn.execute(
        "select surety.add_api_key(%s, %s, %s, 'test', 'rolling', %s::text[], '{}', null)",
        (merchant, key.hash, key.hint, scopes),
    )
    return key.text
