"""What an operator sees: `surety status`, by the command line as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.letters import closed_as, end, unsent
from tests.payments import Connection, add_merchant, fact, pay, record


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
    conn.execute("select outbox.claim('submit', 'worker-1')")
    _, state = judged(database)
    assert [handler["backlog"] for handler in state["handlers"] if handler["handler"] == "submit"] == [3]


def test_a_critical_discrepancy_asks_for_action(conn: Connection, database: str) -> None:
    hire(conn)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("select outbox.claim('submit', 'worker-1')")
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency="eur")])
    code, state = judged(database)
    assert code == 2
    assert "critical" in state["findings"][0]["what"]


def test_a_dead_letter_is_a_reason_to_look_and_the_next_command_is_told(conn: Connection, database: str) -> None:
    hire(conn)
    letter, _ = unsent(conn)
    code, state = judged(database)
    assert (code, state["findings"][0]["next"]) == (1, f"surety dead-letters show {letter}")


def test_a_dead_letter_closes_itself_when_its_payment_ends(conn: Connection) -> None:
    letter, payment_id = unsent(conn)
    end(conn, payment_id)
    assert closed_as(conn, letter) == "resolved"
