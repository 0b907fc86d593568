"""Deliveries: what arrives at a merchant's endpoint, and what becomes of answers."""

from __future__ import annotations

import asyncio
from base64 import b64decode

import pytest
from nacl.signing import VerifyKey
from standardwebhooks import Webhook, WebhookVerificationError

from tests.jobs.webhooks.conftest import Shop, public_key_of, sending
from tests.support.webhook_receiver import WebhookReceiver


async def test_every_event_arrives_once_and_its_signature_verifies_with_the_published_library(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    shop.pay()
    endpoint_id, secrets = shop.endpoint(receiver.url)
    events = shop.pay(40)
    async with sending(database) as (_, send_due):
        await send_due()
        assert sorted(receiver.ids) == events
        later = shop.pay(2)
        await send_due()
    assert sorted(receiver.ids) == events + later
    for webhook in receiver.received:
        webhook.verify(secrets.shown)
        assert webhook.headers["surety-version"] == "2026-11-30"
        assert (webhook.path, webhook.document["id"]) == ("/hooks", webhook.id)
    first = receiver.received[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(secrets.shown).verify(first.body + b" ", first.headers)
    assert shop.attempts(endpoint_id) == [("delivered", 200)] * 42
    assert shop.show(endpoint_id)["status"] == "enabled"


async def test_signature_of_ed25519_verifies_with_the_public_key_of_the_endpoint(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    shop.pay()
    async with sending(database) as (_, send_due):
        await send_due()
    [webhook] = receiver.received
    [public_key] = shop.show(endpoint_id)["public_keys"]
    [signature] = [part[4:] for part in webhook.headers["webhook-signature"].split() if part.startswith("v1a,")]
    content = f"{webhook.id}.{webhook.headers['webhook-timestamp']}.".encode() + webhook.body
    VerifyKey(public_key_of(public_key)).verify(content, b64decode(signature))


async def test_thin_payload_names_the_object_and_the_state_now(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    shop.endpoint(receiver.url, payload="thin")
    [event_id] = shop.pay()
    async with sending(database) as (_, send_due):
        await send_due()
    document = receiver.received[0].document
    assert document["type"] == "payment.initiated" and document["id"] == event_id
    assert sorted(document["data"]) == ["id", "object", "version"]
    assert document["current"] == {"version": 1, "state": "initiated"}


async def test_filter_passes_types_and_families(shop: Shop, receiver: WebhookReceiver, database: str) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url, event_types=["refund.*", "payment.settled"])
    shop.pay()
    async with sending(database) as (_, send_due):
        await send_due()
        assert receiver.received == []
        shop.command("update_webhook_endpoint", webhook_endpoint_id=endpoint_id, event_types=["payment.*"])
        [event_id] = shop.pay()
        await send_due()
    assert receiver.ids == [event_id]


async def test_failed_delivery_is_repeated_under_the_same_id_after_its_own_delay(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    first, second = shop.pay(2)
    receiver.answer = lambda webhook: (500, {}, b"x" * 3000) if webhook.id == first else (200, {}, b"")
    async with sending(database) as (_, send_due):
        await send_due()
        assert sorted(receiver.ids) == [first, second]
        row = shop.conn.execute(
            "select r.failures, r.due_at - now() between '4 seconds' and '6 seconds', length(a.answer)"
            " from outbox.delivery_retries as r join outbox.delivery_attempts as a on a.event_id = r.event_id"
        ).fetchone()
        assert row == (1, True, 1000)
        receiver.answer = lambda _: (204, {}, b"")
        shop.make_retries_due()
        await send_due()
    assert receiver.ids.count(first) == 2 and receiver.ids.count(second) == 1
    assert sorted(shop.attempts(endpoint_id)) == [("delivered", 200), ("delivered", 204), ("failed", 500)]


async def test_delivery_is_given_up_after_its_last_delay_and_can_be_replayed(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    [event_id] = shop.pay()
    receiver.answer = lambda _: (500, {}, b"")
    async with sending(database) as (_, send_due):
        for _ in range(10):
            await send_due()
            shop.make_retries_due()
        assert receiver.ids == [event_id] * 10
        await send_due()
        assert len(receiver.ids) == 10
        assert shop.show(endpoint_id)["undelivered"] == {"waiting": 0, "given_up": 1}
        receiver.answer = lambda _: (200, {}, b"")
        asked = {"webhook_endpoint_id": endpoint_id, "undelivered": True}
        assert shop.command("replay_webhook_events", **asked, count_only=True)["events"] == 1
        await send_due()
        assert len(receiver.ids) == 10
        assert shop.command("replay_webhook_events", **asked, count_only=False)["events"] == 1
        shop.make_retries_due()
        await send_due()
    assert receiver.ids == [event_id] * 11
    assert shop.show(endpoint_id)["undelivered"] == {"waiting": 0, "given_up": 0}


@pytest.mark.parametrize(("status", "headers"), [(301, {"location": "/elsewhere"}), (404, {}), (503, {})])
async def test_any_other_answer_is_a_failure(
    shop: Shop, receiver: WebhookReceiver, database: str, status: int, headers: dict[str, str]
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    shop.pay()
    receiver.answer = lambda _: (status, headers, b"")
    async with sending(database) as (_, send_due):
        await send_due()
    assert [webhook.path for webhook in receiver.received] == ["/hooks"]
    assert shop.attempts(endpoint_id) == [("failed", status)]


async def test_gone_disables_the_endpoint_and_its_events_wait(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    [first] = shop.pay()
    receiver.answer = lambda _: (410, {}, b"")
    async with sending(database) as (_, send_due):
        await send_due()
        shown = shop.show(endpoint_id)
        assert (shown["status"], shown["disabled_because"]) == ("disabled", "gone")
        [second] = shop.pay()
        shop.make_retries_due()
        await send_due()
        assert receiver.ids == [first]
        receiver.answer = lambda _: (200, {}, b"")
        shop.command("switch_webhook_endpoint", webhook_endpoint_id=endpoint_id, **{"from": "there"})
        shop.make_retries_due()
        await send_due()
    assert receiver.ids[0] == first and sorted(receiver.ids[1:]) == [first, second]


async def test_retry_after_slows_the_endpoint_down(shop: Shop, receiver: WebhookReceiver, database: str) -> None:
    shop.endpoint(receiver.url)
    shop.pay()
    receiver.answer = lambda _: (429, {"retry-after": "120"}, b"")
    async with sending(database) as (_, send_due):
        await send_due()
        shop.pay(3)
        await send_due()
    assert len(receiver.received) == 1
    row = shop.conn.execute("select not_before - now() between '110 s' and '120 s' from outbox.webhook_endpoints")
    assert row.fetchone() == (True,)


async def test_requests_to_an_endpoint_keep_its_concurrency(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    shop.endpoint(receiver.url, concurrency=2)
    shop.pay(6)
    under_way, most = 0, 0

    def count(_: object) -> tuple[int, dict[str, str], bytes]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        asyncio.run(asyncio.sleep(0.02))
        under_way -= 1
        return 200, {}, b""

    receiver.answer = count
    async with sending(database) as (_, send_due):
        await send_due()
    assert (len(receiver.received), most) == (6, 2)
