"""The outbox: each event takes effect once; leases, failures, worker deaths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from tests.support.payments import Connection, add_merchant, fact, pay, record_results

HANDLER = "apply_webhooks"
TYPE = "webhook.received"

Claim = tuple[int, int, list[str]]
Connections = Callable[[], Connection]


@pytest.fixture
def connections(database: str) -> Iterator[Connections]:
    """Further connections with all rights, each in a transaction of its own until it commits."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(psycopg.connect(harden(database, "deploy")))


@pytest.fixture
def outbox(conn: Connection) -> Connection:
    """A connection; the handler's batches hold three events, and its retries are due at once."""
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


def complete(conn: Connection, batch: Claim, event_ids: list[str] | None = None) -> bool:
    return bool(call(conn, "outbox.complete_events", *batch[:2], batch[2] if event_ids is None else event_ids))


def fail(conn: Connection, batch: Claim, *event_ids: str) -> bool:
    failures = json.dumps([{"event_id": event_id, "error": "it did not work"} for event_id in event_ids])
    return bool(call(conn, "outbox.fail_events", *batch[:2], failures))


def expire_lease(conn: Connection, batch: Claim) -> None:
    """Let a batch's lease run out, as if its worker had died."""
    conn.execute("update outbox.batches set leased_until = now() - interval '1 second' where id = %s", (batch[0],))


def dead_letters(conn: Connection) -> list[tuple[str, str, int]]:
    """The dead letters: event, reason, number of attempts."""
    query = "select event_id, reason, jsonb_array_length(attempts) from outbox.dead_letters order by event_id"
    return conn.execute(query).fetchall()


def test_every_event_is_claimed_once_in_any_commit_order(
    outbox: Connection, connections: Connections, server: str
) -> None:
    writers = [connections() for _ in range(4)]
    emitted: list[str] = []
    claimed_ids: list[str] = []

    def claim_all() -> None:
        while batch := claim(outbox):
            claimed_ids.extend(batch[2])
            assert complete(outbox, batch)

    with temporary_database(server, "surety_test") as elsewhere, psycopg.connect(elsewhere) as other_database:
        other_database.execute("create table open_during_the_test ()")
        for order in permutations(range(4)):
            for turn, writer in enumerate(writers):
                emitted += [emit(writer) for _ in range(turn + 1)]
                claim_all()
            for which in order:
                writers[which].commit()
                claim_all()
        assert sorted(claimed_ids) == sorted(emitted)
        other_database.rollback()


def test_rolled_back_transaction_leaves_no_event(outbox: Connection, connections: Connections) -> None:
    writer, late = connections(), connections()
    emit(late)
    emit(writer)
    writer.rollback()
    after = emit(outbox)
    batch = claimed(outbox)
    assert batch[2] == [after]
    late.rollback()
    assert complete(outbox, batch)
    assert claim(outbox) is None


def test_finished_events_leave_the_batch_and_the_rest_stays_leased(outbox: Connection) -> None:
    first, second, third = sorted(emit(outbox) for _ in range(3))
    batch = claimed(outbox)
    assert complete(outbox, batch, [first, third])
    rows = outbox.execute("select event_ids, leased_until > now() from outbox.batches").fetchall()
    assert rows == [([second], True)]
    assert complete(outbox, batch, [second])
    assert outbox.execute("select count(*) from outbox.batches").fetchone() == (0,)


