"""The outbox: no event is missed, none is effective twice; leases, failures, deaths; what a claim costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import psycopg
import pytest

from db.connect import harden
from db.embedded import temporary_database
from tests.support.payments import Connection, add_merchant, fact, pay

HANDLER = "apply"
TYPE = "webhook.received"

Claim = tuple[int, int, list[str]]
Connections = Callable[[], Connection]


@pytest.fixture
def connections(database: str) -> Iterator[Connections]:
    """More connections with all rights, each in a transaction of its own until it commits."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(psycopg.connect(harden(database, "deploy")))


@pytest.fixture
def patient(conn: Connection) -> Connection:
    """A handler whose failures are due again at once, and a lease of a minute."""
    conn.execute("update outbox.handlers set batch_size = 3, retry_after = '{0 s,0 s}' where handler = %s", (HANDLER,))
    return conn


def emit(conn: Connection, name: str = "whk_test") -> str:
    row = conn.execute("select outbox.emit_event('webhook', %s, %s, '{}', null, null)", (name, TYPE)).fetchone()
    assert row is not None
    return str(row[0])


def claim(conn: Connection, worker: str = "w", handler: str = HANDLER) -> Claim | None:
    row = conn.execute(
        "select batch_id, fence, event_ids from outbox.claim_batch(%s, %s)", (handler, worker)
    ).fetchone()
    return None if row is None else (row[0], row[1], row[2])


def claimed(conn: Connection, **more: Any) -> Claim:
    batch = claim(conn, **more)
    assert batch is not None
    return batch


def call(conn: Connection, function: str, *values: Any) -> Any:
    places = ", ".join(["%s"] * len(values))
    row = conn.execute(f"select {function}({places})".encode(), values).fetchone()
    assert row is not None
    return row[0]


def finish(conn: Connection, batch: Claim, event_ids: list[str] | None = None) -> bool:
    return bool(call(conn, "outbox.complete_events", *batch[:2], batch[2] if event_ids is None else event_ids))


def fail(conn: Connection, batch: Claim, *event_ids: str) -> bool:
    told = json.dumps([{"event_id": event_id, "error": "it did not work"} for event_id in event_ids])
    return bool(call(conn, "outbox.fail_events", *batch[:2], told))


def die(conn: Connection, batch: Claim) -> None:
    """The worker that holds the batch is never heard of again."""
    conn.execute("update outbox.batches set leased_until = now() - interval '1 second' where id = %s", (batch[0],))


def dead(conn: Connection) -> list[tuple[str, str, int]]:
    """Dead letters: event, reason, number of attempts kept."""
    query = "select event_id, reason, jsonb_array_length(attempts) from outbox.dead_letters order by event_id"
    return conn.execute(query).fetchall()


def test_every_event_is_claimed_once_in_any_commit_order(
    patient: Connection, connections: Connections, server: str
) -> None:
    writers = [connections() for _ in range(4)]
    emitted: list[str] = []
    taken: list[str] = []

    def take() -> None:
        while batch := claim(patient):
            taken.extend(batch[2])
            assert finish(patient, batch)

    with temporary_database(server, "surety_test") as elsewhere, psycopg.connect(elsewhere) as other_database:
        other_database.execute("create table open_for_as_long_as_we_test ()")
        for order in permutations(range(4)):
            for turn, writer in enumerate(writers):
                emitted += [emit(writer) for _ in range(turn + 1)]
                take()
            for which in order:
                writers[which].commit()
                take()
        assert sorted(taken) == sorted(emitted)
        other_database.rollback()


def test_rolled_back_transaction_leaves_no_event(patient: Connection, connections: Connections) -> None:
    writer, late = connections(), connections()
    emit(late)
    emit(writer)
    writer.rollback()
    after = emit(patient)
    batch = claimed(patient)
    assert batch[2] == [after]
    late.rollback()
    assert finish(patient, batch)
    assert claim(patient) is None


