"""The publication of the outbox: every event is in the log by the name outbox.events, whatever its partition."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from app.finding import Finding
from app.status_findings import find_problems
from db.connect import harden
from db.deploy.deploy import deploy
from db.deploy.publication import CREATE_PUBLICATION, publish_events
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.support.payments import Connection, add_merchant, pay

SLOT = "capture"
CHANGES = f"""
select data from pg_logical_slot_get_binary_changes('{SLOT}', null, null,
    'proto_version', '1', 'publication_names', 'surety_events')
"""


@pytest.fixture(scope="module")
def logical_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(settings={"wal_level": "logical", "max_replication_slots": "4"}) as server:
        yield server


@pytest.fixture
def logical(logical_server: EmbeddedServer) -> Iterator[Connection]:
    with temporary_database(logical_server.url, "surety_test") as url:
        deploy(url)
        with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
            # Only what has reached the disk is decoded.
            conn.execute("set synchronous_commit = on")
            conn.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (SLOT,))
            yield conn
            conn.execute("select pg_drop_replication_slot(%s)", (SLOT,))


def published(conn: Connection) -> tuple[set[str], list[str]]:
    """Names of the tables whose rows were published since the last call, and the ids of these rows."""
    names: dict[int, str] = {}
    used, ids = set(), []
    for (data,) in conn.execute(CHANGES).fetchall():
        kind, body = data[:1], bytes(data[1:])
        if kind == b"R":
            (oid,) = struct.unpack("!I", body[:4])
            schema, table = body[4:].split(b"\0")[:2]
            names[oid] = f"{schema.decode()}.{table.decode()}"
        elif kind == b"I":
            oid, _, _, _, length = struct.unpack("!IcHcI", body[:12])
            used.add(names[oid])
            ids.append(body[12 : 12 + length].decode())
        else:
            assert kind in {b"B", b"C", b"O"}, kind
    return used, ids


def events(conn: Connection) -> list[str]:
    return [id for (id,) in conn.execute("select id from outbox.events order by xid, id").fetchall()]


def test_each_event_is_published_once_under_the_name_of_the_root(logical: Connection) -> None:
    pay(logical, add_merchant(logical)[1])
    assert published(logical) == ({"outbox.events"}, events(logical))
    assert published(logical) == (set(), [])


def test_events_of_partitions_that_come_and_go_are_published(logical: Connection) -> None:
    merchant = add_merchant(logical)[1]
    pay(logical, merchant)
    before = events(logical)
    [(partition,)] = logical.execute("select tableoid::regclass::text from outbox.events limit 1").fetchall()
    logical.execute("select surety.maintain_partitions(14)")
    logical.execute("update surety.environment set kind = 'test'")
    logical.execute("insert into surety.clock (ahead) values ('400 days')")
    pay(logical, merchant)
    late = [id for id in events(logical) if id not in before]
    assert logical.execute("select count(distinct tableoid) from outbox.events").fetchone() == (2,)
    assert published(logical) == ({"outbox.events"}, before + late)
    logical.execute(f"alter table outbox.events detach partition {partition}".encode())
    pay(logical, merchant)
    assert published(logical) == ({"outbox.events"}, [id for id in events(logical) if id not in late])


def test_changed_publication_is_a_finding_until_the_next_deploy(logical: Connection) -> None:
    assert findings(logical) == []
    for change in (
        "alter publication surety_events set (publish_via_partition_root = false)",
        "alter publication surety_events set (publish_via_partition_root = true, publish = 'update')",
        "alter publication surety_events set table outbox.events where (type <> 'payment.failed')",
        "alter publication surety_events set table outbox.events (id, xid)",
        "alter publication surety_events set table surety.payments",
    ):
        logical.execute(change.encode())
        [finding] = findings(logical)
        assert (finding.id, finding.urgency) == ("event-publication", 2)
        logical.execute("drop publication surety_events")
        assert findings(logical) == []
        publish_events(logical, pytest.fail)
    assert logical.execute("select pubviaroot, pubinsert, pubupdate, pubdelete from pg_publication").fetchall() == [
        (True, True, False, False)
    ]


def test_slot_whose_log_is_gone_is_a_finding(logical_server: EmbeddedServer, logical: Connection) -> None:
    logical.execute("select pg_create_physical_replication_slot('standby', true)")
    logical.execute("alter system set max_slot_wal_keep_size = '1MB'")
    logical.execute("select pg_reload_conf()")
    try:
        for _ in range(3):
            logical.execute("select pg_switch_wal()")
            logical.execute("create table if not exists public.filler (n int)")
            logical.execute("insert into public.filler select generate_series(1, 1000)")
        logical.execute("checkpoint")
        lost = findings(logical)
        assert {(finding.id, finding.urgency) for finding in lost} == {("lost-slot", 2)}
        assert [finding.what for finding in lost] == [
            f"the log for the replication slot {SLOT} is gone: its reader has missed events",
            "the log for the standby of the replication slot standby is gone: it can't catch up",
        ]
    finally:
        logical.execute("select pg_drop_replication_slot('standby')")
        logical.execute("alter system reset max_slot_wal_keep_size")
        logical.execute("select pg_reload_conf()")


def test_login_that_may_not_publish_gets_the_statement(logical: Connection) -> None:
    logical.execute("drop publication surety_events")
    said: list[str] = []
    logical.execute("set role surety_worker")
    publish_events(logical, said.append)
    logical.execute("reset role")
    assert len(said) == 1
    assert said[0].endswith(f"as one that may: {CREATE_PUBLICATION}")
    assert logical.execute("select count(*) from pg_publication").fetchone() == (0,)


def findings(conn: Connection) -> list[Finding]:
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    found: list[Any] = find_problems(state)
    return [finding for finding in found if finding.id in {"event-publication", "lost-slot"}]
