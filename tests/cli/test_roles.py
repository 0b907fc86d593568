"""Logins of analysts and auditors: created with bounds, changed, listed, revoked, and audited without a password."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

from app.cli import cli
from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection

PASSWORD = "correct-horse-battery"


@pytest.fixture
def name(conn: Connection) -> Iterator[str]:
    """The name of a login, which is gone in the end: roles belong to the whole server."""
    chosen = f"reports_{os.urandom(4).hex()}"
    yield chosen
    conn.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(chosen)))


def has_password(conn: Connection, name: str, password: str) -> bool:
    """Whether this is the password of a login, by the verifier that PostgreSQL keeps."""
    [(verifier,)] = conn.execute("select rolpassword from pg_authid where rolname = %s", (name,)).fetchall()
    algorithm, salted, keys = verifier.split("$")
    assert algorithm == "SCRAM-SHA-256"
    iterations, salt = salted.split(":")
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(iterations))
    stored = hashlib.sha256(hmac.digest(key, b"Client Key", "sha256")).digest()
    return bool(keys.split(":")[0] == base64.b64encode(stored).decode())


def session_of(database: str, name: str) -> psycopg.Connection[Any]:
    return psycopg.connect(make_conninfo(database, user=name, password=PASSWORD), autocommit=True)


def audited(conn: Connection) -> list[tuple[str, str, str]]:
    query = "select outcome, snapshot ->> 'login', snapshot::text from audit.entries where outcome like %s order by id"
    return conn.execute(query, ("database login %",)).fetchall()


def test_login_of_an_analyst_reads_reports_within_its_bounds(
    run: Run, conn: Connection, database: str, name: str
) -> None:
    made = json.loads(said(run("roles", "grant-login", "analyst", name, "--connections", "1", "--json")))
    assert has_password(conn, name, made["password"])
    with closing(session_of(database, name)) as session:
        session.execute("select * from report.payments").fetchall()
        shown = [
            session.execute(f"show {setting}".encode()).fetchall()[0][0]
            for setting in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        ]
        assert shown == ["15min", "5s", "5min"]
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            session.execute("create temporary table t ()")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("select * from audit.trail")
        with pytest.raises(psycopg.OperationalError, match="too many connections"):
            session_of(database, name)
    [listed] = [each for each in json.loads(said(run("roles", "list", "--json"))) if each["name"] == name]
    assert (listed["role"], listed["connections"], listed["is_active"]) == ("analyst", 1, True)
    [(outcome, login, snapshot)] = audited(conn)
    assert (outcome, login) == ("database login granted", name) and made["password"] not in snapshot


def test_login_is_changed_and_keeps_its_password(run: Run, conn: Connection, database: str, name: str) -> None:
    first = json.loads(said(run("roles", "grant-login", "analyst", name, "--json")))["password"]
    changed = json.loads(said(run("roles", "grant-login", "auditor", name, "--statement-seconds", "7", "--json")))
    assert changed["password"] is None and has_password(conn, name, first)
    with closing(session_of(database, name)) as session:
        session.execute("select * from audit.trail").fetchall()
        assert session.execute("show statement_timeout").fetchall() == [("7s",)]
    said(run("roles", "grant-login", "analyst", name))
    with closing(session_of(database, name)) as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("select * from audit.trail")
    second = json.loads(said(run("roles", "grant-login", "analyst", name, "--new-password", "--json")))["password"]
    assert second != first and has_password(conn, name, second)


def test_password_comes_from_a_file_or_the_terminal(run: Run, conn: Connection, name: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    assert PASSWORD not in run("roles", "grant-login", "auditor", name, "--password-file", str(path)).output
    assert has_password(conn, name, PASSWORD)
    words = ["roles", "grant-login", "auditor", name, "--ask-password"]
    typed = CliRunner().invoke(cli, words, input=f"{PASSWORD}-2\n{PASSWORD}-2\n")
    assert typed.exit_code == 0 and PASSWORD not in typed.output
    assert has_password(conn, name, f"{PASSWORD}-2")
    path.write_text("short\n")
    assert "12 to 128" in refused(run("roles", "grant-login", "auditor", name, "--password-file", str(path)))
    assert "can't be read" in refused(run("roles", "grant-login", "auditor", name, "--password-file", "/nowhere"))


@pytest.mark.parametrize(
    "taken", ["surety_api", "surety_reports", "pg_reports", "postgres", "Reports", "1a", "a-b", ""]
)
def test_name_of_ours_or_no_plain_name_is_refused(run: Run, conn: Connection, taken: str) -> None:
    assert refused(run("roles", "grant-login", "analyst", taken)).startswith("NAME: ")
    assert audited(conn) == []


def test_role_that_was_not_created_by_it_is_left_alone(run: Run, conn: Connection, name: str) -> None:
    conn.execute(sql.SQL("create role {}").format(sql.Identifier(name)))
    assert "there is a role" in refused(run("roles", "grant-login", "analyst", name))
    assert "shows no login" in refused(run("roles", "revoke-login", name))
    assert conn.execute("select rolcanlogin from pg_roles where rolname = %s", (name,)).fetchall() == [(False,)]


def test_revoked_login_loses_its_sessions_and_is_gone(run: Run, conn: Connection, database: str, name: str) -> None:
    said(run("roles", "grant-login", "analyst", name))
    with closing(session_of(database, name)) as session:
        assert said(run("roles", "revoke-login", name)) == f"{name} is revoked"
        with pytest.raises(psycopg.OperationalError):
            session.execute("select 1")
    assert conn.execute("select from pg_roles where rolname = %s", (name,)).fetchall() == []
    assert [outcome for outcome, _, _ in audited(conn)] == ["database login granted", "database login revoked"]
    assert "shows no login" in refused(run("roles", "revoke-login", name))


def test_login_that_may_not_create_roles_gets_the_statements(
    run: Run, conn: Connection, database: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = f"{name}_owner"
    conn.execute(sql.SQL("create role {} login in role surety_owner").format(sql.Identifier(owner)))
    try:
        monkeypatch.setenv("DATABASE_URL", make_conninfo(database, user=owner))
        report = refused(run("roles", "grant-login", "analyst", name))
    finally:
        conn.execute(sql.SQL("drop role {}").format(sql.Identifier(owner)))
    head, *statements = report.splitlines()
    assert "nothing was changed" in head and f"\\password {name}" in head
    assert "SCRAM" not in report and audited(conn) == []
    for statement in statements:
        conn.execute(statement.encode())
    monkeypatch.setenv("DATABASE_URL", database)
    [listed] = [each for each in json.loads(said(run("roles", "list", "--json"))) if each["name"] == name]
    assert listed["role"] == "analyst"
