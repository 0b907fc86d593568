"""Rights: running roles execute their functions and read their views, nothing else."""

from __future__ import annotations

import json

import psycopg
import pytest
from psycopg import errors

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
        connect("analyst").execute(f"select count(*) from report.{view}".encode())
    assert connect("analyst").execute("select state from report.payments").fetchall() == [("initiated",)]


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