def test_lost_lease_cannot_complete_events_but_records_results(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    lost = claimed(conn, handler="submit")
    conn.execute("select from surety.begin_calls(%s, %s, 'create', 'worker:slow')", lost[:2])
    expire_lease(conn, lost)
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
    answer = record_results(conn, *lost[:2], results, actor="worker:slow")
    assert answer == (False, ["payment.provider_submitted"])
    state = conn.execute("select state, provider_id is not null from surety.payments").fetchone()
    assert state == ("provider_submitted", True)
    audited = conn.execute("select actor from audit.entries where kind = 'answer'").fetchall()
    assert audited == [("worker:slow",)]

    assert conn.execute("select event_ids from outbox.batches").fetchone() == (held[2],)
    assert not complete(conn, lost)
    assert not fail(conn, lost, *lost[2])
    assert not call(conn, "outbox.release_events", *lost[:2], lost[2], "0 s", "worker_stopped", "stopped")
    assert not call(conn, "outbox.renew_lease", *lost[:2])
    assert conn.execute("select * from surety.begin_calls(%s, %s, 'create', 'w')", lost[:2]).fetchall() == []
    assert complete(conn, held)


@pytest.mark.parametrize("effect", ["expect_settlement", "meet_expected_settlement"])
def test_effects_in_the_database_say_when_the_lease_is_lost(conn: Connection, effect: str) -> None:
    lost = claimed(emit_for(conn, "expect_settlement"), handler="expect_settlement")
    expire_lease(conn, lost)
    claimed(conn, handler="expect_settlement")
    assert not call(conn, f"surety.{effect}", *lost)


def emit_for(conn: Connection, handler: str) -> Connection:
    """Emit an event of a type that the handler processes, about no payment."""
    query = "select outbox.emit_event('payment', 'pay_test', event_type, '{}', null, 1) from outbox.handler_events"
    conn.execute(query + " where handler = %s limit 1", (handler,))
    return conn


def test_three_failures_make_a_dead_letter_and_two_do_not(outbox: Connection) -> None:
    poison, fine = emit(outbox), emit(outbox)
    batch = claimed(outbox)
    assert fail(outbox, batch, poison)
    assert complete(outbox, batch, [fine])
    again = claimed(outbox)
    assert again[2] == [poison]
    assert fail(outbox, again, poison)
    assert dead_letters(outbox) == []
    last = claimed(outbox)
    assert fail(outbox, last, poison)
    assert dead_letters(outbox) == [(poison, "it failed 3 times", 3)]
    assert claim(outbox) is None
    assert outbox.execute("select count(*) from outbox.retries").fetchone() == (0,)
    assert outbox.execute("select outcome, reason from audit.entries where kind = 'dead_letter'").fetchall() == [
        ("dead", "it failed 3 times")
    ]


def test_successful_retry_clears_its_failures(outbox: Connection) -> None:
    event = emit(outbox)
    assert fail(outbox, claimed(outbox), event)
    assert complete(outbox, claimed(outbox))
    assert outbox.execute("select count(*) from outbox.retries").fetchone() == (0,)
    assert claim(outbox) is None


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


def test_event_that_killed_three_workers_is_dead_lettered_alone(outbox: Connection) -> None:
    poison, one, other = (emit(outbox) for _ in range(3))
    expire_lease(outbox, claimed(outbox))
    finished = set()
    for _ in range(10):
        batch = claim(outbox)
        if batch is None:
            break
        assert len(batch[2]) == 1, "a suspect runs in a batch of its own"
        if batch[2] == [poison]:
            expire_lease(outbox, batch)
        else:
            finished.update(batch[2])
            assert complete(outbox, batch)
    assert finished == {one, other}
    assert dead_letters(outbox) == [(poison, "its worker died 3 times", 3)]


def test_suspects_run_one_at_a_time(outbox: Connection) -> None:
    events = {emit(outbox), emit(outbox)}
    expire_lease(outbox, claimed(outbox))
    first, second = claimed(outbox), claimed(outbox)
    assert {*first[2], *second[2]} == events
    expire_lease(outbox, first)
    expire_lease(outbox, second)
    alone = claimed(outbox)
    assert len(alone[2]) == 1
    assert claim(outbox) is None
    assert complete(outbox, alone)
    assert {*claimed(outbox)[2], *alone[2]} == events


def test_failure_recorded_again_after_a_lost_commit_is_no_error(conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1], 2)
    batch = claimed(conn, handler="submit")
    for _ in range(2):
        assert fail(conn, batch, batch[2][0])
    assert conn.execute("select failures from outbox.retries").fetchall() == [(1,)]


def test_suspect_of_a_paused_handler_blocks_no_other_suspect(conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1])
    claimed(conn, handler="submit")
    conn.execute("update outbox.batches set is_suspect = true, leased_until = now() - interval '1 second'")
    conn.execute("update outbox.handlers set paused_at = now() where handler = 'submit'")
    conn.execute(
        "insert into outbox.retries (handler, event_id, worker_deaths, due_at)"
        " values ('expect_settlement', 'evt_1', 2, now())"
    )
    assert claimed(conn, handler="expect_settlement")[2] == ["evt_1"]


