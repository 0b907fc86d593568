"""No event of an endpoint is lost: late commits, dead and concurrent workers, restores, choices to skip."""

from __future__ import annotations

import asyncio
import json

import psycopg
import pytest

from db.connect import harden
from tests.jobs.webhooks.conftest import Shop, sending
from tests.support.payments import request
from tests.support.webhook_receiver import WebhookReceiver


async def test_event_of_a_transaction_that_commits_late_is_sent(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    shop.endpoint(receiver.url)
    async with sending(database) as (_, send_due):
        with psycopg.connect(harden(database, "deploy")) as late:
            late.execute("select api.create_payments(%s)", (json.dumps([request(shop.key_hash)]),))
            [early] = shop.pay()
            await send_due()
            assert receiver.ids == [early]
            late.commit()
        await send_due()
    assert len(receiver.ids) == 2 and len(set(receiver.ids)) == 2


async def test_batch_of_a_dead_worker_is_sent_again_under_the_same_ids(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    events = shop.pay(3)
    claim = "select fence from outbox.claim_deliveries('dead', %s, 10, '60 s')"
    row = shop.conn.execute(claim, ([endpoint_id],)).fetchone()
    assert row is not None
    async with sending(database) as (sender, send_due):
        assert not await sender._find_due() or not await sender._start_batches()
        assert receiver.ids == []
        shop.conn.execute("update outbox.delivery_batches set leased_until = now() - interval '1 s'")
        sender._mark = None
        await send_due()
        assert sorted(receiver.ids) == events
        # The dead worker was only slow: its success is logged and changes nothing.
        result = {"endpoint_id": endpoint_id, "fence": row[0], "event_id": events[0], "outcome": "delivered"}
        held = shop.conn.execute("select outbox.record_deliveries('dead', %s)", (json.dumps([result]),)).fetchone()
    assert held == ([],)
    assert [outcome for outcome, _ in shop.attempts(endpoint_id)] == ["delivered"] * 3 + ["late"]


async def test_two_workers_send_each_event_once(shop: Shop, receiver: WebhookReceiver, database: str) -> None:
    for _ in range(3):
        shop.endpoint(receiver.url)
    async with sending(database, "w1") as (_, one), sending(database, "w2") as (_, other):
        for _ in range(3):
            shop.pay(40)
            await asyncio.gather(one(), other())
        shop.make_retries_due()
        await asyncio.gather(one(), other())
    ids = receiver.ids
    assert len(ids) == 360 and len(set(ids)) == 120


async def test_events_before_a_restore_are_sent_before_those_after_it(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    shop.endpoint(receiver.url)
    before = shop.pay(2)
    shop.conn.execute("select outbox.open_restore_generation('test', false)")
    after = shop.pay(2)
    async with sending(database) as (_, send_due):
        await send_due()
        await send_due()
    assert sorted(receiver.ids) == before + after


async def test_copy_of_a_drill_sends_nothing(shop: Shop, receiver: WebhookReceiver, database: str) -> None:
    shop.endpoint(receiver.url)
    shop.pay(2)
    shop.conn.execute("select outbox.open_restore_generation('test', true)")
    shop.pay()
    async with sending(database) as (sender, _):
        await sender._take_turn()
    assert receiver.ids == []


@pytest.mark.parametrize(("start", "hours", "skipped"), [("there", None, 0), ("now", None, 3), ("hours", 2, 2)])
async def test_enabled_endpoint_goes_on_where_its_merchant_chose(
    shop: Shop, receiver: WebhookReceiver, database: str, start: str, hours: int | None, skipped: int
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    shop.command("switch_webhook_endpoint", webhook_endpoint_id=endpoint_id)
    shop.conn.execute("update surety.environment set kind = 'test'")
    shop.conn.execute("insert into surety.clock (ahead) values ('-3 hours')")
    old = shop.pay(2)
    shop.conn.execute("delete from surety.clock")
    recent = shop.pay()
    async with sending(database) as (_, send_due):
        await send_due()
        assert receiver.ids == []
        shop.command("switch_webhook_endpoint", webhook_endpoint_id=endpoint_id, **{"from": start, "hours": hours})
        later = shop.pay()
        await send_due()
    wanted = {"there": old + recent + later, "now": later, "hours": recent + later}[start]
    assert sorted(receiver.ids) == sorted(wanted)
    assert [each["events"] for each in shop.show(endpoint_id)["skipped"]] == ([skipped] if skipped else [])


async def test_failed_deliveries_are_skipped_with_what_waits(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    shop.pay(2)
    receiver.answer = lambda _: (500, {}, b"")
    async with sending(database) as (_, send_due):
        await send_due()
        shop.command("switch_webhook_endpoint", webhook_endpoint_id=endpoint_id, **{"from": "now"})
        shop.make_retries_due()
        await send_due()
    assert len(receiver.ids) == 2
    assert [each["events"] for each in shop.show(endpoint_id)["skipped"]] == [2]
    assert [outcome for outcome, _ in shop.attempts(endpoint_id)] == ["failed", "failed", "skipped", "skipped"]


async def test_failing_endpoint_is_probed_with_one_event_and_disabled_after_five_days(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    endpoint_id, _ = shop.endpoint(receiver.url)
    shop.pay(6)
    receiver.answer = lambda _: (500, {}, b"")
    async with sending(database) as (_, send_due):
        await send_due()
        assert len(receiver.ids) == 6
        shop.pay(20)
        for days in (1, 3, 4, 5):
            shop.conn.execute(
                "update outbox.webhook_endpoints set failed_attempts = 20, not_before = now(),"
                " failing_since = now() - %s * interval '1 day'",
                (days,),
            )
            shop.conn.execute("update outbox.delivery_retries set due_at = now() + interval '1 day'")
            before = len(receiver.ids)
            await send_due()
            assert len(receiver.ids) == before + 1
    shown = shop.show(endpoint_id)
    assert (shown["status"], shown["disabled_because"]) == ("disabled", "failures")
    rows = shop.conn.execute(
        "select snapshot -> 'percent' from audit.entries where outcome = 'webhook endpoint fails' order by id"
    )
    assert [row[0] for row in rows] == [50, 70, 100]


async def test_one_endpoint_that_fails_or_is_slow_delays_no_other(
    shop: Shop, receiver: WebhookReceiver, database: str
) -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    slow, _ = shop.endpoint(receiver.url + "/slow")
    shop.endpoint("http://127.0.0.1:9/refused")
    shop.endpoint(receiver.url + "/quick")

    def answer(webhook: object) -> tuple[int, dict[str, str], bytes]:
        if getattr(webhook, "path", "").endswith("/slow"):
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return 200, {}, b""

    receiver.answer = answer
    async with sending(database) as (sender, _):
        for _ in range(3):
            shop.pay(2)
            while sum(webhook.path.endswith("/quick") for webhook in receiver.received) < 2:
                await sender._take_turn()
                await asyncio.sleep(0)
            receiver.received.clear()
            assert slow in sender._batches
        release.set()
