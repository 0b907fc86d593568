"""Operators on the command line: accounts, personal keys, roles, and acting for another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.cli.operators import ROLES
from app.finding import Finding
from app.status_findings import find_problems
from tests.cli.conftest import Run, refused, said
from tests.conftest import Connection
from tests.support.http_client import unique_name
from tests.support.operators import add_operator
from tests.support.payments import add_merchant

# A command that needs each scope, and is refused for another reason after that. Without one, a scope has no command.
COMMANDS = {
    "dead-letters:replay": ("dead-letters", "replay", "dl_none", "--reason", "why"),
    "dead-letters:discard": ("dead-letters", "discard", "dl_none", "--reason", "why"),
    "merchant-payouts:write": ("merchant-payouts", "cancel", "mpo_none", "--reason", "why"),
    "books:close": ("close", "--month", "2020-01"),
    "discrepancies:assign": ("discrepancies", "assign", "dis_none"),
    "discrepancies:resolve": ("discrepancies", "resolve", "dis_none", "--reason", "why"),
    "statements:import": ("bank-statements", "set-account", "bac_none", "--payer-text", "none"),
    "holds:decide": ("holds", "release", "pay_none", "--reason", "why"),
    "webhook-endpoints:write": ("webhook-endpoints", "disable", "we_none", "--reason", "why"),
    "limits:write": ("velocity", "remove", "vel_none"),
    "payer-accounts:write": ("ach", "accounts", "remove", "bac_none", "--reason", "why"),
    "keys:write": ("keys", "create", "mer_none"),
    "keys:revoke": ("keys", "revoke", "key_none"),
    "merchants:write": ("merchants", "suspend", "mer_none"),
    "handlers:write": ("handlers", "pause", "none", "--reason", "why"),
    "customers:erase": ("customers", "erase", "--merchant", "mer_none", "--email", "a@b.example"),
    "mode:write": ("mode", "test"),
    "operators:write": ("operators", "set", "none", "--inactive"),
    "operators:act-as": ("--as", "viewer", "merchants", "suspend", "mer_none"),
}


@pytest.fixture
def alone(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, conn: Connection) -> Run:
    """`surety …` without a personal key, in a database without operators."""
    conn.execute("truncate surety.operators, surety.operator_keys")
    monkeypatch.delenv("SURETY_OPERATOR_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    return run


def add(run: Run, name: str, role: str = "admin") -> str:
    return said(run("operators", "add", name, "--email", f"{name}@example.com", "--role", role))


def actors(conn: Connection, outcome: str) -> list[str]:
    rows = conn.execute("select actor from audit.entries where outcome = %s order by at, actor", (outcome,))
    return [actor for (actor,) in rows]


def test_first_admin_needs_only_the_database_and_the_next_operator_an_admin(
    alone: Run, monkeypatch: pytest.MonkeyPatch, conn: Connection
) -> None:
    assert refused(alone("merchants", "add", "Acme Books")).startswith("this needs your personal key")
    viewer = ("operators", "add", "eve", "--email", "eve@example.com", "--role", "viewer")
    assert refused(alone(*viewer)).startswith("this needs your personal key")
    key = add(alone, "ana")
    assert key.startswith("sty_operator_")
    assert actors(conn, "operator added")[-1].startswith("operator:local:")
    assert refused(alone("operators", "add", "eve", "--email", "e@example.com", "--role", "admin")).startswith(
        "there is an admin already"
    )
    monkeypatch.setenv("SURETY_OPERATOR_KEY", key)
    monkeypatch.setenv("LOGNAME", "eve")
    said(alone(*viewer))
    assert actors(conn, "operator added")[-1] == "operator:ana"
    said(alone("merchants", "add", "Acme Books"))
    assert actors(conn, "merchant added") == ["operator:ana"]
    listed = json.loads(said(alone("operators", "list", "--json")))
    assert [(each["name"], each["role"], each["is_active"], each["keys"]) for each in listed] == [
        ("ana", "admin", True, 1),
        ("eve", "viewer", True, 1),
    ]


def test_admin_who_lost_every_key_gets_a_new_one_by_access_to_the_database(alone: Run, conn: Connection) -> None:
    add(alone, "ana")
    conn.execute("update surety.operator_keys set revoked_at = now()")
    assert add(alone, "ana").startswith("sty_operator_")
    assert conn.execute("select count(*) from surety.operators").fetchall() == [(1,)]


def test_recovery_of_a_deactivated_admin_revokes_its_old_keys(
    alone: Run, monkeypatch: pytest.MonkeyPatch, conn: Connection
) -> None:
    old = add(alone, "ana")
    monkeypatch.setenv("SURETY_OPERATOR_KEY", old)
    said(alone("operators", "set", "ana", "--inactive"))
    [listed] = json.loads(said(alone("operators", "list", "--json")))
    assert (listed["is_active"], listed["keys"]) == (False, 0)
    report = refused(alone("merchants", "add", "Acme Books"))
    assert "if no admin has a valid key, unset SURETY_OPERATOR_KEY and SURETY_OPERATOR_KEY_FILE" in report
    assert report.endswith("`surety operators add NAME --email ADDRESS --role admin`")
    monkeypatch.delenv("SURETY_OPERATOR_KEY")
    new = add(alone, "ana")
    monkeypatch.setenv("SURETY_OPERATOR_KEY", old)
    assert "this personal key was revoked" in refused(alone("merchants", "add", "Acme Books"))
    monkeypatch.setenv("SURETY_OPERATOR_KEY", new)
    said(alone("merchants", "add", "Acme Books"))
    [listed] = json.loads(said(alone("operators", "list", "--json")))
    assert (listed["is_active"], listed["keys"]) == (True, 1)
    assert len(actors(conn, "operator key revoked")) == 1
    assert len(actors(conn, "operator changed")) == 2


@pytest.mark.parametrize("scope", COMMANDS)
@pytest.mark.parametrize("role", ROLES)
def test_command_is_allowed_to_the_roles_of_the_table(
    run: Run, conn: Connection, monkeypatch: pytest.MonkeyPatch, role: str, scope: str
) -> None:
    name = unique_name("operator")
    monkeypatch.setenv("SURETY_OPERATOR_KEY", add_operator(conn, name, role))
    allowed = conn.execute("select from surety.role_scopes where role = %s and scope = %s", (role, scope)).fetchall()
    if scope == "operators:act-as" and not allowed and role != "admin":
        conn.execute("insert into surety.role_scopes values (%s, 'merchants:write')", (role,))
    result = run(*COMMANDS[scope])
    report = str(result.exception or "")
    assert (f"it needs the scope {scope}" in report) is not bool(allowed), report
    denied = conn.execute(
        "select outcome, reason, snapshot ->> 'scope' from audit.entries where actor = %s and kind = 'denied'",
        (f"operator:{name}",),
    ).fetchall()
    if not allowed:
        assert denied == [("denied", "scope-missing", scope)]


def test_every_scope_of_the_table_has_a_command_or_a_route(conn: Connection) -> None:
    scopes = {scope for (scope,) in conn.execute("select scope from surety.role_scopes")}
    assert scopes == set(COMMANDS) | {"status:read", "dead-letters:read", "discrepancies:read", "holds:read"}
    assert [role for (role,) in conn.execute("select role from surety.operator_roles order by position")] == list(ROLES)


def test_changed_role_and_deactivation_apply_to_the_next_command(
    run: Run, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    merchant, _ = add_merchant(conn)
    key = add_operator(conn, "bob", "admin")
    admin = os.environ["SURETY_OPERATOR_KEY"]

    def as_bob(*words: str) -> str:
        monkeypatch.setenv("SURETY_OPERATOR_KEY", key)
        result = run(*words)
        monkeypatch.setenv("SURETY_OPERATOR_KEY", admin)
        return said(result) if result.exit_code == 0 else refused(result)

    assert as_bob("merchants", "suspend", merchant) == f"{merchant} is suspended"
    assert said(run("operators", "set", "bob", "--role", "viewer")) == "bob is changed"
    assert said(run("operators", "set", "bob", "--role", "viewer")) == "bob is unchanged"
    assert as_bob("merchants", "resume", merchant).startswith("bob may not do this: it needs the scope merchants:write")
    said(run("operators", "set", "bob", "--role", "admin", "--inactive"))
    assert as_bob("merchants", "resume", merchant).startswith("bob: this personal key was revoked")
    assert refused(run("keys", "create", "--operator", "bob")) == "there is no active operator bob"
    said(run("operators", "set", "bob", "--active"))
    assert as_bob("merchants", "resume", merchant) == f"{merchant} is active"


def test_key_of_a_lesser_role_may_do_less_than_its_operator(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    key = said(run("keys", "create", "--operator", "tester", "--role", "viewer"))
    monkeypatch.setenv("SURETY_OPERATOR_KEY", key)
    assert "it needs the scope merchants:write" in refused(run("merchants", "add", "Acme Books"))


def test_acting_for_another_names_both_and_needs_the_right_of_both(
    run: Run, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_operator(conn, "ana", "admin")
    add_operator(conn, "eve", "viewer")
    said(run("--as", "ana", "merchants", "add", "Acme Books"))
    assert actors(conn, "merchant added") == ["operator:ana (by tester)"]
    for name in ("eve", "unknown"):
        report = refused(run("--as", name, "merchants", "add", "Acme Toys"))
        assert report == f"--as: {name} is no active operator who may do this (scope merchants:write)"
    monkeypatch.setenv("SURETY_OPERATOR_KEY", add_operator(conn, "bob", "finance"))
    report = refused(run("--as", "ana", "discrepancies", "resolve", "dis_none", "--reason", "why"))
    assert report.startswith("bob may not do this: it needs the scope operators:act-as")


def test_key_file_must_be_readable_by_its_owner_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(os.environ["SURETY_OPERATOR_KEY"] + "\n")
    monkeypatch.delenv("SURETY_OPERATOR_KEY")
    monkeypatch.setenv("SURETY_OPERATOR_KEY_FILE", str(file))
    for mode in (0o644, 0o640, 0o604, 0o620):
        file.chmod(mode)
        assert "must be your own and have mode 0600" in refused(run("merchants", "add", "Acme Books"))
    file.chmod(0o600)
    said(run("merchants", "add", "Acme Books"))
    monkeypatch.setenv("SURETY_OPERATOR_KEY_FILE", str(tmp_path / "none"))
    assert refused(run("merchants", "add", "Acme Books")).startswith("SURETY_OPERATOR_KEY_FILE: ")
    home = tmp_path / ".config" / "surety"
    home.mkdir(parents=True)
    file.rename(home / "operator-key")
    monkeypatch.delenv("SURETY_OPERATOR_KEY_FILE")
    monkeypatch.setenv("HOME", str(tmp_path))
    said(run("merchants", "add", "Acme Books"))


@pytest.mark.parametrize(
    ("options", "report"),
    [
        (("a b", "--email", "a@example.com"), "an operator's name has 1 to 100 letters, digits and . _ @ -"),
        (("a", "--email", "nowhere"), "--email: an address, such as ana@example.com"),
        (("tester", "--email", "a@example.com"), "there is an operator of this name already"),
    ],
)
def test_account_that_breaks_a_rule_is_refused(run: Run, options: tuple[str, ...], report: str) -> None:
    assert refused(run("operators", "add", *options, "--role", "viewer")).startswith(report)


def test_address_belongs_to_one_operator_whatever_its_case(run: Run) -> None:
    said(run("operators", "add", "zoe", "--email", "zoë@example.com", "--role", "viewer"))
    again = refused(run("operators", "add", "zoe2", "--email", "ZOË@example.com", "--role", "viewer"))
    assert again == "--email: another operator has this address"


def test_expiring_key_of_an_operator_is_a_finding_until_it_is_rotated(run: Run, conn: Connection) -> None:
    add_operator(conn, "eve", "support")
    said(run("keys", "create", "--operator", "eve", "--role", "viewer", "--network", "203.0.113.0/24", "--days", "30"))
    conn.execute(
        "update surety.operator_keys set created_at = created_at - interval '20 days',"
        " expires_at = expires_at - interval '20 days' where role = 'viewer'"
    )
    [(old, hint)] = conn.execute("select id, hint from surety.operator_keys where role = 'viewer'").fetchall()
    [finding] = expiring_keys(conn)
    assert finding.what.startswith(f"{old} (…{hint}) of operator eve expires in ")
    assert finding.next == f"surety keys rotate {old}, and give the operator the new key"
    new = said(run("keys", "rotate", old, "--overlap-hours", "1"))
    assert expiring_keys(conn) == []
    lives = conn.execute(
        "select hint, role, networks::text[], round(extract(epoch from expires_at - now()) / 3600)"
        " from surety.operator_keys where role = 'viewer' order by id"
    ).fetchall()
    assert lives == [(hint, "viewer", ["203.0.113.0/24"], 1), (new[-4:], "viewer", ["203.0.113.0/24"], 30 * 24)]
    said(run("operators", "set", "eve", "--inactive"))
    assert refused(run("keys", "rotate", old)) == f"there is no active key {old}"


def expiring_keys(conn: Connection) -> list[Finding]:
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    return [finding for finding in find_problems(state) if finding.id == "expiring-keys"]