def test_returned_event_is_not_counted_as_failed(outbox: Connection) -> None:
    event = emit(outbox)
    for _ in range(25):
        batch = claimed(outbox)
        assert call(outbox, "outbox.release_events", *batch[:2], [event], "0 s", "worker_stopped", "stopped")
    row = outbox.execute("select failures, worker_deaths, jsonb_array_length(attempts) from outbox.retries").fetchone()
    assert row == (0, 0, 20)
    assert complete(outbox, claimed(outbox))


def test_concurrent_batches_per_handler_are_limited(outbox: Connection) -> None:
    for _ in range(9):
        emit(outbox)
    assert claim(outbox) is not None
    assert claim(outbox) is not None
    assert claim(outbox) is None


def test_slow_remainders_of_batches_block_no_new_batches(outbox: Connection) -> None:
    outbox.execute("update outbox.handlers set batch_size = 10 where handler = %s", (HANDLER,))
    for _ in range(30):
        emit(outbox)
    for _ in range(2):
        batch = claimed(outbox)
        assert complete(outbox, batch, batch[2][1:])
    assert claim(outbox) is None
    outbox.execute("update outbox.batches set claimed_at = claimed_at - interval '2 seconds'")
    assert len(claimed(outbox)[2]) == 10


def test_paused_handler_claims_nothing_and_misses_nothing(outbox: Connection) -> None:
    outbox.execute("update outbox.handlers set paused_at = now() where handler = %s", (HANDLER,))
    event = emit(outbox)
    assert claim(outbox) is None
    assert not call(outbox, "outbox.has_work", HANDLER)
    outbox.execute("update outbox.handlers set paused_at = null")
    assert claimed(outbox)[2] == [event]


def test_handler_receives_the_events_of_its_deployed_code(conn: Connection, database: str) -> None:
    query = "select event_types, batch_size from outbox.list_handlers() where handler = 'cancel'"
    [(wanted, _)] = conn.execute(query).fetchall()
    conn.execute("update outbox.handlers set batch_size = 50")
    conn.execute(
        "update outbox.handler_events set event_type = 'payment.failed' where event_type = 'payment.action_overdue'"
    )
    deploy(database, force=True)
    assert len(wanted) > 1
    assert conn.execute(query).fetchone() == (wanted, 50)


def test_scheduling_adds_one_job_per_handler_until_it_starts(conn: Connection) -> None:
    assert call(conn, "outbox.schedule_handlers", ["submit", "apply_webhooks"]) == 2
    assert call(conn, "outbox.schedule_handlers", ["submit", "apply_webhooks"]) == 0
    conn.execute("set search_path = procrastinate")
    conn.execute("update procrastinate_jobs set status = 'doing' where args ->> 'handler' = 'submit'")
    assert call(conn, "outbox.schedule_handlers", ["submit", "apply_webhooks"]) == 1


def test_periodic_check_schedules_handlers_with_due_work(outbox: Connection) -> None:
    assert call(outbox, "outbox.schedule_due_handlers") is None
    event = emit(outbox)
    assert call(outbox, "outbox.schedule_due_handlers") == [HANDLER]
    batch = claimed(outbox)
    assert call(outbox, "outbox.schedule_due_handlers") is None
    expire_lease(outbox, batch)
    assert call(outbox, "outbox.schedule_due_handlers") == [HANDLER]
    assert complete(outbox, claimed(outbox), [event])


def test_periodic_check_skips_idle_handlers_until_many_events_passed(outbox: Connection) -> None:
    for _ in range(99):
        emit(outbox)
    assert call(outbox, "outbox.schedule_due_handlers") == [HANDLER]
    emit(outbox)
    others = [name for name in call(outbox, "outbox.schedule_due_handlers") if name != HANDLER]
    assert others
    for name in others:
        assert claim(outbox, handler=name) is None
    assert call(outbox, "outbox.schedule_due_handlers") == [HANDLER]


