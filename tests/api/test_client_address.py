"""The audited address is the client's: past trusted proxies, and never one that a client forged."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from app.sandbox.stripe.webhooks import signature
from app.web.client_address import client_address
from db.settings import TrustedProxies
from tests.support.http_client import (
    CONTEXT,
    SECRETS,
    Connection,
    Merchant,
    ServerProcess,
    payment,
    running_server,
    unique_name,
)

PROXIES = "127.0.0.1, 10.0.0.0/8, 2001:db8:1::/48"


@pytest.fixture(scope="module")
def proxied(module_database: str) -> Iterator[ServerProcess]:
    """An API behind a proxy on loopback."""
    with running_server("api", module_database, SURETY_TRUSTED_PROXIES=PROXIES) as running:
        yield running


def audited_address(url: str, rights: Connection, *forwarded: str | bytes, name: str = "X-Forwarded-For") -> str:
    """The address in the audit entry of a payment whose request has these headers."""
    headers = [("Content-Type", "application/json"), ("Idempotency-Key", unique_name("key"))]
    sent: list[tuple[bytes, bytes]] = [(field.encode(), value.encode()) for field, value in headers]
    sent += [(name.encode(), one if isinstance(one, bytes) else one.encode()) for one in forwarded]
    with Merchant(rights, url).client as client:
        answer = client.post("/v1/payments", content=msgspec.json.encode(payment()), headers=sent)
    assert answer.status_code == 201, answer.text
    row = rights.execute(
        "select address from audit.entries where request_id = %s", (answer.headers["request-id"],)
    ).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ([], "127.0.0.1"),
        (["203.0.113.9"], "203.0.113.9"),
        (["198.51.100.66, 203.0.113.9"], "203.0.113.9"),
        (["198.51.100.66, 203.0.113.9,10.1.2.3"], "203.0.113.9"),
        (["198.51.100.66", "203.0.113.9", "10.1.2.3"], "203.0.113.9"),
        (["203.0.113.9, 10.1.2.3\t, 2001:db8:1::5"], "203.0.113.9"),
        (["10.9.9.9, 10.1.2.3"], "10.9.9.9"),
        (["2001:DB8:2:0::1"], "2001:db8:2::1"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["[2001:db8:2::1]:4711, [2001:db8:1::5]"], "2001:db8:2::1"),
        (["203.0.113.9, ::ffff:10.1.2.3"], "203.0.113.9"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
    ],
)
def test_client_behind_trusted_proxies_is_audited(
    proxied: ServerProcess, rights: Connection, forwarded: list[str], address: str
) -> None:
    assert audited_address(proxied.url, rights, *forwarded) == address


@pytest.mark.parametrize(
    "garbage",
    [
        "unknown",
        "",
        ",",
        "localhost",
        "203.0.113.999",
        "203.0.113.09",
        "203.0.113.9:",
        "203.0.113.9:port",
        "203.0.113.9/32",
        "203.0.113.9%eth0",
        "203.0.113.9 203.0.113.10",
        "3405803785",
        "[2001:db8:2::1",
        "2001:db8:2::1]",
        "[203.0.113.9]:x",
        "fe80::1%eth0",
        '"203.0.113.9"',
        "for=203.0.113.9",
        b"\xff\xfe203.0.113.9",
        "203.0.113.9" * 900,
        ":" * 9000,
    ],
)
def test_garbage_ends_at_the_proxy_that_passed_it_on(
    proxied: ServerProcess, rights: Connection, garbage: str | bytes
) -> None:
    given = garbage if isinstance(garbage, bytes) else garbage.encode()
    assert audited_address(proxied.url, rights, given) == "127.0.0.1"
    assert audited_address(proxied.url, rights, b"198.51.100.66, " + given + b", 10.1.2.3") == "10.1.2.3"
    assert audited_address(proxied.url, rights, given + b", 203.0.113.9, 10.1.2.3") == "203.0.113.9"


def test_long_header_is_read_to_the_first_untrusted_address(proxied: ServerProcess, rights: Connection) -> None:
    assert audited_address(proxied.url, rights, "198.51.100.66," * 800 + "203.0.113.9, 10.1.2.3") == "203.0.113.9"
    assert audited_address(proxied.url, rights, "203.0.113.9" + ", 10.1.2.3" * 1200) == "203.0.113.9"


def test_header_of_an_untrusted_peer_is_ignored(module_database: str, api: ServerProcess, rights: Connection) -> None:
    assert audited_address(api.url, rights, "203.0.113.9") == "127.0.0.1"
    with running_server("api", module_database, SURETY_TRUSTED_PROXIES="10.0.0.0/8, ::1") as served:
        assert audited_address(served.url, rights, "203.0.113.9, 10.1.2.3") == "127.0.0.1"


@pytest.mark.parametrize("name", ["Forwarded", "X-Real-IP", "CF-Connecting-IP"])
def test_other_headers_name_no_client(proxied: ServerProcess, rights: Connection, name: str) -> None:
    given = "for=203.0.113.9" if name == "Forwarded" else "203.0.113.9"
    assert audited_address(proxied.url, rights, given, name=name) == "127.0.0.1"


def test_denials_are_audited_with_the_clients_address(proxied: ServerProcess, rights: Connection) -> None:
    merchant = Merchant(rights, proxied.url)
    rights.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    headers = {"X-Forwarded-For": "198.51.100.66, 203.0.113.9"}
    with merchant.client as client:
        assert client.get("/v1/payments", headers=headers).status_code == 401
    query = "select address from audit.entries where kind = 'denied' and merchant_id = %s"
    denied = rights.execute(query, (merchant.id,))
    assert denied.fetchall() == [("203.0.113.9",)]


def test_webhooks_are_audited_with_the_senders_address(module_database: str, rights: Connection) -> None:
    body = msgspec.json.encode({"id": unique_name("evt_"), "object": "event", "type": "x", "livemode": False})
    with (
        running_server("webhooks", module_database, SURETY_TRUSTED_PROXIES=PROXIES) as served,
        httpx.Client(base_url=served.url, verify=CONTEXT, timeout=30) as client,
    ):
        forwarded = {"X-Forwarded-For": "198.51.100.66, 203.0.113.9"}
        signed = {"Stripe-Signature": signature(body, SECRETS[0], int(time.time()))}
        assert client.post("/stripe", content=body, headers=forwarded | signed).status_code == 200
        assert client.post("/stripe", content=body, headers=forwarded).status_code == 400
    found = rights.execute("select outcome, address from audit.entries where kind = 'webhook' order by id").fetchall()
    assert found == [("received", "203.0.113.9"), ("rejected", "203.0.113.9")]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_peers_of_both_families_are_named_and_trusted(module_database: str, rights: Connection) -> None:
    with running_server("api", module_database, "--host", "::", SURETY_TRUSTED_PROXIES="::1") as served:
        port = served.url.rpartition(":")[2]
        assert served.url == f"http://[::]:{port}"
        assert audited_address(f"http://[::1]:{port}", rights, "203.0.113.9") == "203.0.113.9"
        assert audited_address(f"http://127.0.0.1:{port}", rights, "203.0.113.9") == "127.0.0.1"


def test_ipv4_peer_of_an_ipv6_socket_is_an_ipv4_address() -> None:
    forwarded = [(b"x-forwarded-for", b"203.0.113.9")]
    assert client_address("::ffff:192.0.2.1", forwarded, TrustedProxies("")) == "192.0.2.1"
    assert client_address("::ffff:192.0.2.1", forwarded, TrustedProxies("192.0.2.1")) == "203.0.113.9"
