"""API keys: scopes, expiry, networks, rotation and revocation, on every route of a merchant."""

from __future__ import annotations

import httpx
import psycopg
import pytest

from app.api.routes import MERCHANT_ROUTES
from app.cli.keys import SCOPES
from app.web.routing import Route
from tests.support.http_client import CONTEXT, Merchant, ServerProcess, payment, problem, running_server, unique_name

UNKNOWN_IDS = {
    name: f"{prefix}_{24 * '0'}"
    for name, prefix in {
        "payment_id": "pay",
        "refund_id": "ref",
        "dispute_id": "dp",
        "event_id": "evt",
        "customer_id": "cus",
        "payment_method_id": "spm",
        "webhook_endpoint_id": "we",
    }.items()
}
BODIES = {
    "/v1/payments": payment(),
    "/v1/payments/{payment_id}": {"metadata": {}},
    "/v1/webhook_endpoints": {"url": "https://shop.example/", "event_types": ["*"]},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/enable": {"from": "now"},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/replay": {"undelivered": True},
    "/v1/disputes/{dispute_id}/evidence": {"evidence": {"uncategorized_text": "x"}},
}


@pytest.fixture(autouse=True)
def sealing_key(rights: psycopg.Connection[tuple[object, ...]]) -> None:
    """As a worker publishes it, so that webhook endpoints can be made."""
    rights.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))


def ask(merchant: Merchant, row: Route, key: str, **headers: str) -> httpx.Response:
    """A valid request to a route, with a key."""
    sent = {"Authorization": f"Bearer {key}", "Idempotency-Key": unique_name("key")} | headers
    path = row.path.format(**UNKNOWN_IDS)
    if row.method == "GET":
        return merchant.client.get(path, params={"month": "2026-11"} if "statements" in path else {}, headers=sent)
    if row.method == "DELETE":
        return merchant.client.delete(path, headers=sent)
    return merchant.client.post(path, json=BODIES.get(row.path, {}), headers=sent)


@pytest.mark.parametrize("row", MERCHANT_ROUTES, ids=lambda row: row.name)
def test_route_needs_its_scope_and_no_other(merchant: Merchant, row: Route) -> None:
    assert row.scope in SCOPES
    others = merchant.another_key(scopes=[scope for scope in SCOPES if scope != row.scope])
    refused = problem(ask(merchant, row, others), 403, "scope-missing")
    assert refused["scope"] == row.scope
    if row.method != "GET":
        # Who lacks the scope does not get the body's errors.
        headers = {"Authorization": f"Bearer {others}"}
        problem(
            merchant.client.request(row.method, row.path.format(**UNKNOWN_IDS), content=b"no json", headers=headers),
            403,
            "scope-missing",
        )
    assert ask(merchant, row, merchant.another_key(scopes=[row.scope])).status_code in {200, 201, 404}


@pytest.mark.parametrize("row", MERCHANT_ROUTES, ids=lambda row: row.name)
def test_expired_revoked_and_foreign_keys_are_refused_with_their_reason(merchant: Merchant, row: Route) -> None:
    expired = merchant.another_key(expires_in="1 hour")
    merchant.conn.execute(
        "update surety.api_keys set created_at = created_at - interval '1 day',"
        " expires_at = surety.time_now() - interval '1 second' where id = %s",
        (merchant.key_id,),
    )
    problem(ask(merchant, row, expired), 401, "key-expired")
    elsewhere = merchant.another_key(networks=["203.0.113.0/24", "2001:db8::/32"])
    refused = problem(ask(merchant, row, elsewhere), 403, "network-not-allowed")
    assert refused["address"] == "127.0.0.1"
    revoked = merchant.another_key()
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    problem(ask(merchant, row, revoked), 401, "key-revoked")


def test_each_refusal_of_a_known_key_is_counted_and_audited(merchant: Merchant, module_database: str) -> None:
    keys = [merchant.another_key(scopes=["refunds:write"])]
    keys.append(merchant.another_key(networks=["203.0.113.0/24"]))
    keys.append(merchant.another_key())
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    # A process of its own, because a process audits up to twenty denials a second.
    with running_server("api", module_database) as running:
        for key in keys:
            headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": unique_name("key")}
            assert httpx.post(f"{running.url}/v1/payments", json=payment(), headers=headers).is_client_error
            assert httpx.get(f"{running.url}/v1/events", headers=headers).is_client_error
    reasons = ["scope-missing", "network-not-allowed", "key-revoked"]
    routes = ["POST /v1/payments", "GET /v1/events"]
    assert merchant.denials() == [(reason, route) for reason in reasons for route in routes]
    counted = merchant.conn.execute(
        "select r.reason, sum(r.count) from audit.refusals as r join surety.api_keys as k on r.actor = 'key:' || k.id"
        " where k.merchant_id = %s group by r.actor, r.reason",
        (merchant.id,),
    ).fetchall()
    assert sorted(counted) == sorted((reason, 2) for reason in reasons)


