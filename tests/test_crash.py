"""Processes killed under load, a handful of times; `python -m tests.crash --cycles 200` is the long run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psycopg

from app.processes import free_port
from db.connect import harden
from db.server import PORT, EmbeddedServer, wait_until
from tests.crash.kills import CARDS, KINDS, children_of
from tests.crash.proxy import Proxy
from tests.front import service

ROOT = Path(__file__).parent.parent
HANDFUL = ("half_open", "worker", "postmaster", "api")


def test_a_handful_of_kills_loses_nothing_and_charges_nobody_twice() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--cycles", "4", "--kinds", ",".join(HANDFUL), "--seed", "7", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert {kind: count for kind, count in result["kills"].items() if count} == dict.fromkeys(HANDFUL, 1)
    assert result["acknowledged"] >= len(HANDFUL)
    assert (result["lost"], result["double_charges"], result["violations"], result["not_ended"]) == (0, 0, 0, 0)


def test_the_lots_have_their_shares() -> None:
    assert sum(CARDS.values()) == 20
    assert CARDS.keys() == KINDS.keys()
    assert [CARDS[kind] * 5 for kind in ("worker", "api", "postmaster", "half_open")] == [40, 15, 10, 5]


def test_several_processes_end_with_a_killed_parent_and_leave_the_port_free(database: str) -> None:
    with service("api", database, "--processes", "2") as first:
        assert wait_until(lambda: len(children_of(first.process.pid)) == 2, 10)
        family = children_of(first.process.pid)
        first.process.send_signal(signal.SIGKILL)
        first.process.communicate()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 10)
    port = first.url.rpartition(":")[2]
    with service("api", database, "--port", port) as second:
        assert second.url == first.url


def test_of_a_cut_connection_neither_end_is_told() -> None:
    with EmbeddedServer() as server:
        proxy = Proxy(f"{server.socket_folder}/.s.PGSQL.{PORT}")
        try:
            assert not proxy.cut(0.5)
            with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
                connection.settimeout(0.3)
                assert ask_for_tls(connection) == b"N"
                assert proxy.cut(0.5)
                assert ask_for_tls(connection) is None
        finally:
            proxy.stop()


def test_the_server_too_notices_a_client_that_is_gone() -> None:
    port = str(free_port(0))
    with EmbeddedServer(settings={"listen_addresses": "127.0.0.1", "port": port}):
        where = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        with psycopg.connect(harden(where, "worker")) as conn:
            asked = ("idle", "interval", "count")
            told = [conn.execute(f"show tcp_keepalives_{name}".encode()).fetchone() for name in asked]
            assert told == [("10",), ("5",), ("3",)]
            assert conn.execute("show tcp_user_timeout").fetchone() == ("10000",)


def ask_for_tls(connection: socket.socket) -> bytes | None:
    """PostgreSQL's answer to the question that clients begin with; None if there is silence."""
    connection.sendall(bytes.fromhex("0000000804d2162f"))
    try:
        return connection.recv(1)
    except TimeoutError:
        return None
