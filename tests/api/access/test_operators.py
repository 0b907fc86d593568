"""Operators at the API: what each role may do, route by route."""

from __future__ import annotations

import re

import httpx
import pytest

from app.api.operator_routes import OPERATOR_ROUTES
from app.api.routes import MERCHANT_ROUTES
from app.cli.operators import ROLES
from app.web.routing import Route
from tests.support.http_client import CONTEXT, Connection, Merchant, ServerProcess, problem, unique_name
from tests.support.operators import add_operator

DISCREPANCY_BODIES: dict[str, dict[str, object]] = {
    "/assign": {"assignee": None},
    "/snooze": {"until": "2099-01-01T00:00:00Z", "note": "later"},
    "discrepancies/resolve": {"reason": "why", "kind": "none", "expect": 0},
}


def ask(url: str, row: Route, key: str) -> httpx.Response:
    """A request to a route that changes nothing, with a key."""
    path = re.sub(r"{(\w{3})\w*}", r"\1_0", row.path)
    body: dict[str, object] = {"reason": "why"}
    if "dead-letters" in row.path:
        body |= {"dry_run": True} | ({} if "letter_id" in row.path else {"error": unique_name("none")})
    for action, given in DISCREPANCY_BODIES.items():
        if "discrepanc" in row.path and row.path.endswith(action):
            body = given
    with httpx.Client(base_url=url, verify=CONTEXT, headers={"Authorization": f"Bearer {key}"}) as client:
        if row.method == "DELETE":
            return client.delete(path)
        return client.get(path) if row.method == "GET" else client.post(path, json=body)


@pytest.mark.parametrize("row", OPERATOR_ROUTES, ids=lambda row: row.name)
def test_route_is_open_to_the_roles_of_the_table(api: ServerProcess, rights: Connection, row: Route) -> None:
    allowed = {role for (role,) in rights.execute("select role from surety.role_scopes where scope = %s", (row.scope,))}
    assert "admin" in allowed
    for role in ROLES:
        answer = ask(api.url, row, add_operator(rights, unique_name("operator"), role))
        if role in allowed:
            assert answer.status_code in {200, 404}, answer.text
        else:
            assert problem(answer, 403, "scope-missing")["scope"] == row.scope


@pytest.mark.parametrize("row", OPERATOR_ROUTES, ids=lambda row: row.name)
def test_merchants_key_opens_no_route_of_operators(merchant: Merchant, api: ServerProcess, row: Route) -> None:
    problem(ask(api.url, row, merchant.key), 403, "forbidden")


@pytest.mark.parametrize("row", MERCHANT_ROUTES, ids=lambda row: row.name)
def test_operators_key_opens_no_route_of_merchants(api: ServerProcess, rights: Connection, row: Route) -> None:
    problem(ask(api.url, row, add_operator(rights, unique_name("operator"), "admin")), 401, "unauthenticated")


def test_expired_key_foreign_network_and_deactivated_operator_are_refused(
    api: ServerProcess, rights: Connection
) -> None:
    [row] = [row for row in OPERATOR_ROUTES if row.scope == "status:read"]
    name = unique_name("operator")
    key = add_operator(rights, name, "admin")
    change = "update surety.operator_keys set {} where operator_id = (select id from surety.operators where name = %s)"
    assert ask(api.url, row, key).status_code == 200
    rights.execute(change.format("networks = '{203.0.113.0/24}'").encode(), (name,))
    problem(ask(api.url, row, key), 403, "network-not-allowed")
    past = "networks = '{127.0.0.0/8}', created_at = now() - interval '1 day', expires_at = now()"
    rights.execute(change.format(past).encode(), (name,))
    problem(ask(api.url, row, key), 401, "key-expired")
    rights.execute(change.format("expires_at = null").encode(), (name,))
    assert ask(api.url, row, key).status_code == 200
    assert rights.execute("select surety.set_operator(%s, null, null, false)", (name,)).fetchall() == [(True,)]
    problem(ask(api.url, row, key), 401, "key-revoked")