def test_finished_events_leave_the_batch_and_the_rest_stays_leased(patient: Connection) -> None:
    first, second, third = sorted(emit(patient) for _ in range(3))
    batch = claimed(patient)
    assert finish(patient, batch, [first, third])
    rows = patient.execute("select event_ids, leased_until > now() from outbox.batches").fetchall()
    assert rows == [([second], True)]
    assert finish(patient, batch, [second])
    assert patient.execute("select count(*) from outbox.batches").fetchone() == (0,)


def test_lost_lease_cannot_complete_events_but_records_results(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    lost = claimed(conn, handler="submit")
    conn.execute("select from surety.begin_calls(%s, %s, 'create', 'worker:slow')", lost[:2])
    die(conn, lost)
    held = claimed(conn, handler="submit", worker="quick")
    assert held[2] == lost[2]

    results = [
        {
            "event_id": lost[2][0],
            "payment_id": payment_id,
            "operation": "create",
            "status": 200,
            "outcome": "answered",
            "facts": [fact(payment_id, "submitted", "pi", 10000, source="response")],
        }
    ]
    query = "select is_held, event_types from surety.record_event_results(%s, %s, 'worker:slow', %s)"
    answer = conn.execute(query, (*lost[:2], json.dumps(results))).fetchone()
    assert answer == (False, ["payment.provider_submitted"])
    state = conn.execute("select state, provider_id is not null from surety.payments").fetchone()
    assert state == ("provider_submitted", True)
    audited = conn.execute("select actor from audit.entries where kind = 'answer'").fetchall()
    assert audited == [("worker:slow",)]

    assert conn.execute("select event_ids from outbox.batches").fetchone() == (held[2],)
    assert not finish(conn, lost)
    assert not fail(conn, lost, *lost[2])
    assert not call(conn, "outbox.release_events", *lost[:2], lost[2], "0 s", "stopped")
    assert not call(conn, "outbox.renew_lease", *lost[:2])
    assert conn.execute("select * from surety.begin_calls(%s, %s, 'create', 'w')", lost[:2]).fetchall() == []
    assert finish(conn, held)


@pytest.mark.parametrize("effect", ["open_settlement_expectation", "close_settlement_expectation"])
def test_effects_in_the_database_say_when_the_lease_is_lost(conn: Connection, effect: str) -> None:
    lost = claimed(emit_for(conn, "settle"), handler="settle")
    die(conn, lost)
    claimed(conn, handler="settle")
    assert not call(conn, f"surety.{effect}", *lost)


def emit_for(conn: Connection, handler: str) -> Connection:
    """An event of the type that a handler wants, about no payment."""
    query = "select outbox.emit_event('payment', 'pay_test', event_type, '{}', null, 1) from outbox.handler_events"
    conn.execute(query + " where handler = %s limit 1", (handler,))
    return conn


def test_three_failures_make_a_dead_letter_and_two_do_not(patient: Connection) -> None:
    poison, fine = emit(patient), emit(patient)
    batch = claimed(patient)
    assert fail(patient, batch, poison)
    assert finish(patient, batch, [fine])
    again = claimed(patient)
    assert again[2] == [poison]
    assert fail(patient, again, poison)
    assert dead(patient) == []
    last = claimed(patient)
    assert fail(patient, last, poison)
    assert dead(patient) == [(poison, "it failed 3 times", 3)]
    assert claim(patient) is None
    assert patient.execute("select count(*) from outbox.retries").fetchone() == (0,)
    assert patient.execute("select outcome, reason from audit.entries where kind = 'dead_letter'").fetchall() == [
        ("dead", "it failed 3 times")
    ]


def test_successful_retry_clears_its_failures(patient: Connection) -> None:
    event = emit(patient)
    assert fail(patient, claimed(patient), event)
    assert finish(patient, claimed(patient))
    assert patient.execute("select count(*) from outbox.retries").fetchone() == (0,)
    assert claim(patient) is None


def test_retry_delays_grow_with_jitter(conn: Connection) -> None:
    event = emit(conn)
    waits = []
    for _ in range(2):
        assert fail(conn, claimed(conn), event)
        row = conn.execute("select extract(epoch from due_at - now())::float from outbox.retries").fetchone()
        assert row is not None
        waits.append(row[0])
        assert claim(conn) is None
        conn.execute("update outbox.retries set due_at = now()")
    assert 3.9 <= waits[0] <= 6.0
    assert 47.9 <= waits[1] <= 72.0


def test_event_that_killed_three_workers_is_dead_lettered_alone(patient: Connection) -> None:
    poison, one, other = (emit(patient) for _ in range(3))
    die(patient, claimed(patient))
    finished = set()
    for _ in range(10):
        batch = claim(patient)
        if batch is None:
            break
        assert len(batch[2]) == 1, "a suspect runs alone"
        if batch[2] == [poison]:
            die(patient, batch)
        else:
            finished.update(batch[2])
            assert finish(patient, batch)
    assert finished == {one, other}
    assert dead(patient) == [(poison, "its worker died 3 times", 3)]


def test_suspects_run_one_at_a_time(patient: Connection) -> None:
    events = {emit(patient), emit(patient)}
    die(patient, claimed(patient))
    first, second = claimed(patient), claimed(patient)
    assert {*first[2], *second[2]} == events
    die(patient, first)
    die(patient, second)
    alone = claimed(patient)
    assert len(alone[2]) == 1
    assert claim(patient) is None
    assert finish(patient, alone)
    assert {*claimed(patient)[2], *alone[2]} == events


def test_returned_event_is_not_counted_as_failed(patient: Connection) -> None:
    event = emit(patient)
    for _ in range(25):
        batch = claimed(patient)
        assert call(patient, "outbox.release_events", *batch[:2], [event], "0 s", "the provider is busy")
    row = patient.execute("select failures, worker_deaths, jsonb_array_length(attempts) from outbox.retries").fetchone()
    assert row == (0, 0, 20)
    assert finish(patient, claimed(patient))


def test_concurrent_batches_per_handler_are_limited(patient: Connection) -> None:
    for _ in range(9):
        emit(patient)
    assert claim(patient) is not None
    assert claim(patient) is not None
    assert claim(patient) is None


def test_slow_remainders_of_batches_block_no_new_batches(patient: Connection) -> None:
    patient.execute("update outbox.handlers set batch_size = 10 where handler = %s", (HANDLER,))
    for _ in range(30):
        emit(patient)
    for _ in range(2):
        batch = claimed(patient)
        assert finish(patient, batch, batch[2][1:])
    assert claim(patient) is None
    patient.execute("update outbox.batches set claimed_at = claimed_at - interval '2 seconds'")
    assert len(claimed(patient)[2]) == 10


def test_paused_handler_claims_nothing_and_misses_nothing(patient: Connection) -> None:
    patient.execute("update outbox.handlers set paused_at = now() where handler = %s", (HANDLER,))
    event = emit(patient)
    assert claim(patient) is None
    assert not call(patient, "outbox.has_work", HANDLER)
    patient.execute("update outbox.handlers set paused_at = null")
    assert claimed(patient)[2] == [event]


def test_wakeup_schedules_each_handler_once_until_it_starts(conn: Connection) -> None:
    assert call(conn, "outbox.schedule_handlers", ["submit", "apply"]) == 2
    assert call(conn, "outbox.schedule_handlers", ["submit", "apply"]) == 0
    conn.execute("set search_path = procrastinate")
    conn.execute("update procrastinate_jobs set status = 'doing' where args ->> 'handler' = 'submit'")
    assert call(conn, "outbox.schedule_handlers", ["submit", "apply"]) == 1


def test_periodic_check_schedules_handlers_with_due_work(patient: Connection) -> None:
    assert call(patient, "outbox.schedule_due_handlers") is None
    event = emit(patient)
    assert call(patient, "outbox.schedule_due_handlers") == [HANDLER]
    batch = claimed(patient)
    assert call(patient, "outbox.schedule_due_handlers") is None
    die(patient, batch)
    assert call(patient, "outbox.schedule_due_handlers") == [HANDLER]
    assert finish(patient, claimed(patient), [event])


def test_periodic_check_skips_idle_handlers_until_many_events_passed(patient: Connection) -> None:
    for _ in range(99):
        emit(patient)
    assert call(patient, "outbox.schedule_due_handlers") == [HANDLER]
    emit(patient)
    others = [name for name in call(patient, "outbox.schedule_due_handlers") if name != HANDLER]
    assert others
    for name in others:
        assert claim(patient, handler=name) is None
    assert call(patient, "outbox.schedule_due_handlers") == [HANDLER]


def is_last(conn: Connection) -> bool:
    """Claim, finish, and tell whether it was told that nothing else was due."""
    [(batch, fence, event_ids, is_last)] = conn.execute(
        "select batch_id, fence, event_ids, is_last from outbox.claim_batch(%s, 'w')", (HANDLER,)
    ).fetchall()
    assert finish(conn, (batch, fence, event_ids))
    return bool(is_last)


def test_claim_reports_whether_more_events_are_due(patient: Connection) -> None:
    emit(patient)
    assert is_last(patient)
    for _ in range(4):
        emit(patient)
    assert not is_last(patient), "a full batch"
    emit(patient)
    assert not is_last(patient), "the rest of what was there when the full batch was claimed; one came after that"
    assert is_last(patient)
    emit(patient)
    batch = claimed(patient)
    assert fail(patient, batch, *batch[2])
    emit(patient)
    assert not is_last(patient), "what is tried again comes first"
    assert is_last(patient)
    assert claim(patient) is None


def test_a_claim_reads_a_few_pages_beside_a_hundred_thousand_past_events(patient: Connection) -> None:
    patient.execute(
        "insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, generation)"
        " select surety.new_id('evt', now()), 'webhook', 'whk_past', %s, '{}', outbox.current_restore_generation()"
        " from generate_series(1, 100000)",
        (TYPE,),
    )
    patient.execute(
        "update outbox.handlers set seen = pg_current_snapshot(), goal = null where handler = %s", (HANDLER,)
    )
    patient.execute("vacuum analyze outbox.events")
    wanted = [emit(patient) for _ in range(3)]

    plans: list[str] = []
    patient.add_notice_handler(lambda notice: plans.append(notice.message_primary or ""))
    patient.execute("load 'auto_explain'")
    for name, value in {
        "auto_explain.log_min_duration": "0",
        "auto_explain.log_analyze": "on",
        "auto_explain.log_buffers": "on",
        "auto_explain.log_nested_statements": "on",
        "auto_explain.log_format": "json",
        "client_min_messages": "log",
    }.items():
        patient.execute("select set_config(%s, %s, false)", (name, value))
    assert claimed(patient)[2] == sorted(wanted)
    patient.execute("reset client_min_messages")

    scans = [
        plan for text in plans if "pg_visible_in_snapshot" in text for plan in [json.loads(text[text.index("{") :])]
    ]
    assert scans, "the scan's plan was not shown"
    for scan in scans:
        nodes = list(nodes_of(scan["Plan"]))
        read = {node["Index Name"] for node in nodes if node.get("Relation Name", "").startswith("events")}
        assert read, scan
        assert all(is_in_commit_order(patient, index) for index in read), read
        assert not any(node["Node Type"] == "Seq Scan" and "Relation Name" in node for node in nodes)
        assert scan["Plan"]["Shared Hit Blocks"] + scan["Plan"]["Shared Read Blocks"] < 60


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes_of(inner)


def is_in_commit_order(conn: Connection, index: str) -> bool:
    """Whether an index is events_in_commit_order's, or one of its partitions'."""
    query = "select count(*) from pg_inherits where inhrelid = to_regclass('outbox.' || %s)"
    query += " and inhparent = 'outbox.events_in_commit_order'::regclass"
    return conn.execute(query, (index,)).fetchone() == (1,)