def test_periodic_check_finds_what_each_handler_would_find(outbox: Connection, connections: Connections) -> None:
    def check() -> list[str]:
        query = "select array_agg(handler order by handler) from outbox.handlers where outbox.has_work(handler)"
        [(expected,)] = outbox.execute(query).fetchall()
        assert call(outbox, "outbox.schedule_due_handlers") == expected
        return expected or []

    outbox.execute("select outbox.emit_event('payment', 'pay_1', 'payment.initiated', '{}', null, 1)")
    emit(outbox)
    assert complete(outbox, claimed(outbox))
    found = check()
    assert "submit" in found and HANDLER not in found
    emit(late := connections())
    emit(outbox)
    assert complete(outbox, claimed(outbox))
    assert check() == found
    late.commit()
    assert HANDLER in check()
    for _ in range(250):
        emit(outbox)
    assert len(check()) > len(found) + 1


def test_turn_of_the_leader_finds_work_that_came_since_its_idle_mark(outbox: Connection) -> None:
    def turn(mark: str | None) -> str | None:
        mark = call(outbox, "outbox.schedule_work_since", mark)
        assert (mark is None) == (call(outbox, "outbox.schedule_due_handlers") is not None)
        return mark

    idle = turn(None)
    assert idle is not None and turn(idle) == idle
    event = emit(outbox)
    assert turn(idle) is None, "an event"
    batch = claimed(outbox)
    idle = turn(idle)
    assert idle is not None, "it is claimed"
    expire_lease(outbox, batch)
    assert turn(idle) is None, "a lease has expired"
    assert fail(outbox, claimed(outbox), event)
    assert turn(idle) is None, "a retry is due"
    outbox.execute("update outbox.handlers set paused_at = now() where handler = %s", (HANDLER,))
    idle = turn(idle)
    assert idle is not None, "its handler is paused"
    outbox.execute("update outbox.handlers set paused_at = null")
    assert turn(idle) is None, "its handler is resumed"
    assert complete(outbox, claimed(outbox))
    assert turn(idle) is not None


def test_turn_of_the_leader_sees_an_event_that_commits_late(outbox: Connection, connections: Connections) -> None:
    late = connections()
    emit(late)
    emit(outbox)
    assert complete(outbox, claimed(outbox))
    idle = call(outbox, "outbox.schedule_work_since", None)
    assert idle is not None
    late.commit()
    assert call(outbox, "outbox.schedule_work_since", idle) is None


def claim_and_announce(conn: Connection, again_after: str) -> tuple[int, int, list[str]]:
    """Claim a batch, and announce another claim after that time."""
    query = "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'w', %s::interval)"
    [batch] = conn.execute(query, (HANDLER, again_after)).fetchall()
    return batch


def test_no_job_is_scheduled_until_an_announced_claim(outbox: Connection) -> None:
    emit(outbox)
    batch = claim_and_announce(outbox, "9 seconds")
    emit(outbox)
    assert call(outbox, "outbox.schedule_handlers", [HANDLER]) == 0
    assert outbox.execute("select outbox.schedule_handlers(%s, true)", ([HANDLER],)).fetchone() == (1,)
    outbox.execute("set search_path = procrastinate")
    outbox.execute("delete from procrastinate_jobs")
    assert complete(outbox, batch)
    claim_and_announce(outbox, "0")
    assert call(outbox, "outbox.schedule_handlers", [HANDLER]) == 1


def test_announcement_from_before_the_clock_was_set_back_holds_up_no_job(outbox: Connection) -> None:
    emit(outbox)
    claim_and_announce(outbox, "1 hour")
    emit(outbox)
    assert call(outbox, "outbox.schedule_due_handlers") == [HANDLER]
    assert outbox.execute("select count(*) from procrastinate.procrastinate_jobs").fetchone() == (1,)


def test_claim_that_finds_nothing_announces_nothing(outbox: Connection) -> None:
    query = "select count(*) from outbox.claim_batch(%s, 'w', interval '10 minutes')"
    assert outbox.execute(query, (HANDLER,)).fetchone() == (0,)
    assert call(outbox, "outbox.schedule_handlers", [HANDLER]) == 1
