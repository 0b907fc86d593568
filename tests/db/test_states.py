"""Fourteen states, 57 legal steps, 196 pairs: a step without a row in surety.transitions can't be written."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import psycopg
import pytest
from psycopg import errors

from tests.support.payments import Connection, add_merchant, path_of, pay, state_of


def step(conn: Connection, payment_id: str, version: int, from_state: str | None, to_state: str) -> None:
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, %s, %s, %s, 'test', now(), 'test')",
        (payment_id, version, from_state, to_state),
    )


def legal_steps(conn: Connection) -> tuple[list[str], set[tuple[str, str]]]:
    states = [row[0] for row in conn.execute("select state from surety.states order by position")]
    legal = {(row[0], row[1]) for row in conn.execute("select from_state, to_state from surety.transitions")}
    return states, legal


def shortest_paths(states: list[str], legal: set[tuple[str, str]]) -> dict[str, list[str]]:
    """From initiated to each state."""
    paths = {"initiated": ["initiated"]}
    waiting = deque(["initiated"])
    while waiting:
        here = waiting.popleft()
        for state in states:
            if (here, state) in legal and state not in paths:
                paths[state] = [*paths[here], state]
                waiting.append(state)
    return paths


def put_into(conn: Connection, payment_id: str, path: list[str]) -> int:
    """Walks a new payment along a path; its version then."""
    for version, (from_state, to_state) in enumerate(pairwise(path), start=2):
        step(conn, payment_id, version, from_state, to_state)
    return len(path)


def refused_by(conn: Connection, payment_id: str, version: int, from_state: str | None, to_state: str) -> str | None:
    """The constraint that refuses a step, or None if it is taken; either way nothing stays."""
    try:
        with conn.transaction(force_rollback=True):
            step(conn, payment_id, version, from_state, to_state)
            conn.execute("set constraints all immediate")
    except psycopg.IntegrityError as error:
        return error.diag.constraint_name
    return None


def test_there_are_14_states_and_57_transitions(conn: Connection) -> None:
    states, legal = legal_steps(conn)
    assert (len(states), len(legal)) == (14, 57)
    assert set(shortest_paths(states, legal)) == set(states), "every state can be reached"


def test_only_legal_transitions_of_all_196_pairs_can_be_written(conn: Connection) -> None:
    states, legal = legal_steps(conn)
    _, key_hash = add_merchant(conn)
    paths = shortest_paths(states, legal)
    for here, payment_id in zip(states, pay(conn, key_hash, len(states)), strict=True):
        version = put_into(conn, payment_id, paths[here])
        for there in states:
            refusal = refused_by(conn, payment_id, version + 1, here, there)
            assert refusal == (None if (here, there) in legal else "step_is_legal"), (here, there)


def test_legal_step_with_a_false_origin_is_refused(conn: Connection) -> None:
    states, legal = legal_steps(conn)
    _, key_hash = add_merchant(conn)
    paths = shortest_paths(states, legal)
    lies = 0
    for here, payment_id in zip(states, pay(conn, key_hash, len(states)), strict=True):
        version = put_into(conn, payment_id, paths[here])
        for claimed, there in sorted(legal):
            if claimed != here:
                lies += 1
                refusal = refused_by(conn, payment_id, version + 1, claimed, there)
                assert refusal == "step_starts_where_the_last_ended", (here, claimed, there)
    assert lies == 57 * 13


@pytest.mark.parametrize(
    ("version", "from_state", "to_state", "constraint"),
    [
        (2, "initiated", "submitting", "steps"),  # it was made already: the chain can not fork
        (4, "submitting", "failed", "step_starts_where_the_last_ended"),  # a version left out
        (1, None, "confirmed", "first_step_is_initiated"),
        (3, None, "failed", "only_the_first_step_starts_nowhere"),
        (0, "submitting", "initiated", "step_version_is_positive"),
    ],
)
def test_steps_form_a_chain_without_forks_or_gaps(
    conn: Connection, version: int, from_state: str | None, to_state: str, constraint: str
) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    put_into(conn, payment_id, ["initiated", "submitting"])
    refusal = refused_by(conn, payment_id, version, from_state, to_state)
    assert refusal is not None and constraint in refusal


@pytest.mark.parametrize("change", ["state = 'settled'", "version = 1", "version = 3, state = 'submitting'"])
def test_a_payments_state_cannot_be_set_beside_its_steps(conn: Connection, change: str) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    put_into(conn, payment_id, ["initiated", "submitting"])
    with pytest.raises(errors.ForeignKeyViolation) as refusal:
        conn.execute(f"update surety.payments set {change} where id = %s".encode(), (payment_id,))
    assert refusal.value.diag.constraint_name == "payment_state_is_its_last_step"


@pytest.mark.parametrize(
    "table",
    ["surety.steps", "surety.facts", "ledger.transfers", "ledger.postings", "outbox.events", "audit.entries"],
)
@pytest.mark.parametrize("statement", ["delete from {}", "truncate {} cascade", "update {} set {} = {}"])
def test_history_is_append_only(conn: Connection, table: str, statement: str) -> None:
    column = {"ledger.transfers": "posting_id", "surety.steps": "payment_id", "surety.facts": "payment_id"}.get(
        table, "id"
    )
    with pytest.raises(psycopg.DatabaseError, match="append-only") as refusal:
        conn.execute(statement.format(table, column, column).encode())
    assert refusal.value.sqlstate == "SU003"


def test_each_step_writes_one_event_and_one_audit_entry_and_updates_the_payment(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    put_into(conn, payment_id, ["initiated", "submitting", "provider_submitted", "confirmed", "settled"])
    events = conn.execute(
        "select type, version from outbox.events where aggregate_id = %s order by version", (payment_id,)
    )
    assert events.fetchall() == [
        ("payment.initiated", 1),
        ("payment.submitting", 2),
        ("payment.provider_submitted", 3),
        ("payment.confirmed", 4),
        ("payment.settled", 5),
    ]
    entries = conn.execute(
        "select from_state, to_state, version from audit.entries"
        " where payment_id = %s and kind = 'step' order by version",
        (payment_id,),
    )
    assert [row[2] for row in entries] == [1, 2, 3, 4, 5]
    assert state_of(conn, payment_id) == path_of(conn, payment_id)[-1] == "settled"


def test_all_steps_of_a_batch_are_one_statement(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    payments = pay(conn, key_hash, 50)
    conn.execute(
        """
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
        select p, s.version, s.from_state, s.to_state, 'test', now(), 'test'
        from unnest(%s::text[]) as p cross join (values
            (2, 'initiated', 'submitting'), (3, 'submitting', 'provider_submitted'), (4, 'provider_submitted', 'failed')
        ) as s (version, from_state, to_state)
        """,
        (payments,),
    )
    assert {state_of(conn, payment_id) for payment_id in payments} == {"failed"}


def test_a_reference_is_free_again_after_failure_and_taken_back_by_success(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [first] = pay(conn, key_hash, reference="order-1")
    put_into(conn, first, ["initiated", "submitting", "failed"])
    [second] = pay(conn, key_hash, reference="order-1")
    step(conn, first, 4, "failed", "confirmed")
    result = conn.execute("select kind, payment_id from surety.discrepancies").fetchall()
    assert result == [("duplicate", first)], "the second payment keeps it, and a discrepancy is open"
    put_into(conn, second, ["initiated", "canceled"])
    assert conn.execute("select count(*) from surety.payment_references").fetchone() == (0,)
