"""Restored databases: transaction ids start anew or repeat, and each event is still claimed once."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.binaries import find_binaries
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.support.payments import Connection, add_merchant, create, pay, request, violations


def claim_all(conn: Connection, handler: str) -> list[str]:
    """Claim and complete all events of a handler; their ids."""
    event_ids: list[str] = []
    while row := conn.execute(
        "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'test')", (handler,)
    ).fetchone():
        event_ids += row[2]
        conn.execute("select outbox.complete_events(%s, %s, %s)", row)
    return event_ids


def events_of(conn: Connection, event_type: str) -> list[str]:
    return [row[0] for row in conn.execute("select id from outbox.events where type = %s order by id", (event_type,))]


def copy(source: str, target: str, folder: Path) -> None:
    """Copy a database with pg_dump and pg_restore."""
    dump = folder / "surety.dump"
    programs = find_binaries()
    subprocess.run([programs["pg_dump"], "--format=custom", f"--file={dump}", source], check=True)
    subprocess.run([programs["pg_restore"], "--exit-on-error", f"--dbname={target}", dump], check=True)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """An empty database of another cluster, which has our roles."""
    with EmbeddedServer() as other:
        with temporary_database(other.url, "surety_roles") as url:
            deploy(url)
        with temporary_database(other.url, "surety_restored", template="template0") as url:
            yield url


def test_a_restored_database_is_refused_until_a_new_restore_generation_and_misses_no_event(
    database: str, conn: Connection, elsewhere: str, tmp_path: Path
) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 30)
    conn.execute("update outbox.handlers set batch_size = 10")
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch('submit', 'test')").fetchone()
    assert row is not None
    conn.execute("select outbox.complete_events(%s, %s, %s)", row)
    done = set(row[2])
    held = conn.execute("select event_ids from outbox.claim_batch('submit', 'lost')").fetchone()
    assert held is not None and len(held[0]) == 10
    copy(database, elsewhere, tmp_path)

    with psycopg.connect(harden(elsewhere, "deploy"), autocommit=True) as restored:
        for refused in (
            lambda: create(restored, [request(key_hash)]),
            lambda: restored.execute("select * from outbox.claim_batch('submit', 'test')"),
        ):
            with pytest.raises(psycopg.DatabaseError, match="restored") as refusal:
                refused()
            assert refusal.value.sqlstate == "SU005"

        assert restored.execute("select outbox.begin_restore_generation('a test')").fetchone() == (2,)
        assert restored.execute("select outbox.begin_restore_generation('again')").fetchone() == (2,)
        pay(restored, key_hash, 5)
        event_ids = claim_all(restored, "submit")
        assert sorted(event_ids) == sorted(set(events_of(restored, "payment.initiated")) - done)
        assert claim_all(restored, "submit") == []
        # Their events were completed without any work.
        assert violations(restored) == {"no payment is forgotten": len(event_ids) + len(done)}


def test_other_handlers_of_a_restored_database_receive_unseen_events(
    database: str, conn: Connection, elsewhere: str, tmp_path: Path
) -> None:
    _, key_hash = add_merchant(conn)
    payments = pay(conn, key_hash, 4)
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select p, 2, 'initiated', 'submitting', 'test', now(), 'test' from unnest(%s::text[]) as p",
        (payments,),
    )
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select p, 3, 'submitting', 'provider_submitted', 'test', now(), 'test' from unnest(%s::text[]) as p",
        (payments,),
    )
    claim_all(conn, "submit")
    copy(database, elsewhere, tmp_path)
    with psycopg.connect(harden(elsewhere, "deploy"), autocommit=True) as restored:
        restored.execute("select outbox.begin_restore_generation('a test')")
        assert claim_all(restored, "submit") == []
        assert sorted(claim_all(restored, "confirm")) == events_of(restored, "payment.provider_submitted")


def test_claim_of_an_event_written_in_the_same_transaction_is_not_taken_for_a_restore(conn: Connection) -> None:
    with conn.transaction():
        pay(conn, add_merchant(conn)[1])
        conn.execute("select * from outbox.claim_batch('submit', 'w')")


def test_a_database_that_went_back_in_time_in_its_own_cluster_gets_a_new_restore_generation(conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1], 2)
    with conn.transaction():
        conn.execute("set local session_replication_role = replica")
        conn.execute("update outbox.events set xid = '1000000000000'")
    for _ in range(2):
        assert conn.execute("select outbox.begin_restore_generation('test')").fetchone() == (2,)
    assert len(claim_all(conn, "submit")) == 2
