"""`surety keys create`: an option that doesn't fit the kind of key is refused, so no key is wider than it was asked."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Run, refused, said
from tests.support.operators import add_operator
from tests.support.payments import Connection, add_merchant

COUNT_KEYS = "select (select count(*) from surety.api_keys) + (select count(*) from surety.operator_keys)"


@pytest.mark.parametrize(
    ("holder", "options", "report"),
    [
        ("merchant", ("--role", "viewer"), "--role: only an operator's key has a role; limit a merchant's key by"),
        ("operator", ("--scope", "read"), "--scope: only a merchant's key has scopes; limit an operator's key by"),
        ("operator", ("--name", "laptop"), "--name: only a merchant's key has a name"),
        ("operator", ("--name", "default"), "--name: only a merchant's key has a name"),
        ("merchant", ("--name", ""), "a key's name has 1 to 100 letters"),
        ("merchant", ("--operator", "tester"), "give a MERCHANT_ID or --operator NAME, not both"),
        ("neither", (), "give a MERCHANT_ID, or --operator NAME"),
    ],
)
def test_option_of_the_other_kind_of_key_is_refused(
    run: Run, conn: Connection, holder: str, options: tuple[str, ...], report: str
) -> None:
    merchant, _ = add_merchant(conn)
    before = conn.execute(COUNT_KEYS).fetchall()
    whose = {"merchant": (merchant,), "operator": ("--operator", "tester"), "neither": ()}[holder]
    assert refused(run("keys", "create", *whose, *options)).startswith(report)
    assert conn.execute(COUNT_KEYS).fetchall() == before


def test_key_of_an_operator_has_its_role_or_a_lesser_one(run: Run, conn: Connection) -> None:
    add_operator(conn, "bob", "finance")
    before = conn.execute(COUNT_KEYS).fetchall()
    report = refused(run("keys", "create", "--operator", "bob", "--role", "admin"))
    assert report == "--role: operator bob has the role finance, which is less than admin"
    assert conn.execute(COUNT_KEYS).fetchall() == before
    for role in ("finance", "support", "viewer"):
        assert said(run("keys", "create", "--operator", "bob", "--role", role)).startswith("sty_operator_")


def test_successor_of_a_key_has_no_greater_role_than_its_operator_by_then(run: Run, conn: Connection) -> None:
    add_operator(conn, "bob", "finance")
    said(run("operators", "set", "bob", "--role", "support"))
    said(run("keys", "create", "--operator", "bob", "--role", "viewer"))
    query = "select k.id from surety.operator_keys as k where k.role in ('finance', 'viewer') order by k.id"
    for (key,) in conn.execute(query).fetchall():
        said(run("keys", "rotate", key))
    roles = conn.execute(
        "select k.role from surety.operator_keys as k join surety.operators as o on o.id = k.operator_id"
        " where o.name = 'bob' order by k.created_at"
    ).fetchall()
    assert roles == [("finance",), ("viewer",), ("support",), ("viewer",)]


def test_merchants_list_counts_no_expired_key(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    said(run("keys", "create", merchant, "--days", "1"))
    conn.execute(
        "update surety.api_keys set created_at = created_at - interval '2 days', expires_at = expires_at"
        " - interval '2 days' where expires_at is not null"
    )
    [listed] = json.loads(said(run("merchants", "list", "--json")))
    assert listed["keys"] == 1
