"""What an operator sees: `surety status`, by the command line as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from app.cli.status import judge_promises
from app.status_findings import judge, judge_holder
from tests.support.dead_letters import closed_as, end, refused, unanswered, unsent
from tests.support.payments import Connection, add_merchant, fact, pay, record


def surety(database: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env=inherited | {"DATABASE_URL": database},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def hire(conn: Connection) -> None:
    """A worker that has just given a sign of life."""
    conn.execute("insert into procrastinate.procrastinate_workers default values")


def judged(database: str) -> tuple[int, dict[str, Any]]:
    done = surety(database, "status", "--json")
    return done.returncode, json.loads(done.stdout)


def test_an_idle_system_with_a_worker_is_good(conn: Connection, database: str) -> None:
    hire(conn)
    code, state = judged(database)
    assert (code, state["verdict"], state["findings"]) == (0, "good", [])
    assert "all is well" in surety(database, "status").stdout


def test_work_without_a_worker_asks_for_action(conn: Connection, database: str) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 3)
    code, state = judged(database)
    assert (code, state["verdict"]) == (2, "act")
    [submit] = [handler for handler in state["handlers"] if handler["handler"] == "submit"]
    assert submit["backlog"] == 3 and submit["oldest_seconds"] >= 0
    assert "procrastinate --app jobs.app worker" in surety(database, "status").stdout


def test_what_a_worker_holds_is_still_backlog(conn: Connection, database: str) -> None:
    hire(conn)
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 3)
    conn.execute("select outbox.claim_batch('submit', 'worker-1')")
    _, state = judged(database)
    assert [handler["backlog"] for handler in state["handlers"] if handler["handler"] == "submit"] == [3]


def test_a_critical_discrepancy_asks_for_action(conn: Connection, database: str) -> None:
    hire(conn)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("select outbox.claim_batch('submit', 'worker-1')")
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency="eur")])
    code, state = judged(database)
    assert code == 2
    assert "critical" in state["findings"][0]["what"]
    conn.execute("update surety.discrepancies set closed_at = now(), closed_because = 'explained' where is_critical")
    assert judged(database)[1]["discrepancies"]["critical"] == 0


def test_partitions_that_run_out_are_made_by_what_is_told(conn: Connection, database: str) -> None:
    hire(conn)
    _, state = judged(database)
    state["partitions_until"] = "000000000000"
    [finding] = [finding for finding in judge(state) if finding.what == "partitions run out"]
    conn.execute(finding.next.encode())


def test_a_dead_letter_is_a_reason_to_look_and_the_next_command_is_told(conn: Connection, database: str) -> None:
    hire(conn)
    letter, _ = unsent(conn)
    code, state = judged(database)
    assert (code, state["findings"][0]["next"]) == (1, f"surety dead-letters show {letter}")


def test_a_dead_letter_closes_itself_when_its_payment_ends(conn: Connection) -> None:
    letter, payment_id = unsent(conn)
    end(conn, payment_id)
    assert closed_as(conn, letter) == "resolved"


def test_no_payment_of_unknown_outcome_is_forgotten(conn: Connection, database: str) -> None:
    hire(conn)
    _, payment_id = unanswered(conn)
    _, state = judged(database)
    assert (state["unknown"]["count"], state["unknown"]["first"]) == (1, payment_id)
    assert (state["unfinished"]["id"], state["unfinished"]["state"]) == (payment_id, "submitting")
    assert f"oldest unfinished payment  {payment_id}" in surety(database, "status").stdout
    assert "unknown outcomes  1, the oldest" in surety(database, "status").stdout
    state["unknown"]["oldest_seconds"] = 301
    assert f"surety trace {payment_id}" in [finding.next for finding in judge(state)]


def test_an_answered_call_is_no_unknown_outcome(conn: Connection, database: str) -> None:
    hire(conn)
    refused(conn)
    assert judged(database)[1]["unknown"]["count"] == 0


def test_whatever_holds_things_back_is_named_whichever_database_it_is_in(
    conn: Connection, database: str, blank: str
) -> None:
    hire(conn)
    other = psycopg.connect(blank, application_name="a forgotten console")
    try:
        other.execute("select pg_current_xact_id()")
        _, state = judged(database)
        held = {holder["name"]: holder for holder in state["holders"]}
        assert held["a forgotten console"]["database"] == conninfo_to_dict(blank)["dbname"]
        assert "a forgotten console in " in surety(database, "status").stdout
        assert state["sees_all"] is True
        held["a forgotten console"]["seconds"] = 601
        [finding] = [finding for finding in judge(state) if "a forgotten console" in finding.what]
        conn.execute(finding.next.encode())
        with pytest.raises(psycopg.OperationalError):
            other.execute("select 1")
    finally:
        other.close()


def test_a_slot_that_nobody_reads_is_named_with_what_it_keeps(conn: Connection, database: str) -> None:
    hire(conn)
    name = f"forgotten_{os.getpid()}"
    conn.execute("select pg_create_physical_replication_slot(%s, true)", (name,))
    try:
        _, state = judged(database)
        [slot] = [holder for holder in state["holders"] if holder["name"] == name]
        assert (slot["kind"], slot["is_active"]) == ("replication slot", False)
        slot["wal_bytes"] = 2_000_000_000
        [finding] = [finding for finding in judge(state) if name in finding.what]
        assert "keeps 2.0 GB" in finding.what and f"pg_drop_replication_slot('{name}')" in finding.next
    finally:
        conn.execute("select pg_drop_replication_slot(%s)", (name,))


@pytest.mark.parametrize(
    ("holder", "urgency", "what"),
    [
        ({"kind": "prepared transaction", "name": "tx1", "seconds": 700.0}, 1, "tx1 has waited 12 min in other"),
        ({"kind": "transaction", "name": "psql", "seconds": 5.0, "xids": 200_000_000}, 2, "psql is open for 5 s"),
        ({"kind": "standby", "name": "s2", "database": None, "xids": 200_000_000}, 2, "the standby s2 holds back"),
        ({"kind": "transaction", "name": "psql", "seconds": 5.0}, 0, ""),
    ],
)
def test_what_holds_back_much_is_judged(holder: dict[str, Any], urgency: int, what: str) -> None:
    nothing = {"database": "other", "seconds": None, "xids": 3, "pid": 1, "is_active": False, "wal_bytes": None}
    finding = judge_holder(nothing | holder)
    assert (finding.urgency if finding else 0) == urgency
    assert what in (finding.what if finding else "")


def test_a_provider_that_is_out_is_told_with_when_it_is_asked_again(conn: Connection, database: str) -> None:
    hire(conn)
    assert "providers  not called yet" in surety(database, "status").stdout
    conn.execute("select surety.open_breaker('stripe', '', 'no answer within 20 s', 'worker:w')")
    code, state = judged(database)
    assert code == 1
    assert state["findings"][0]["what"].startswith("stripe is out for ")
    assert "providers  stripe open for " in surety(database, "status").stdout


def test_a_paused_handler_is_told_with_how_it_goes_on(conn: Connection, database: str) -> None:
    hire(conn)
    conn.execute("update outbox.handlers set paused_at = now() where handler = 'settle'")
    code, state = judged(database)
    assert (code, state["findings"][0]["what"]) == (1, "settle is paused")
    conn.execute(state["findings"][0]["next"].encode())
    assert judged(database)[0] == 0


def test_promises_are_counted_where_it_is_wanted(conn: Connection, database: str) -> None:
    hire(conn)
    done = surety(database, "status", "--check", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, set(told["violations"].values())) == (0, {0})
    assert len(judge_promises({"violations": {"debits equal credits": 2}})) == 1


def test_status_says_so_when_it_can_not_tell_how_things_stand(blank: str) -> None:
    for address, what, what_next in (
        (blank, "this database has no Surety", "surety deploy"),
        ("postgresql://localhost:1/none?connect_timeout=1", "PostgreSQL can't be reached", "DATABASE_URL"),
        ("", "DATABASE_URL is not set", "DATABASE_URL"),
    ):
        done = surety(address, "status")
        assert done.returncode == 2
        assert done.stdout.startswith("ACT    ") and what in done.stdout and what_next in done.stdout
        assert done.stderr == ""
        told = json.loads(surety(address, "status", "--json").stdout)
        assert (told["verdict"], len(told["findings"])) == ("act", 1)
