"""What an operator sees: `surety status`, by the command line as it is."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict

from app.cli import cli
from app.cli.status import find_broken_invariants
from app.status_findings import find_problems, find_vacuum_blocker
from tests.support.dead_letters import closed_as, end, never_sent_letter, refused, unanswered
from tests.support.operators import admin_key
from tests.support.payments import Connection, add_merchant, fact, pay, record, record_results


def surety(
    database: str, *arguments: str, operator_key: str | None = None, reader: str = ""
) -> subprocess.CompletedProcess[str]:
    """`surety …` of a further admin, or of the holder of a key; `reader` is the address of a replica."""
    # Reading needs no key, and works where no key can be made.
    is_reading = arguments[0] in {"status", "trace", "deploy"}
    settings = {} if is_reading else {"SURETY_OPERATOR_KEY": operator_key or admin_key(database)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env=inherited | {"DATABASE_URL": database, "SURETY_READER_DATABASE_URL": reader} | settings,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def add_live_worker(conn: Connection) -> None:
    """A worker that has just given a sign of life."""
    conn.execute("insert into procrastinate.procrastinate_workers default values")


def read_status(database: str, *, reader: str = "") -> tuple[int, dict[str, Any]]:
    done = surety(database, "status", "--json", reader=reader)
    return done.returncode, json.loads(done.stdout)


def test_idle_system_with_a_worker_is_healthy(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    code, state = read_status(database)
    assert (code, state["verdict"], state["findings"]) == (0, "good", [])
    assert "all is well" in surety(database, "status").stdout


def test_misspelt_variable_is_the_one_to_correct(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("SURETY_TRUSTED_PROXY", "1")
    result = CliRunner().invoke(cli, ["status", "--json"])
    [finding] = json.loads(result.output)["findings"]
    assert (finding["id"], "SURETY_TRUSTED_PROXY" in finding["what"]) == ("settings-invalid", True)
    assert finding["next"] == "correct the variable that the text names"


def test_refused_keys_and_webhooks_are_countable(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    conn.execute("select surety.count_refusals('webhook', '{\"no-signature\": 3}')")
    code, state = read_status(database)
    [refused] = state["refusals"]
    assert (code, refused["kind"], refused["reason"], refused["day_count"]) == (0, "webhook", "no-signature", 3)
    assert "3 in 24 h" in surety(database, "status").stdout


def test_work_without_a_worker_asks_for_action(conn: Connection, database: str) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 3)
    code, state = read_status(database)
    assert (code, state["verdict"]) == (2, "act")
    [submit] = [handler for handler in state["handlers"] if handler["handler"] == "submit"]
    assert submit["backlog"] == 3 and submit["oldest_seconds"] >= 0
    assert "procrastinate --app jobs.app worker" in surety(database, "status").stdout


def test_leased_events_count_as_backlog(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 3)
    conn.execute("select outbox.claim_batch('submit', 'worker-1')")
    _, state = read_status(database)
    assert [handler["backlog"] for handler in state["handlers"] if handler["handler"] == "submit"] == [3]


def test_a_critical_discrepancy_asks_for_action(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("select outbox.claim_batch('submit', 'worker-1')")
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency="eur")])
    code, state = read_status(database)
    assert code == 2
    [finding, *_] = state["findings"]
    assert "critical" in finding["what"]
    show = shlex.split(finding["next"])[1:]
    assert surety(database, *show).returncode == 0
    assert surety(database, "discrepancies", "resolve", show[-1], "--reason", "explained").returncode == 0
    assert read_status(database)[1]["discrepancies"]["critical"] == 0


def test_suggested_command_creates_missing_partitions(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    _, state = read_status(database)
    until = datetime.fromisoformat(state["partitions_until"]) - datetime.fromisoformat(state["at"])
    assert state["partitions_until"].endswith("-01T00:00:00.000Z")
    assert timedelta(days=60) < until < timedelta(days=125)
    state["partitions_until"] = "1970-01-01T00:00:00.000Z"
    [finding] = [finding for finding in find_problems(state) if finding.what == "partitions run out"]
    conn.execute(finding.next.encode())


def test_database_of_an_earlier_time_asks_for_a_new_restore_generation(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    pay(conn, add_merchant(conn)[1])
    with conn.transaction():
        conn.execute("set local session_replication_role = replica")
        conn.execute("update outbox.events set xid = '1000000000000'")
    assert "restored-elsewhere" in [finding["id"] for finding in read_status(database)[1]["findings"]]
    conn.execute("select outbox.begin_restore_generation('a test')")
    assert "restored-elsewhere" not in [finding["id"] for finding in read_status(database)[1]["findings"]]


def test_dead_letter_is_a_finding_with_its_next_command(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    letter, _ = never_sent_letter(conn)
    code, state = read_status(database)
    assert (code, state["findings"][0]["next"]) == (1, f"surety dead-letters show {letter}")


def test_a_dead_letter_closes_itself_when_its_payment_ends(conn: Connection) -> None:
    letter, payment_id = never_sent_letter(conn)
    end(conn, payment_id)
    assert closed_as(conn, letter) == "resolved"


def test_payments_of_unknown_outcome_are_reported(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    _, payment_id = unanswered(conn)
    _, state = read_status(database)
    assert (state["unknown"]["count"], state["unknown"]["first"]) == (1, payment_id)
    assert (state["unfinished"]["id"], state["unfinished"]["state"]) == (payment_id, "submitting")
    assert f"oldest unfinished payment  {payment_id}" in surety(database, "status").stdout
    assert "unknown outcomes  1, the oldest" in surety(database, "status").stdout
    state["unknown"]["oldest_seconds"] = 301
    assert f"surety trace {payment_id}" in [finding.next for finding in find_problems(state)]


def test_answered_call_is_not_an_unknown_outcome(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    refused(conn)
    assert read_status(database)[1]["unknown"]["count"] == 0


def test_vacuum_blockers_are_named_in_any_database(conn: Connection, database: str, blank: str) -> None:
    add_live_worker(conn)
    other = psycopg.connect(blank, application_name="a forgotten console")
    try:
        other.execute("select pg_current_xact_id()")
        _, state = read_status(database)
        held = {holder["name"]: holder for holder in state["holders"]}
        assert held["a forgotten console"]["database"] == conninfo_to_dict(blank)["dbname"]
        assert "a forgotten console in " in surety(database, "status").stdout
        assert state["sees_all"] is True
        held["a forgotten console"]["seconds"] = 601
        [finding] = [finding for finding in find_problems(state) if "a forgotten console" in finding.what]
        conn.execute(finding.next.encode())
        with pytest.raises(psycopg.OperationalError):
            other.execute("select 1")
    finally:
        other.close()


def test_unused_replication_slot_is_named_with_its_retained_size(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    name = f"forgotten_{os.getpid()}"
    conn.execute("select pg_create_physical_replication_slot(%s, true)", (name,))
    try:
        _, state = read_status(database)
        [slot] = [holder for holder in state["holders"] if holder["name"] == name]
        assert (slot["kind"], slot["is_active"]) == ("replication slot", False)
        slot["wal_bytes"] = 2_000_000_000
        [finding] = [finding for finding in find_problems(state) if name in finding.what]
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
def test_large_vacuum_delay_changes_the_verdict(holder: dict[str, Any], urgency: int, what: str) -> None:
    nothing = {"database": "other", "seconds": None, "xids": 3, "pid": 1, "is_active": False, "wal_bytes": None}
    finding = find_vacuum_blocker(nothing | holder)
    assert (finding.urgency if finding else 0) == urgency
    assert what in (finding.what if finding else "")


def test_provider_outage_is_reported_with_the_next_probe_time(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    assert "providers  not called yet" in surety(database, "status").stdout
    conn.execute("select surety.open_circuit('stripe', '', 'outage', 'no answer within 20 s', 'worker:w')")
    code, state = read_status(database)
    assert code == 1
    assert state["findings"][0]["what"].startswith("stripe is out for ")
    assert "providers  stripe unreachable for " in surety(database, "status").stdout


def test_paused_handler_is_reported_with_the_command_to_resume(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    assert surety(database, "handlers", "pause", "expect_settlement", "--reason", "the bank is closed").returncode == 0
    code, state = read_status(database)
    assert (code, state["findings"][0]["what"]) == (1, "expect_settlement is paused")
    assert surety(database, *shlex.split(state["findings"][0]["next"])[1:]).stdout == "expect_settlement is active\n"
    assert read_status(database)[0] == 0


def test_invariants_are_checked_on_request(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    done = surety(database, "status", "--check", "--json")
    invariants = json.loads(done.stdout)["invariants"]
    assert (done.returncode, {each["violations"] for each in invariants}) == (0, {0})
    [broken, *_] = invariants
    [finding] = find_broken_invariants({"invariants": [broken | {"violations": 2}]})
    assert (finding.urgency, finding.what) == (2, f"2 violations of: {broken['name']}")
    assert conn.execute(finding.next.encode()).fetchall() == []


def test_status_reports_when_it_cannot_read_the_database(blank: str) -> None:
    for address, what, what_next in (
        (blank, "this database has no Surety", "surety deploy"),
        ("postgresql://localhost:1/none?connect_timeout=1", "PostgreSQL can't be reached", "DATABASE_URL"),
        ("", "DATABASE_URL is not set", "DATABASE_URL"),
    ):
        done = surety(address, "status")
        assert done.returncode == 2
        assert done.stdout.startswith("ACT    ") and what in done.stdout and what_next in done.stdout
        assert done.stderr == ""
        output = json.loads(surety(address, "status", "--json").stdout)
        assert (output["verdict"], len(output["findings"])) == ("act", 1)


def answer_creations(conn: Connection, key_hash: bytes, *statuses: int) -> list[str]:
    """New payments whose creations were answered with these statuses, 400 as a refusal."""
    ids = pay(conn, key_hash, len(statuses))
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch('submit', 'worker-1')").fetchone()
    assert row is not None
    begun = "select event_id, payment_id from surety.begin_calls(%s, %s, 'create', 'worker:w')"
    events = {payment_id: event_id for event_id, payment_id in conn.execute(begun, row[:2]).fetchall()}
    for payment_id, status in zip(ids, statuses, strict=True):
        result = {"event_id": events[payment_id], "payment_id": payment_id, "operation": "create", "status": status}
        refusal = {"code": "parameter_unknown", "message": "Received unknown parameter: colour"}
        result |= {"outcome": "refused", "refused": refusal} if status == 400 else {"outcome": "answered"}
        record_results(conn, row[0], row[1], [result])
    return ids


def findings_about_refused_payments(database: str) -> list[dict[str, Any]]:
    return [found for found in read_status(database)[1]["findings"] if found["id"] == "refused-payments"]


@pytest.mark.parametrize(
    ("statuses", "is_found"),
    [((400,) * 4, False), ((400,) * 5, True), ((400,) * 5 + (200,) * 5, False), ((400,) * 6 + (200,) * 5, True)],
)
def test_most_payments_of_an_account_refused_is_an_urgent_finding(
    conn: Connection, database: str, statuses: tuple[int, ...], *, is_found: bool
) -> None:
    add_live_worker(conn)
    _, healthy = add_merchant(conn, account="acct_healthy")
    _, broken = add_merchant(conn, account="acct_broken")
    answer_creations(conn, healthy, *(200,) * 9)
    ids = answer_creations(conn, broken, *statuses)
    found = findings_about_refused_payments(database)
    assert len(found) == is_found
    if found:
        refused = statuses.count(400)
        assert (
            f"stripe refused {refused} of the last {len(statuses)} payments of account acct_broken" in found[0]["what"]
        )
        assert "parameter_unknown: Received unknown parameter: colour" in found[0]["what"]
        assert found[0]["urgency"] == 2
        assert found[0]["next"].removeprefix("surety trace ") in ids[:refused]


def test_refused_payments_are_no_finding_after_fifteen_minutes(conn: Connection, database: str) -> None:
    add_live_worker(conn)
    _, key_hash = add_merchant(conn)
    answer_creations(conn, key_hash, *(400,) * 9)
    assert "the platform's account" in findings_about_refused_payments(database)[0]["what"]
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute("insert into surety.clock (ahead) values ('16 minutes')")
    assert findings_about_refused_payments(database) == []
