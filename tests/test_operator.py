"""What an operator sees and does: status and dead letters, by the command line as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

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


def make_dead_letter(conn: Connection) -> tuple[str, str]:
    """A payment whose event fails until it is given up on: the letter and the payment."""
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("update outbox.handlers set retry_after = '{0 s,0 s}'")
    while row := conn.execute("select batch_id, fence, event_ids from outbox.claim('submit', 'worker-1')").fetchone():
        failures = [
            {"event_id": event_id, "error": 'Stripe 400 parameter_invalid: currency "usx"'} for event_id in row[2]
        ]
        conn.execute("select outbox.fail(%s, %s, %s)", (row[0], row[1], json.dumps(failures)))
    letter = conn.execute("select id from outbox.dead_letters").fetchone()
    assert letter is not None
    return letter[0], payment_id


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


def test_a_dead_letter_is_seen_shown_and_replayed_once(conn: Connection, database: str) -> None:
    hire(conn)
    letter, payment_id = make_dead_letter(conn)
    code, state = judged(database)
    assert (code, state["findings"][0]["next"]) == (1, f"surety dead-letters show {letter}")
    listed = surety(database, "dead-letters", "list", "--error", "usx").stdout
    assert letter in listed and payment_id in listed
    assert "no dead letters" in surety(database, "dead-letters", "list", "--handler", "apply").stdout
    shown = surety(database, "dead-letters", "show", letter).stdout
    assert shown.count("  same  ") == 2 and "parameter_invalid" in shown and "initiated, 10000 usd" in shown

    dry = surety(database, "dead-letters", "replay", letter, "--reason", "mended", "--dry-run").stdout
    assert "would be replayed" in dry
    assert conn.execute("select count(*) from outbox.retries").fetchone() == (0,)
    assert "is due again" in surety(database, "dead-letters", "replay", letter, "--reason", "mended").stdout
    assert "closed already" in surety(database, "dead-letters", "replay", letter, "--reason", "mended").stdout
    assert conn.execute("select count(*) from outbox.retries where due_at is not null").fetchone() == (1,)
    told = conn.execute("select reason, count(*) from audit.entries where outcome = 'replayed' group by 1").fetchall()
    assert told == [("mended", 1)]


def test_a_dead_letter_closes_itself_when_its_payment_ends(conn: Connection) -> None:
    letter, payment_id = make_dead_letter(conn)
    record(conn, [fact(payment_id, "failed", "pi")])
    closed = conn.execute("select closed_as from outbox.dead_letters where id = %s", (letter,)).fetchone()
    assert closed == ("resolved",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dead-letters", "show", "dl_17"), "there is no dead letter dl_17"),
        (("dead-letters", "replay", "dl_17", "--reason", "x"), "there is no dead letter dl_17"),
        (("dead-letters", "replay", "dl_17"), "--reason"),
    ],
)
def test_a_mistake_is_told_in_a_line(database: str, arguments: tuple[str, ...], message: str) -> None:
    done = surety(database, *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
