"""Recovery from base backup and archive (docs/backup.md): closed until `surety restored` or `surety drill`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import create_database
from db.embedded.server import EmbeddedServer
from tests.cli.test_status import read_status
from tests.db.test_restore import claim_all, events_of
from tests.support.operators import admin_key
from tests.support.payments import Connection, add_merchant, create, pay, request, violations
from tests.support.recovery import ArchivingServer, RecoveredServer
from tests.support.sandbox_process import LIVE_KEY, SandboxProcess, eventually
from tests.support.standby import StandbyServer
from tests.support.workers import in_process_worker, run_until_idle

ROOT = Path(__file__).parent.parent.parent
REAL_KEY = "sk_live_51secret"


class Recovered(NamedTuple):
    """A server recovered to a time between payments, with its databases `surety` and, the same, `copy`."""

    server: EmbeddedServer
    key_hash: bytes
    kept: list[str]
    lost: list[str]

    def url(self, name: str = "surety") -> str:
        return self.server.database_url(name)


def connect_to(url: str) -> Connection:
    return psycopg.connect(harden(url, "deploy"), autocommit=True)


def live_database(server: EmbeddedServer) -> str:
    """The address of a database in live mode."""
    with psycopg.connect(server.url, autocommit=True) as conn:
        conn.execute("create database surety template template0")
    url = server.database_url("surety")
    deploy(url)
    with connect_to(url) as conn:
        conn.execute("select surety.set_livemode(true)")
    return url


@pytest.fixture(scope="module")
def recovered() -> Iterator[Recovered]:
    """Payments before the base backup, after it, and after the time to which the log is replayed."""
    with ArchivingServer() as origin:
        with connect_to(live_database(origin)) as conn:
            _, key_hash = add_merchant(conn)
            kept = pay(conn, key_hash, 3)
            claim_all(conn, "submit")
            origin.back_up()
            kept += pay(conn, key_hash, 2)
            [(until,)] = conn.execute("select clock_timestamp()::text").fetchall()
            lost = pay(conn, key_hash, 4)
        origin.archive_log()
        with RecoveredServer(origin, until) as server:
            server.wait_until_recovered()
            with psycopg.connect(server.url, autocommit=True) as conn:
                create_database(conn, "copy", "surety")
            yield Recovered(server, key_hash, kept, lost)


def surety(url: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`surety …` as a process."""
    return run_python(url, "-m", "app.cli", *words, **more)


def run_python(url: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    known = {"PATH": os.environ["PATH"], "DATABASE_URL": url, **more}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=known, capture_output=True, text=True, timeout=120, check=False
    )


def worker_with_a_real_key(url: str) -> subprocess.CompletedProcess[str]:
    """A worker with a live key of Stripe's, which ends by itself."""
    return run_python(url, "-m", "procrastinate", "--app", "jobs.app", "worker", STRIPE_API_KEY=REAL_KEY)


def test_recovered_copy_with_real_keys_does_no_business_until_it_is_said_what_it_is(recovered: Recovered) -> None:
    url = recovered.url()
    with connect_to(url) as conn:
        present = [row[0] for row in conn.execute("select id from surety.payments order by id")]
        assert present == sorted(recovered.kept)
        for refused in (
            lambda: create(conn, [request(recovered.key_hash)]),
            lambda: conn.execute("select * from outbox.claim_batch('submit', 'test')"),
        ):
            with pytest.raises(psycopg.DatabaseError, match="restored from a backup") as refusal:
                refused()
            assert refusal.value.sqlstate == "SU005"
    ended = worker_with_a_real_key(url)
    assert ended.returncode == 1
    assert "restored from a backup, or a standby took over" in ended.stderr and "`surety drill`" in ended.stderr
    assert "started" not in ended.stderr and "Traceback" not in ended.stderr.replace("secret", "")
    code, state = read_status(url)
    [finding] = [finding for finding in state["findings"] if finding["id"] == "restored-elsewhere"]
    assert code == 2 and "restored from a backup" in finding["what"]


