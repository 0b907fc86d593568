"""Events that are given back uncounted: each cause is declared, has growing delays, and is reported by a finding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from app.finding import FindingId
from app.status_findings import find_problems
from db import BEHAVIOUR_FILES
from jobs.stripe.errors import ReleaseCause
from tests.support.payments import Connection, add_merchant, command, pay, record_results

ROOT = Path(__file__).parent.parent.parent
CAUSES: tuple[ReleaseCause, ...] = get_args(ReleaseCause)
CALLERS_OF_RELEASE = {
    "db/sql/provider/circuit_breaker.sql",
    "db/sql/provider/results.sql",
    "jobs/drain.py",
}
"""Each gives a cause: a literal, or the release_cause of a result, which only these files set."""
SETTERS_OF_CAUSES = {
    "db/sql/provider/circuit_breaker.sql",
    "db/sql/provider/results.sql",
    "jobs/handlers/calls.py",
    "jobs/handlers/customers.py",
    "jobs/handlers/webhooks.py",
}


def move_clock(conn: Connection, ahead: str) -> None:
    """Move the test database's clock."""
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update set ahead = excluded.ahead", (ahead,)
    )


def release(conn: Connection, cause: str) -> float:
    """Claim the one due event and give it back; the seconds until it is due again."""
    conn.execute("update outbox.retries set due_at = surety.time_now()")
    claim = "select batch_id, fence, event_ids from outbox.claim_batch('submit', 'w')"
    [(batch, fence, event_ids)] = conn.execute(claim).fetchall()
    query = "select outbox.release_events(%s, %s, %s, '0 s', %s, 'not now')"
    assert conn.execute(query, (batch, fence, event_ids, cause)).fetchone() == (True,)
    [(seconds,)] = conn.execute(
        "select extract(epoch from due_at - surety.time_now())::float from outbox.retries"
    ).fetchall()
    return float(seconds)


def findings(conn: Connection) -> dict[str, int]:
    """The ids of the findings, each with its urgency."""
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    return {finding.id: finding.urgency for finding in find_problems(state)}


def sources() -> dict[str, str]:
    """The product's sources by their paths."""
    paths = [ROOT / "db" / "sql" / f"{name}.sql" for name in BEHAVIOUR_FILES] + sorted((ROOT / "jobs").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_every_cause_is_a_row_with_a_finding_and_every_row_is_used(conn: Connection) -> None:
    rows = conn.execute("select cause, finding from outbox.release_causes").fetchall()
    assert {cause for cause, _ in rows} == set(CAUSES)
    assert {finding for _, finding in rows} <= set(get_args(FindingId))
    texts = sources()
    literals = texts.pop("jobs/stripe/errors.py").replace(f"{CAUSES}", "")
    code = literals.partition("ReleaseCause = Literal[")[2].partition("]")[2] + "".join(texts.values())
    assert {cause for cause in CAUSES if not re.search(rf"[\"']{cause}[\"']", code)} == set()


def test_every_path_that_gives_an_event_back_names_a_cause() -> None:
    texts = sources()
    callers = {path for path, text in texts.items() if re.search(r"(perform|:=|select) outbox\.release_events\(", text)}
    assert callers == CALLERS_OF_RELEASE
    assert {path for path, text in texts.items() if "release_seconds" in text} == SETTERS_OF_CAUSES
    for path in SETTERS_OF_CAUSES:
        assert "release_cause" in texts[path], path
    # Python makes the fields of such a result in one place, which takes the cause.
    made = {path: len(re.findall(r"\"release_seconds\":", text)) for path, text in texts.items()}
    assert {path: count for path, count in made.items() if count} == {"jobs/handlers/calls.py": 1}


def test_event_can_not_be_given_back_without_a_known_cause(conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1])
    for cause in (None, "because"):
        query = "select outbox.release_events(1, 1, '{}', '0 s', %s, 'not now')"
        with pytest.raises(Exception, match="query returned no rows"), conn.transaction():
            conn.execute(query, (cause,))


