"""Webhooks of every form and order, as the workers apply them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.jobs.conftest import Pay
from tests.jobs.test_workers import count
from tests.support.payments import Connection, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually
from tests.support.workers import (
    attempts,
    due,
    in_process_worker,
    run_until_idle,
    watch_requests,
)


def received(conn: Connection, events: list[dict[str, Any]]) -> None:
    """The receiver's part: stored, with an event for `apply_webhooks`."""
    stored = [
        {
            "n": n,
            "provider": "stripe",
            "account": event.get("account", ""),
            "livemode": event.get("livemode", False),
            "event_id": event["id"],
            "type": event["type"],
            "headers": {},
            "body": event.get("raw") or json.dumps(event),
            "address": "127.0.0.1",
        }
        for n, event in enumerate(events)
    ]
    conn.execute("select from surety.receive_webhooks(%s)", (json.dumps(stored),))


def events_about(sandbox: SandboxProcess, payment_id: str) -> list[dict[str, Any]]:
    """The events of one payment, newest first, as webhooks bring them."""
    page = sandbox.get("/v1/events", {"limit": 100})["data"]
    return [
        event for event in page if (event["data"]["object"].get("metadata") or {}).get("surety_payment") == payment_id
    ]


async def test_reordered_and_repeated_webhooks_end_in_the_same_state(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert state_of(conn, payment_id) == "requires_action"
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.answer_as_payer(pi, "approve")
        eventually(lambda: sandbox.read(pi)["status"] == "succeeded")
        eventually(lambda: "charge.updated" in [event["type"] for event in events_about(sandbox, payment_id)])
        events = events_about(sandbox, payment_id)
        assert {"payment_intent.requires_action", "payment_intent.succeeded", "charge.succeeded"} <= {
            event["type"] for event in events
        }
        received(conn, [*events, *events[::-1]])
        await run_until_idle(worker)
    assert state_of(conn, payment_id) in {"confirmed", "settled"}
    assert count(conn, "select count(*) from surety.facts where kind = 'captured'") == 1
    assert count(conn, "select count(*) from surety.facts where kind = 'money'") == 1, "charge.updated was fetched"
    assert attempts(conn) == []
    assert not violations(conn)


async def test_decline_known_from_a_webhook_only_is_fetched_and_canceled(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.answer_as_payer(pi, "decline")
        [failed] = [e for e in events_about(sandbox, payment_id) if e["type"] == "payment_intent.payment_failed"]
        received(conn, [failed])
        await run_until_idle(worker)
    assert state_of(conn, payment_id) == "failed"
    assert sandbox.read(pi)["status"] == "canceled"
    [(failure,)] = conn.execute("select failure ->> 'code' from surety.payments").fetchall()
    assert failure == "payment_intent_authentication_failure"


async def test_invalid_event_fails_three_times_without_its_batch(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    bodies = ("no json", "[]", '{"data": {}}', '{"api_version": "2026-10-28.endive", "data": {"object": {"id": 1}}}')
    garbage = [{"id": f"evt_{n}", "type": "payment_intent.succeeded", "raw": body} for n, body in enumerate(bodies)]
    unknown: dict[str, Any] = {
        "id": "evt_unknown",
        "type": "customer.created",
        "api_version": None,
        "data": {"object": {}},
    }
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [created] = [e for e in events_about(sandbox, payment_id) if e["type"] == "payment_intent.created"]
        received(conn, [*garbage, created, unknown])
        for _ in range(3):
            await run_until_idle(worker, "apply_webhooks")
            due(conn)
    letters = conn.execute("select handler, jsonb_array_length(attempts) from outbox.dead_letters").fetchall()
    assert letters == [("apply_webhooks", 3)] * len(bodies)
    assert attempts(conn) == []


async def test_event_without_meaning_here_ends_well_whatever_its_form(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shop()
    thin = {"object": "v2.core.event", "created": "2026-11-30T06:00:00Z"}
    events: list[dict[str, Any]] = [
        thin | {"id": "evt_ping", "type": "v2.core.event_destination.ping", "related_object": None},
        thin | {"id": "evt_account", "type": "v2.core.account.updated", "related_object": {"id": "acct_1"}},
        {"id": "evt_no_version", "type": "customer.created", "data": {"object": {}}},
        {"id": "evt_no_data", "type": "customer.created"},
    ]
    async with in_process_worker(database, sandbox.url) as worker:
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
    assert attempts(conn) == []


async def test_thin_event_brings_its_object(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    by_intent, by_charge = shop(2)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        intents: dict[str, str] = dict(conn.execute("select id, provider_id from surety.payments").fetchall())
        charge = {payment_id: sandbox.confirm(pi)["latest_charge"] for payment_id, pi in intents.items()}
        about = {
            "v1.payment_intent.succeeded": intents[by_intent],
            "v1.charge.succeeded": charge[by_charge],
        }
        events = [
            {"id": f"evt_{n}", "object": "v2.core.event", "type": type, "related_object": {"id": named}}
            for n, (type, named) in enumerate(about.items())
        ]
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
    # On a slow machine the amounts may be available when they are fetched.
    assert {state_of(conn, payment_id) for payment_id in (by_intent, by_charge)} <= {"confirmed", "settled"}
    assert attempts(conn) == []


def provider_calls(conn: Connection) -> dict[str, int]:
    """How many calls of each operation were answered."""
    query = "select snapshot ->> 'operation', count(*) from audit.entries where kind = 'answer' group by 1"
    return dict(conn.execute(query).fetchall())


async def wait_for_events(sandbox: SandboxProcess, payments: list[str], type: str) -> list[dict[str, Any]]:
    """The events of this type, one of each payment, once the provider has made them all."""

    def made() -> list[dict[str, Any]]:
        events = [event for payment_id in payments for event in events_about(sandbox, payment_id)]
        return [event for event in events if event["type"] == type]

    eventually(lambda: len(made()) == len(payments))
    return made()


async def test_charged_money_of_several_payments_is_read_from_one_list(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    payments = shop(3)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit", "confirm")
        events = await wait_for_events(sandbox, payments, "charge.updated")
        received(conn, [*events, events[0] | {"id": "evt_again"}])
        await run_until_idle(worker, "apply_webhooks")
        assert count(conn, "select count(distinct payment_id) from surety.facts where kind = 'money'") == 3
        assert provider_calls(conn) == {"create": 3, "confirm": 3, "list balance transactions": 1}
    assert attempts(conn) == []


async def test_charged_money_that_the_list_lacks_is_fetched(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    payments = shop(3)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit", "confirm")
        events = await wait_for_events(sandbox, payments, "charge.updated")
        for event in events:
            # The list is read from the charges' time on, and shows nothing.
            event["data"]["object"]["created"] += 3600
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
        assert count(conn, "select count(distinct payment_id) from surety.facts where kind = 'money'") == 3
        assert provider_calls(conn) == {"create": 3, "confirm": 3, "list balance transactions": 1, "fetch": 3}
    assert attempts(conn) == []


async def test_charged_money_is_fetched_if_the_list_is_refused(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    payments = shop(2)
    key = "rk_test_without_the_list"
    permissions = ["rak_charge_write", "rak_payment_intent_write", "rak_balance_read"]
    sandbox.control("keys", {"key": key, "permissions": permissions, "connect": []})
    async with in_process_worker(database, sandbox.url, STRIPE_API_KEY=key) as worker:
        await run_until_idle(worker, "submit", "confirm")
        events = await wait_for_events(sandbox, payments, "charge.updated")
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
        assert count(conn, "select count(distinct payment_id) from surety.facts where kind = 'money'") == 2
    assert attempts(conn) == []


async def test_list_is_left_after_as_many_pages_as_fetches_would_be_necessary(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay, monkeypatch: pytest.MonkeyPatch
) -> None:
    payments = shop(6)
    monkeypatch.setattr("jobs.stripe.client.PAGE_SIZE", 1)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit", "confirm")
        events = await wait_for_events(sandbox, payments, "charge.updated")
        named = {event["data"]["object"]["balance_transaction"]: event for event in events}
        lines = sandbox.get("/v1/balance_transactions", {"limit": 100})["data"]
        oldest = [line["id"] for line in lines if line["id"] in named][-2:]
        received(conn, [named[line] for line in oldest])
        requests = watch_requests(worker)
        await run_until_idle(worker, "apply_webhooks")
        paths = sorted(request.target.split("?")[0].split("/")[2] for request in requests)
        assert paths == ["balance_transactions"] * 2 + ["payment_intents"] * 2
        query = "select count(*) from surety.facts where kind = 'money' and object_id = any(%s)"
        assert conn.execute(query, (oldest,)).fetchone() == (2,)
    assert attempts(conn) == []


@pytest.mark.parametrize("created", [0, -1, True, 1.5, 10**18, "now"])
async def test_money_of_a_charge_of_an_absurd_time_is_known_all_the_same(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay, created: Any
) -> None:
    payments = shop(2)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit", "confirm")
        events = await wait_for_events(sandbox, payments, "charge.updated")
        for event in events:
            event["data"]["object"]["created"] = created
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
        assert count(conn, "select count(distinct payment_id) from surety.facts where kind = 'money'") == 2
    assert attempts(conn) == []


async def test_captured_charge_proves_the_capture_without_a_call(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.confirm(pi)
        received(conn, await wait_for_events(sandbox, [payment_id], "charge.succeeded"))
        await run_until_idle(worker, "apply_webhooks")
        assert state_of(conn, payment_id) == "confirmed"
        assert provider_calls(conn) == {"create": 1}
    assert violations(conn) == {}


async def test_event_without_version_or_previous_attributes_is_fetched(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        data = {"object": sandbox.confirm(pi), "previous_attributes": None}
        received(conn, [{"id": "evt_1", "type": "payment_intent.succeeded", "data": data}])
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) in {"confirmed", "settled"}


async def test_event_of_the_other_mode_is_ignored_with_a_reason(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        types = ("payment_intent.succeeded", "payment_intent.payment_failed", "charge.dispute.created")
        data = {"object": sandbox.read(pi)}
        received(conn, [{"id": f"evt_{type}", "type": type, "livemode": True, "data": data} for type in types])
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) == "provider_submitted"
    assert attempts(conn) == []
    query = "select snapshot ->> 'type', reason from audit.entries where kind = 'answer' and outcome = 'ignored'"
    reason = "an event of live mode, and our key is of test mode"
    assert sorted(conn.execute(query).fetchall()) == sorted((type, reason) for type in types)


@pytest.mark.parametrize(("type", "handler"), [("payment.initiated", "submit"), ("webhook.received", "apply_webhooks")])
async def test_event_about_an_unknown_object_is_dead_lettered(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay, type: str, handler: str
) -> None:
    shop()
    conn.execute("select outbox.emit_event('payment', 'nothing', %s, '{}', null, 1)", (type,))
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, handler)
    assert [row[:2] for row in attempts(conn)] == [(handler, 1)]
    assert count(conn, "select count(*) from outbox.batches") == 0


async def test_webhook_that_cannot_be_recorded_does_not_fail_its_batch(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    payments = shop(5)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        broken = (
            "alter table surety.facts add constraint poison"
            f" check (payment_id <> '{payments[2]}' or kind <> 'captured')"
        )
        conn.execute(broken.encode())
        events = []
        for payment_id in payments:
            [(pi,)] = conn.execute("select provider_id from surety.payments where id = %s", (payment_id,)).fetchall()
            sandbox.confirm(pi)
            events += [e for e in events_about(sandbox, payment_id) if e["type"] == "payment_intent.succeeded"]
        received(conn, events)
        await run_until_idle(worker, "apply_webhooks")
    states = [state_of(conn, payment_id) for payment_id in payments]
    assert states == ["confirmed", "confirmed", "provider_submitted", "confirmed", "confirmed"]
    [(handler, failures, errors)] = attempts(conn)
    assert (handler, failures) == ("apply_webhooks", 1)
    assert "poison" in errors[0]


async def test_snapshot_of_another_api_version_is_fetched(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        lie = sandbox.read(pi) | {"status": "succeeded", "latest_charge": "ch_lie", "amount_received": 10000}
        old = {
            "id": "evt_old",
            "type": "payment_intent.succeeded",
            "api_version": "2019-02-19",
            "data": {"object": lie},
        }
        received(conn, [old])
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) == "provider_submitted"
    query = "select kind, outcome from audit.entries where snapshot ->> 'operation' = 'fetch' order by id"
    assert conn.execute(query).fetchall() == [("call", "asked"), ("answer", "answered")]


def events_of_approval(conn: Connection, sandbox: SandboxProcess, payment_id: str, proof: str) -> list[dict[str, Any]]:
    """The payer approves; the events of the charge, and of the type that proves it by the intent."""
    [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
    sandbox.answer_as_payer(pi, "approve")
    wanted = {proof, "charge.succeeded"}
    eventually(lambda: wanted <= {event["type"] for event in events_about(sandbox, payment_id)})
    return [event for event in events_about(sandbox, payment_id) if event["type"] in wanted]


@pytest.mark.parametrize("capture_method", ["automatic", "manual"])
@pytest.mark.parametrize("intents_first", [True, False])
async def test_card_is_shown_after_the_payer_acted_whichever_event_comes_first(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay, capture_method: str, intents_first: bool
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required", capture_method=capture_method)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        proof = "succeeded" if capture_method == "automatic" else "amount_capturable_updated"
        events = events_of_approval(conn, sandbox, payment_id, f"payment_intent.{proof}")
        assert all(isinstance(event["data"]["object"].get("latest_charge", ""), str) for event in events)
        for event in sorted(events, key=lambda event: event["type"], reverse=intents_first):
            received(conn, [event])
            await run_until_idle(worker)
        received(conn, [event | {"id": f"{event['id']}_again"} for event in events])
        await run_until_idle(worker)
    [(card,)] = conn.execute(
        "select data -> 'card' from surety.facts where data ? 'card' and payment_id = %s", (payment_id,)
    ).fetchall()
    assert (card["last4"], card["country"]) == ("3220", "IE")
    assert ("capture_before" in card) == (capture_method == "manual")
    assert attempts(conn) == []
    assert not violations(conn)


async def test_card_that_comes_with_its_intent_in_one_batch_is_shown(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        events = events_of_approval(conn, sandbox, payment_id, "payment_intent.succeeded")
        received(conn, sorted(events, key=lambda event: event["type"], reverse=True))
        await run_until_idle(worker)
    shown = conn.execute("select kind from surety.facts where data ? 'card'").fetchall()
    assert shown == [("captured",)]
