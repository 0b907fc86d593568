"""Rights: running roles execute their functions and read their views, nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import conninfo, errors, sql

from db.connect import ProcessKind
from tests.conftest import Connect
from tests.support.grants import WRITTEN, read_grants
from tests.support.payments import Connection, add_merchant, create, request

RUNNING: list[ProcessKind] = ["api", "webhook", "worker", "analyst", "auditor"]


def test_grants_match_the_committed_list(conn: Connection) -> None:
    assert read_grants(conn) == WRITTEN.read_text(), "python -m tests.support.grants writes them down anew"


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize(
    "statement",
    [
        "select from surety.payments",
        "select from surety.api_keys",
        "insert into surety.steps default values",
        "update surety.payments set amount_minor = 1",
        "delete from audit.entries",
        "update audit.entries set outcome = 'nothing happened'",
        "truncate ledger.transfers",
        "create table surety.mine ()",
        "insert into surety.clock (ahead) values ('1 day')",
    ],
)
def test_no_running_role_reaches_a_table(connect: Connect, kind: ProcessKind, statement: str) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        connect(kind).execute(statement.encode())


@pytest.mark.parametrize("kind", ["webhook", "worker", "analyst", "auditor"])
def test_only_the_api_accepts_payments(conn: Connection, connect: Connect, kind: ProcessKind) -> None:
    _, key_hash = add_merchant(conn)
    assert create(connect("api"), [request(key_hash)])[0]["status"] == 201
    with pytest.raises(errors.InsufficientPrivilege):
        create(connect(kind), [request(key_hash)])


def test_analysts_read_the_views(conn: Connection, connect: Connect) -> None:
    _, key_hash = add_merchant(conn)
    create(conn, [request(key_hash)])
    views = conn.execute("select table_name from information_schema.views where table_schema = 'report'").fetchall()
    for (view,) in views:
        connect("analyst").execute(f"select * from report.{view}".encode())
    assert connect("analyst").execute("select state from report.payments").fetchall() == [("initiated",)]


def test_auditors_alone_read_the_audit_trail(conn: Connection, connect: Connect) -> None:
    _, key_hash = add_merchant(conn)
    create(conn, [request(key_hash)])
    read = "select kind, outcome from audit.trail where payment_id is not null"
    assert connect("auditor").execute(read).fetchall() == [("step", "accepted")]
    for kind in RUNNING:
        if kind != "auditor":
            with pytest.raises(errors.InsufficientPrivilege):
                connect(kind).execute(read)


def test_every_security_definer_function_pins_its_search_path(conn: Connection) -> None:
    loose = conn.execute(
        """
        select p.oid::regprocedure::text from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace
        where n.nspname in ('surety', 'ledger', 'outbox', 'audit', 'api') and p.prosecdef
            and not exists (select from unnest(p.proconfig) as c (setting) where c.setting like 'search_path=%pg_temp')
        """
    ).fetchall()
    assert loose == []


def test_no_role_of_ours_can_log_in(conn: Connection) -> None:
    assert conn.execute("select rolname from pg_roles where rolname ~ '^surety_' and rolcanlogin").fetchall() == []


@pytest.mark.parametrize("kind", ["operator", "request", "denied", "webhook", "dead_letter", "step"])
def test_worker_cannot_write_audit_entries_of_other_actors(connect: Connect, kind: str) -> None:
    entry = {"kind": kind, "actor": "operator:boss", "outcome": "allowed", "version": 1, "to_state": "settled"}
    with pytest.raises(psycopg.DatabaseError) as refusal:
        connect("worker").execute("select audit.write_entries(%s)", (json.dumps([entry]),))
    assert refusal.value.sqlstate == "SU008"


@pytest.fixture
def analyst_login(conn: Connection, database: str) -> Iterator[Connection]:
    """A session of a login that has the analysts' role and no other."""
    name, password = f"surety_test_analyst_{os.urandom(4).hex()}", os.urandom(8).hex()
    create_login = sql.SQL("create role {} login password {} in role surety_analyst")
    conn.execute(create_login.format(sql.Identifier(name), sql.Literal(password)))
    try:
        address = conninfo.make_conninfo(database, user=name, password=password)
        with psycopg.connect(address, autocommit=True) as session:
            yield session
    finally:
        conn.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def test_lock_that_another_login_holds_stops_no_worker(connect: Connect, analyst_login: Connection) -> None:
    take = "select surety.take_lock('poll_events', '1 minute')"
    hold = "select pg_advisory_lock(hashtextextended('surety:poll_events', %s))"
    worker, other = connect("worker"), connect("worker")
    analyst_login.execute(hold, (0,))
    assert worker.execute(take).fetchone() != (None,)
    assert other.execute(take).fetchone() == (None,)
    worker.execute("select pg_advisory_unlock_all()")
    for turn in range(1, 16):
        analyst_login.execute(hold, (turn,))
    with pytest.raises(errors.LockNotAvailable, match="poll_events is held by a login that is no worker's"):
        worker.execute(take)
    # Upkeep takes locks of rows, which need a right that an analyst lacks.
    analyst_login.execute("select pg_advisory_lock(hashtext('surety.maintain_partitions'))")
    worker.execute("set statement_timeout = '5s'")
    worker.execute("select surety.maintain_partitions()")
    with pytest.raises(errors.InsufficientPrivilege):
        analyst_login.execute("select from surety.environment for key share")
