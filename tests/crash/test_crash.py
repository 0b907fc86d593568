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
from db.embedded.processes import wait_until
from db.embedded.server import EmbeddedServer
from tests.crash.checks import find_differences
from tests.crash.kills import KIND_WEIGHTS, KINDS, children_of
from tests.crash.retrying_client import expected_refusal
from tests.support.http_client import running_server
from tests.support.payments import Connection, add_merchant, pay
from tests.support.postgres_proxy import proxied
from tests.support.sandbox_process import running_sandbox
from tests.support.workers import in_process_worker, run_until_idle

ROOT = Path(__file__).parent.parent.parent
KILLED_KINDS = ("half_open", "worker", "postmaster", "listener")


def test_four_kills_lose_nothing_and_charge_no_payment_twice() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.crash", "--cycles", "4"),
            *("--kinds", ",".join(KILLED_KINDS), "--seed", "7", "--json"),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert {kind: count for kind, count in result["kills"].items() if count} == dict.fromkeys(KILLED_KINDS, 1)
    assert result["acknowledged"] >= len(KILLED_KINDS)
    assert result["refunds"] > 0 and result["disputes"]
    assert result["customers"] > 0 and result["off_session"] > 0 and result["decisions"]
    assert result["refused"]["limit-exceeded"] > 0
    broken = ("lost", "double_charges", "double_refunds", "violations", "not_ended")
    assert {name: result[name] for name in broken} == dict.fromkeys(broken, 0)


def test_only_refusals_that_a_valid_request_can_get_are_expected() -> None:
    def refusal(name: str, **more: object) -> str | None:
        return expected_refusal(httpx.Response(400, json={"type": f"/problems/{name}", **more}))

    assert refusal("wrong-state") == "wrong-state"
    assert refusal("balance-too-low") == "balance-too-low"
    assert refusal("limit-exceeded") == "limit-exceeded"
    assert refusal("invalid-request", errors=[{"field": "/amount", "rule": "maximum"}]) == "invalid-request"
    assert refusal("invalid-request", errors=[{"field": "/amount", "rule": "minimum"}]) is None
    assert refusal("not-found") is None


async def test_object_known_only_to_the_provider_is_a_difference(
    conn: Connection, database: str, tmp_path: Path
) -> None:
    _, key = add_merchant(conn)
    pay(conn, key)
    with running_sandbox(tmp_path) as sandbox:
        async with in_process_worker(database, sandbox.url) as worker:
            await run_until_idle(worker)
        assert find_differences(conn, sandbox.url) == {}
        row = conn.execute("select provider_id from surety.payments").fetchone()
        assert row is not None
        sandbox.control("refunds", {"payment_intent": row[0], "amount": 100})
        refunds = {"refunded at the provider = refunded here": 1, "a refund's status is the provider's": 1}
        assert find_differences(conn, sandbox.url) == refunds
        sandbox.control("disputes", {"payment_intent": row[0]})
        assert find_differences(conn, sandbox.url) == refunds | {"a dispute's status is the provider's": 1}


def test_kill_kinds_have_their_shares() -> None:
    assert sum(KIND_WEIGHTS.values()) == 20
    assert KIND_WEIGHTS.keys() == KINDS.keys()
    assert [KIND_WEIGHTS[kind] * 5 for kind in ("worker", "listener", "postmaster", "half_open")] == [40, 15, 10, 5]


def test_processes_end_with_a_killed_parent_and_free_the_port(database: str) -> None:
    with running_server("api", database, "--processes", "2") as first:
        assert wait_until(lambda: len(children_of(first.process.pid)) == 2, 10)
        family = children_of(first.process.pid)
        first.process.send_signal(signal.SIGKILL)
        first.process.communicate()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 10)
    port = first.url.rpartition(":")[2]
    with running_server("api", database, "--port", port) as second:
        assert second.url == first.url


def test_half_open_connection_is_silent_at_both_ends(server: str) -> None:
    with proxied(server) as proxy:
        assert not proxy.silence(0.5)
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            connection.settimeout(0.3)
            assert ask_for_tls(connection) in {b"N", b"S"}
            assert proxy.silence(0.5)
            assert ask_for_tls(connection) is None


def test_server_sets_keepalives_for_lost_clients() -> None:
    port = str(free_port(0))
    with EmbeddedServer(settings={"listen_addresses": "127.0.0.1", "port": port}):
        where = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        with psycopg.connect(harden(where, "worker")) as conn:
            asked = ("idle", "interval", "count")
            output = [conn.execute(f"show tcp_keepalives_{name}".encode()).fetchone() for name in asked]
            assert output == [("10",), ("5",), ("3",)]
            assert conn.execute("show tcp_user_timeout").fetchone() == ("10000",)


def ask_for_tls(connection: socket.socket) -> bytes | None:
    """PostgreSQL's answer to the question that clients begin with; None if there is silence."""
    connection.sendall(bytes.fromhex("0000000804d2162f"))
    try:
        return connection.recv(1)
    except TimeoutError:
        return None