async def test_restored_database_goes_on_with_what_it_knows(recovered: Recovered, tmp_path: Path) -> None:
    url = recovered.url()
    done = surety(url, "restored", "--reason", "a test")
    assert (done.returncode, done.stdout) == (0, "restore generation 2 is open\n"), done.stderr
    assert "nothing to do" in surety(url, "restored", "--reason", "again").stdout
    refused = surety(url, "drill", "--reason", "a mistake")
    assert refused.returncode == 1 and "it is open for business" in refused.stderr
    sandbox = SandboxProcess(tmp_path, "--live", "--auto-payer")
    try:
        with connect_to(url) as conn:
            later = pay(conn, recovered.key_hash)
            # Their events were claimed without any work, before the backup.
            conn.execute(
                "insert into outbox.retries (handler, event_id, due_at) select 'submit', id, now() from outbox.events"
                " where type = 'payment.initiated' on conflict do nothing"
            )
            async with in_process_worker(url, sandbox.url, STRIPE_API_KEY=LIVE_KEY) as worker:
                await run_until_idle(worker)
            states: dict[str, str] = dict(conn.execute("select id, state from surety.payments").fetchall())
            assert states.keys() == {*recovered.kept, *later}
            assert {*states.values()} <= {"confirmed", "settled", "processing"}
            assert violations(conn) == {}
        intents = sandbox.get("/v1/payment_intents", {"limit": 100})["data"]
        assert sorted(intent["metadata"]["surety_payment"] for intent in intents) == sorted(states)
    finally:
        sandbox.stop()


def test_copy_of_a_drill_calls_no_provider_and_never_does_business(recovered: Recovered) -> None:
    url = recovered.url("copy")
    done = surety(url, "drill", "--reason", "the yearly drill")
    assert done.returncode == 0 and done.stdout.startswith("restore generation 2 is open, for a drill"), done.stderr
    assert "nothing to do" in surety(url, "drill", "--reason", "again").stdout
    ended = worker_with_a_real_key(url)
    assert ended.returncode == 1 and "this database is a copy, opened by `surety drill`" in ended.stderr
    refused = surety(url, "restored", "--reason", "a mistake")
    assert refused.returncode == 1 and "it can never do business" in refused.stderr
    with connect_to(url) as conn:
        assert conn.execute("select outbox.provider_refusal(true)").fetchone() == (None,)
        pay(conn, recovered.key_hash)
        assert len(claim_all(conn, "submit")) == len(events_of(conn, "payment.initiated")) - 3
    _, state = read_status(url)
    assert "drill-copy" in [finding["id"] for finding in state["findings"]]
    assert "restored-elsewhere" not in [finding["id"] for finding in state["findings"]]


@pytest.fixture
def standby() -> Iterator[tuple[str, StandbyServer]]:
    """The address of a database in live mode, and a standby of its server."""
    with EmbeddedServer(durable=True) as primary:
        url = live_database(primary)
        with StandbyServer(primary) as standby:
            yield url, standby


def test_standby_takes_over_by_itself_only_where_servers_are_listed(standby: tuple[str, StandbyServer]) -> None:
    url, other = standby
    key = admin_key(url)
    refused = surety(url, "servers", "10.0.0.7", SURETY_OPERATOR_KEY=key)
    assert refused.returncode == 1 and "this server, local, must be one of them" in refused.stderr
    assert "unlisted-standby" in [finding["id"] for finding in read_status(url)[1]["findings"]]
    # Both servers are reached over Unix sockets, so one name stands for both.
    done = surety(url, "servers", "local", "10.0.0.7", SURETY_OPERATOR_KEY=key)
    assert (done.returncode, done.stdout) == (0, "10.0.0.7\nlocal (this server)\n"), done.stderr
    with connect_to(url) as conn:
        _, key_hash = add_merchant(conn)
        done_by_operators = conn.execute("select outcome from audit.entries where kind = 'operator'").fetchall()
        assert ("servers of business set",) in done_by_operators
        assert "unlisted-standby" not in [finding["id"] for finding in read_status(url)[1]["findings"]]
        [(end,)] = conn.execute("select pg_current_wal_lsn()").fetchall()
    over = other.database_url("surety")
    with psycopg.connect(over, autocommit=True) as conn:
        eventually(lambda: conn.execute("select pg_last_wal_replay_lsn() >= %s", (end,)).fetchone() == (True,), 30)
        assert conn.execute("select outbox.closed_because(outbox.restore_generation())").fetchone() == (None,)
        conn.execute("select pg_promote()")
    with connect_to(over) as conn:
        pay(conn, key_hash)
        conn.execute("delete from outbox.business_servers where address = 'local'")
        with pytest.raises(psycopg.DatabaseError, match="not listed as a server of business"):
            pay(conn, key_hash)
        conn.execute("delete from outbox.business_servers")
        with pytest.raises(psycopg.DatabaseError, match="a standby took over that is not listed"):
            pay(conn, key_hash)
        assert conn.execute("select outbox.begin_restore_generation('a takeover')").fetchone() == (2,)
        pay(conn, key_hash)


def test_timeline_closes_no_database_in_test_mode(conn: Connection) -> None:
    conn.execute("update outbox.restore_generations set timeline = timeline + 1")
    pay(conn, add_merchant(conn)[1])
    assert conn.execute("select outbox.begin_restore_generation('a test')").fetchone() == (2,)