@pytest.mark.parametrize("cause", CAUSES)
def test_event_that_waits_for_long_is_a_finding_of_its_cause(conn: Connection, cause: str) -> None:
    pay(conn, add_merchant(conn)[1])
    conn.execute("insert into procrastinate.procrastinate_workers default values")
    [(finding,)] = conn.execute("select finding from outbox.release_causes where cause = %s", (cause,)).fetchall()
    if finding == "circuit-open":
        conn.execute("select surety.open_circuit('stripe', 'acct_1', 'outage', 'it does not answer', 'worker:w')")
    release(conn, cause)
    assert findings(conn).get("waiting-events") is None
    move_clock(conn, "11 minutes")
    assert findings(conn)[finding] == (2 if finding == "access-refused" else 1)
    if finding == "waiting-events":
        move_clock(conn, "61 minutes")
        assert findings(conn)[finding] == 2
    assert conn.execute("select cause, count from surety.list_waiting_events()").fetchall() == [(cause, 1)]


def test_refused_key_is_urgent_within_a_minute_and_names_the_account_and_the_providers_words(conn: Connection) -> None:
    pay(conn, add_merchant(conn, account="acct_shop")[1])
    conn.execute("insert into procrastinate.procrastinate_workers default values")
    release(conn, "access_refused")
    assert "access-refused" not in findings(conn)
    move_clock(conn, "1 minute")
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    [refused] = [finding for finding in find_problems(state) if finding.id == "access-refused"]
    assert refused.urgency == 2
    assert "account acct_shop for 60 s: not now; 1 event waiting" in refused.what
    conn.execute("update outbox.retries set cause = null, waiting_since = null")
    assert "access-refused" not in findings(conn)


@pytest.mark.parametrize("cause", CAUSES)
def test_delay_grows_with_each_release_up_to_its_bound(conn: Connection, cause: str) -> None:
    pay(conn, add_merchant(conn)[1])
    [(first, bound)] = conn.execute(
        "select extract(epoch from first_delay)::float, extract(epoch from delay_max)::float"
        " from outbox.release_causes where cause = %s",
        (cause,),
    ).fetchall()
    delays = [release(conn, cause) for _ in range(20)]
    expected = [min(bound, first * 2**number) for number in range(20)]
    assert delays == pytest.approx(expected, abs=0.5)
    conn.execute("update outbox.retries set releases = 2147483647")
    assert release(conn, cause) == pytest.approx(bound, abs=0.5)


def test_counted_failure_ends_the_wait(conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1])
    release(conn, "provider_busy")
    conn.execute("update outbox.retries set due_at = surety.time_now()")
    claim = "select batch_id, fence, event_ids from outbox.claim_batch('submit', 'w')"
    [(batch, fence, event_ids)] = conn.execute(claim).fetchall()
    failures = json.dumps([{"event_id": event_ids[0], "error": "it failed"}])
    conn.execute("select outbox.fail_events(%s, %s, %s)", (batch, fence, failures))
    assert conn.execute("select cause, releases from outbox.retries").fetchall() == [(None, 0)]
    assert conn.execute("select * from surety.list_waiting_events()").fetchall() == []


def test_cancellation_behind_a_call_of_unknown_outcome_is_tried_less_and_less_often(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    claim = "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'w')"
    [(batch, fence, _)] = conn.execute(claim, ("submit",)).fetchall()
    conn.execute("select surety.begin_calls(%s, %s, 'create', 'worker:w')", (batch, fence))
    assert command(conn, "cancel_payment", key_hash, payment_id=payment_id)["status"] == 202
    delays: list[Any] = []
    for _ in range(12):
        conn.execute("update outbox.retries set due_at = surety.time_now() where handler = 'cancel'")
        [(batch, fence, event_ids)] = conn.execute(claim, ("cancel",)).fetchall()
        planned = conn.execute("select verdict from surety.begin_calls(%s, %s, 'cancel', 'w')", (batch, fence))
        assert planned.fetchall() == [("wait",)]
        result = {"event_id": event_ids[0], "release_seconds": 1, "release_cause": "earlier_call", "error": "unknown"}
        record_results(conn, batch, fence, [result])
        query = "select extract(epoch from due_at - surety.time_now())::float from outbox.retries"
        [(seconds,)] = conn.execute(query).fetchall()
        delays.append(round(seconds))
    assert delays[:4] == [1, 2, 4, 8] and delays[-1] == 300
