"""Monthly partitions: created ahead during traffic, detached when nothing needs them any more."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from db.connect import harden
from db.embedded.databases import with_database
from tests.support.payments import Connection, add_merchant, fact, pay, record, state_of, violations


@pytest.fixture
def conn(postgresql: Connection) -> Connection:
    """A connection with all rights to a database of the test's own: partitions are created and dropped."""
    postgresql.autocommit = True
    return postgresql


@pytest.fixture
def database(conn: Connection, server: str) -> str:
    return with_database(server, conn.info.dbname)


def partitions(conn: Connection, parent: str) -> list[str]:
    rows = conn.execute(
        "select inhrelid::regclass::text from pg_inherits where inhparent = %s::regclass order by 1", (parent,)
    )
    return [row[0] for row in rows]


def move_clock(conn: Connection, ahead: str) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute(
        "insert into surety.clock (ahead) values (%s::interval)"
        " on conflict (kind) do update set ahead = excluded.ahead",
        (ahead,),
    )


def test_partitions_are_made_three_months_ahead_and_only_once(conn: Connection) -> None:
    parents = [row[0] for row in conn.execute("select parent::text from surety.partitioned_tables")]
    assert {len(partitions(conn, parent)) for parent in parents} == {4}
    assert conn.execute("select surety.maintain_partitions()").fetchone() == (0,)
    move_clock(conn, "2 months")
    assert conn.execute("select surety.maintain_partitions()").fetchone() == (2 * len(parents),)


def test_first_partition_has_room_for_the_month_before_it(conn: Connection) -> None:
    [(day,)] = conn.execute("select extract(day from surety.time_now() at time zone 'UTC')::integer").fetchall()
    before = partitions(conn, "surety.payments")
    move_clock(conn, f"-{day + 1} days")
    assert conn.execute("select surety.maintain_partitions()").fetchone() == (0,)
    assert partitions(conn, "surety.payments") == before
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    assert state_of(conn, payment_id) == "initiated"
    assert not violations(conn)


def test_every_pair_of_siblings_has_its_keys(conn: Connection) -> None:
    move_clock(conn, "5 months")
    conn.execute("select surety.maintain_partitions()")
    without = conn.execute(
        """
        select k.name, i.inhrelid::regclass from surety.sibling_keys as k
        join pg_inherits as i on i.inhparent = ('surety.' || k.child)::regclass
        where not exists (
            select from pg_constraint as c where c.conrelid = i.inhrelid and c.conname = k.name and c.convalidated
        )
        """
    ).fetchall()
    assert without == []


APPEND_ONLY_TABLES = {
    "surety.steps": "payment_id",
    "surety.facts": "payment_id",
    "ledger.transfers": "posting_id",
    "outbox.events": "id",
    "audit.entries": "id",
}
"""Those in partitions, each with the column of its partitions."""


def test_partitions_of_append_only_tables_refuse_changes(conn: Connection) -> None:
    protected = "select tgrelid::regclass::text from pg_trigger where tgfoid = 'audit.refuse_change()'::regprocedure"
    parents = {
        row[0]
        for row in conn.execute(f"{protected} and tgrelid in (select partrelid from pg_partitioned_table)".encode())
    }
    assert parents == set(APPEND_ONLY_TABLES)
    move_clock(conn, "5 months")
    conn.execute("select surety.maintain_partitions()")
    for parent, column in APPEND_ONLY_TABLES.items():
        for partition in partitions(conn, parent):
            assert_refuses_changes(conn, partition, column)


def test_partition_attached_by_hand_becomes_append_only_and_can_be_removed(conn: Connection) -> None:
    conn.execute("set role surety_owner")
    conn.execute("create table audit.entries_209901 (like audit.entries including all)")
    conn.execute(
        "alter table audit.entries attach partition audit.entries_209901 for values from ('aud_3') to ('aud_4')"
    )
    conn.execute("select surety.maintain_partitions()")
    assert_refuses_changes(conn, "audit.entries_209901", "id")
    conn.execute("alter table audit.entries detach partition audit.entries_209901 concurrently")
    assert_refuses_changes(conn, "audit.entries_209901", "id")
    conn.execute("drop table audit.entries_209901")
    assert conn.execute("select surety.maintain_partitions()").fetchone() == (0,)


def assert_refuses_changes(conn: Connection, table: str, column: str) -> None:
    """The table's owner can neither update nor delete nor truncate it."""
    for statement in (f"update {table} set {column} = {column}", f"delete from {table}", f"truncate {table} cascade"):
        with pytest.raises(psycopg.DatabaseError, match="append-only") as refusal:
            conn.execute(statement.encode())
        assert refusal.value.sqlstate == "SU003", statement


def test_a_payment_lives_across_the_turn_of_a_month(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [before] = pay(conn, key_hash)
    move_clock(conn, "40 days")
    conn.execute("select surety.maintain_partitions()")
    [after] = pay(conn, key_hash)
    for payment_id in (before, after):
        record(conn, [fact(payment_id, "captured", "ch", 10000)])
    places = conn.execute("select distinct tableoid::regclass::text from surety.payments").fetchall()
    assert len(places) == 2
    assert {state_of(conn, before), state_of(conn, after)} == {"confirmed"}
    assert not violations(conn)


def test_partitions_are_made_beside_traffic_by_several_at_once(conn: Connection, database: str) -> None:
    _, key_hash = add_merchant(conn)
    stop = threading.Event()

    def trade() -> int:
        made = 0
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            while not stop.is_set():
                record(connection, [fact(p, "captured", "ch", 10000) for p in pay(connection, key_hash, 10)])
                made += 10
        return made

    def maintain(months: int) -> None:
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            connection.execute("select surety.maintain_partitions(%s)", (months,))

    with ThreadPoolExecutor(4) as pool:
        traders = [pool.submit(trade) for _ in range(2)]
        for upkeep in [pool.submit(maintain, months) for months in (5, 6)]:
            upkeep.result(timeout=60)
        stop.set()
        made = sum(trader.result(timeout=60) for trader in traders)
    assert len(partitions(conn, "surety.payments")) == 7
    assert conn.execute("select count(*) from surety.payments where state = 'confirmed'").fetchone() == (made,)
    assert not violations(conn)


def test_partition_is_removable_only_when_its_events_are_not_needed(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 3)
    month = partitions(conn, "outbox.events")[0]
    move_clock(conn, "70 days")

    def past() -> list[str]:
        return [row[0] for row in conn.execute("select partition from surety.detachable_partitions('1 month')")]

    assert month not in past(), "submit has not seen its events"
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch('submit', 'test')").fetchone()
    assert row is not None
    assert month not in past(), "they are in a batch"
    conn.execute("select outbox.complete_events(%s, %s, %s)", row)
    assert month in past()
    statement = conn.execute(
        "select detach from surety.detachable_partitions('1 month') where partition = %s", (month,)
    ).fetchone()
    assert statement is not None
    conn.execute(statement[0].encode())
    assert month not in partitions(conn, "outbox.events")
    pay(conn, key_hash)
    # The steps are sound without their detached events, but no handler did the events' work.
    assert violations(conn) == {"no payment is forgotten": 3}
    conn.execute("alter table outbox.events disable trigger user")
    conn.execute("delete from outbox.events")
    assert violations(conn) == {"every step has one event": 1, "no payment is forgotten": 4}
