"""Processes killed under load, a handful of times; `python -m tests.crash --cycles 200` is the long run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psycopg

from app.local.processes import free_port
from db.connect import harden
from db.embedded import PORT, EmbeddedServer, wait_until
from tests.crash.correspondence import refusal_of
from tests.crash.kills import CARDS, KINDS, children_of
from tests.crash.proxy import Proxy
from tests.crash.questions import compare
from tests.support.http_client import service
from tests.support.payments import Connection, add_merchant, pay
from tests.support.sandbox_process import running_sandbox
from tests.support.workers import work_off, worker_here

ROOT = Path(__file__).parent.parent.parent
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
    assert result["refunds"] > 0 and result["disputes"]
    broken = ("lost", "double_charges", "double_refunds", "violations", "not_ended")
    assert {name: result[name] for name in broken} == dict.fromkeys(broken, 0)


def test_what_a_sound_request_can_meet_is_no_wrong_answer_and_all_else_is() -> None:
    def refusal(name: str, **more: object) -> str | None:
        return refusal_of(httpx.Response(400, json={"type": f"/problems/{name}", **more}))

    assert refusal("wrong-state") == "wrong-state"
    assert refusal("balance-too-low") == "balance-too-low"
    assert refusal("invalid-request", errors=[{"field": "/amount", "rule": "maximum"}]) == "invalid-request"
    assert refusal("invalid-request", errors=[{"field": "/amount", "rule": "minimum"}]) is None
    assert refusal("not-found") is None


async def test_what_only_the_provider_knows_is_a_difference(conn: Connection, database: str, tmp_path: Path) -> None:
    _, key = add_merchant(conn)
    pay(conn, key)
    with running_sandbox(tmp_path) as sandbox:
        async with worker_here(database, sandbox.url) as worker:
            await work_off(worker)
        assert compare(conn, sandbox.url) == {}
        row = conn.execute("select provider_id from surety.payments").fetchone()
        assert row is not None
        sandbox.control("refunds", {"payment_intent": row[0], "amount": 100})
        refunds = {"refunded at the provider = refunded here": 1, "a refund stands as the provider has it": 1}
        assert compare(conn, sandbox.url) == refunds
        sandbox.control("disputes", {"payment_intent": row[0]})
        assert compare(conn, sandbox.url) == refunds | {"a dispute stands as the provider has it": 1}


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
