"""No webhook reaches a private or special address, in whatever form its merchant writes it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from db.settings import WebhookNetworks
from jobs.webhooks.addresses import AddressRefused, checked_address, is_public
from tests.jobs.webhooks.conftest import Shop, sending
from tests.support.webhook_receiver import WebhookReceiver

NONE = WebhookNetworks("")


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.1", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
        "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1",
        "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808",
        "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1",
        "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "ff02::1",
    ],
)  # fmt: skip
def test_special_address_is_refused(text: str) -> None:
    with pytest.raises(AddressRefused):
        checked_address(text, NONE)


@pytest.mark.parametrize("text", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_public_address_is_allowed(text: str) -> None:
    assert checked_address(text, NONE) == ip_address(text) and is_public(ip_address(text))


def test_mapped_address_is_the_ipv4_address_in_it() -> None:
    assert checked_address("::ffff:8.8.8.8", NONE) == ip_address("8.8.8.8")
    with pytest.raises(AddressRefused):
        checked_address("::ffff:127.0.0.1", NONE)
    for written in ("::ffff:10.0.0.7", "10.0.0.7"):
        assert checked_address("::ffff:10.0.0.7", WebhookNetworks(written)) == ip_address("10.0.0.7")


def test_allowed_networks_are_reached() -> None:
    allowed = WebhookNetworks("10.1.0.0/16, fd00::/8")
    assert str(checked_address("10.1.2.3", allowed)) == "10.1.2.3"
    assert str(checked_address("fd00::7", allowed)) == "fd00::7"
    with pytest.raises(AddressRefused):
        checked_address("10.2.0.1", allowed)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0"],
)
async def test_every_spelling_of_loopback_is_refused_unless_it_is_allowed(
    shop: Shop, receiver: WebhookReceiver, database: str, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", receiver.url)
    endpoint_id, _ = shop.endpoint(f"http://{host}:{receiver.port}/")
    shop.pay()
    async with sending(database, SURETY_WEBHOOK_NETWORKS="10.0.0.0/8") as (_, send_due):
        await send_due()
    assert receiver.received == []
    row = shop.conn.execute("select status, error from outbox.delivery_attempts").fetchone()
    assert row is not None and row[0] is None and row[1].endswith("is not a public address"), row
    assert shop.show(endpoint_id)["status"] == "failing"