def test_only_the_whole_secret_gets_the_reason(merchant: Merchant) -> None:
    key = merchant.another_key()
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    for guess in (key[:-1] + ("a" if key[-1] != "a" else "b"), merchant.key_id, key[-4:]):
        answer = merchant.client.get("/v1/payments", headers={"Authorization": f"Bearer {guess}"})
        assert "revoked" not in problem(answer, 401, "unauthenticated")["detail"]


def test_key_is_valid_from_its_networks(merchant: Merchant) -> None:
    key = merchant.another_key(networks=["203.0.113.0/24", "127.0.0.0/8"])
    for row in MERCHANT_ROUTES:
        assert ask(merchant, row, key).status_code in {200, 201, 404}


def test_network_is_compared_with_the_address_behind_a_trusted_proxy(merchant: Merchant, module_database: str) -> None:
    key = merchant.another_key(networks=["203.0.113.0/24"])
    headers = {"Authorization": f"Bearer {key}"}
    with (
        running_server("api", module_database, SURETY_TRUSTED_PROXIES="127.0.0.1/32") as running,
        httpx.Client(base_url=running.url, verify=CONTEXT, headers=headers) as client,
    ):
        for address, status in (("203.0.113.7", 200), ("198.51.100.7", 403), ("2001:db8::1", 403)):
            answer = client.get("/v1/payments", headers={"X-Forwarded-For": address})
            assert answer.status_code == status, answer.text
    # Without a trusted proxy, the header is anyone's claim.
    answer = merchant.client.get("/v1/payments", headers=headers | {"X-Forwarded-For": "203.0.113.7"})
    problem(answer, 403, "network-not-allowed")


def test_revocation_applies_to_the_next_request_on_every_process(
    merchant: Merchant, api: ServerProcess, module_database: str
) -> None:
    headers = {"Authorization": f"Bearer {merchant.key}"}
    with running_server("api", module_database) as other:
        clients = [httpx.Client(base_url=url, verify=CONTEXT, headers=headers) for url in (api.url, other.url)]
        for client in clients:
            for _ in range(3):
                sent = {"Idempotency-Key": unique_name("key")}
                assert client.post("/v1/payments", json=payment(), headers=sent).status_code == 201
        merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
        for client in clients:
            problem(client.get("/v1/payments"), 401, "key-revoked")
            sent = {"Idempotency-Key": unique_name("key")}
            problem(client.post("/v1/payments", json=payment(), headers=sent), 401, "key-revoked")
            client.close()


def test_key_has_one_successor_at_a_time(merchant: Merchant) -> None:
    first, second = merchant.another_key("shop"), merchant.another_key("shop")
    with pytest.raises(psycopg.DatabaseError) as refused:
        merchant.another_key("shop")
    assert refused.value.sqlstate == "SU010"
    merchant.another_key("shop", scopes=["read"])
    merchant.another_key("office")
    for key in (first, second):
        answer = merchant.client.get("/v1/payments", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    ids = merchant.conn.execute(
        "select id from surety.api_keys where merchant_id = %s and name = 'shop' order by id", (merchant.id,)
    ).fetchall()
    merchant.conn.execute("select surety.revoke_api_key(%s)", ids[0])
    merchant.another_key("shop")


def last_uses(merchant: Merchant) -> list[tuple[bool, str]]:
    """Of each used key: whether it was used within a minute, and the version of its row."""
    return merchant.conn.execute(
        "select last_used_at > now() - interval '1 minute', xmin::text from surety.api_keys"
        " where merchant_id = %s and last_used_at is not null",
        (merchant.id,),
    ).fetchall()


def test_last_use_is_written_once_a_minute_by_all_processes(merchant: Merchant, module_database: str) -> None:
    with running_server("api", module_database) as running:
        headers = {"Authorization": f"Bearer {merchant.key}"}
        for _ in range(50):
            assert httpx.get(f"{running.url}/v1/balance", headers=headers).status_code == 200
    # A process that has ended has written what it noted.
    [(is_recent, version)] = last_uses(merchant)
    assert is_recent
    with running_server("api", module_database) as running:
        assert httpx.get(f"{running.url}/v1/balance", headers=headers).status_code == 200
    assert last_uses(merchant) == [(True, version)]
    merchant.conn.execute(
        "update surety.api_keys set last_used_at = now() - interval '61 seconds' where merchant_id = %s", (merchant.id,)
    )
    with running_server("api", module_database) as running:
        sent = headers | {"Idempotency-Key": unique_name("key")}
        assert httpx.post(f"{running.url}/v1/payments", json=payment(), headers=sent).status_code == 201
    [(is_recent, new_version)] = last_uses(merchant)
    assert is_recent and new_version != version


def test_refused_key_is_not_used(merchant: Merchant, module_database: str) -> None:
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    with running_server("api", module_database) as running:
        headers = {"Authorization": f"Bearer {merchant.key}", "Idempotency-Key": unique_name("key")}
        assert httpx.get(f"{running.url}/v1/balance", headers=headers).status_code == 401
        assert httpx.post(f"{running.url}/v1/payments", json=payment(), headers=headers).status_code == 401
    assert last_uses(merchant) == []
