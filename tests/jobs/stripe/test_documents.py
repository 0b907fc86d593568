"""What merchants read of payments, refunds and disputes once the provider has answered: cards, fees, holds, actions."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from jobs.stripe.facts import FactOrigin, refund_facts
from jobs.stripe.shown import card_data
from tests.db.test_refunds import ask
from tests.support.payments import Connection, add_merchant, pay
from tests.support.sandbox_process import SandboxProcess
from tests.support.workers import in_process_worker, run_until_idle

Json = dict[str, Any]
PIPELINE = ("submit", "confirm", "capture", "refund", "apply_webhooks")
NOTHING_KNOWN = {"type": "card", "brand": None, "last4": None, "country": None, "saved": None}


def shown(conn: Connection, key: bytes, function: str, id: str) -> Json:
    """An object as the API shows it."""
    row = conn.execute(f"select body::json from api.{function}(%s, %s)".encode(), (key, id)).fetchone()
    assert row is not None
    document: Json = row[0]
    return document


async def test_card_fee_and_net_are_shown_once_they_are_known(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, method_token="pm_card_jcb")
    before = shown(conn, key, "get_payment", payment_id)
    assert (before["payment_method"], before["fee"], before["net"]) == (NOTHING_KNOWN, None, None)
    assert (before["livemode"], before["amount_capturable"], before["cancel_requested"]) == (False, 0, False)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
    after = shown(conn, key, "get_payment", payment_id)
    assert after["payment_method"] == NOTHING_KNOWN | {"brand": "jcb", "last4": "0505", "country": "JP"}
    # Our fee: 3.40 % of 100.00 and 0.35.
    assert (after["amount_captured"], after["fee"], after["net"]) == (10000, 375, 9625)


async def test_hold_shows_what_can_be_captured_and_until_when(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        held = shown(conn, key, "get_payment", payment_id)
        assert (held["status"], held["state"]) == ("requires_capture", "authorized")
        assert (held["amount_capturable"], held["amount_captured"]) == (10000, 0)
        until, created = (datetime.fromisoformat(held[name]) for name in ("capture_before", "created_at"))
        assert timedelta(days=7) - timedelta(minutes=1) < until - created < timedelta(days=7, minutes=1)
        listed = conn.execute(
            "select body::json from api.list_payments(%s, null, 'requires_capture', null, null, null, 10, null)", (key,)
        ).fetchone()
        assert listed is not None
        assert listed[0]["data"] == [held]


@pytest.mark.parametrize(("rail", "status", "other"), [("card", "lost", "returned"), ("ach", "returned", "lost")])
def test_reversed_payment_was_lost_or_returned_and_is_found_by_that(
    conn: Connection, rail: str, status: str, other: str
) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    conn.execute("set session_replication_role = replica")
    conn.execute("update surety.payments set state = 'reversed', rail = %s", (rail,))
    conn.execute("reset session_replication_role")
    assert shown(conn, key, "get_payment", payment_id)["status"] == status
    assert conn.execute("select status from report.payments").fetchone() == (status,)
    for asked, reference in ((status, None), (other, None), (status, "order"), (other, "order")):
        conn.execute("set session_replication_role = replica")
        conn.execute("update surety.payments set reference = 'order'")
        conn.execute("reset session_replication_role")
        row = conn.execute(
            "select body::json from api.list_payments(%s, null, %s, %s, null, null, 10, null)", (key, asked, reference)
        ).fetchone()
        assert row is not None
        assert [one["id"] for one in row[0]["data"]] == ([payment_id] if asked == status else [])


async def test_refund_that_waits_for_its_payer_shows_the_action(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, method_token="pm_card_sandboxRefundRequiresAction")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        asked = ask(conn, key, payment_id, 2500)
        assert asked["status"] == 201
        await run_until_idle(worker, *PIPELINE)
    [[refund_id]] = conn.execute("select id from surety.refunds").fetchall()
    refund = shown(conn, key, "get_refund", refund_id)
    assert refund["status"] == "requires_action"
    assert refund["next_action"].keys() == {"type", "expires_at"}
    assert refund["next_action"]["type"] == "display_details"
    conn.execute("set session_replication_role = replica")
    conn.execute("update surety.refunds set state = 'succeeded'")
    conn.execute("reset session_replication_role")
    assert shown(conn, key, "get_refund", refund_id)["next_action"] is None


@pytest.mark.parametrize(
    ("charge", "data"),
    [
        ("ch_1", {}),
        (None, {}),
        ({}, {}),
        ({"payment_method_details": None}, {}),
        ({"payment_method_details": {"type": "card", "card": None}}, {}),
        ({"payment_method_details": {"card": {}}}, {}),
        ({"payment_method_details": {"card": {"brand": None, "last4": 4242}}}, {}),
        (
            {"payment_method_details": {"card": {"brand": None, "last4": 4242, "country": "US"}}},
            {"card": {"country": "US"}},
        ),
        (
            {"payment_method_details": {"card": {"last4": "4242", "capture_before": 1764547200}}},
            {"card": {"last4": "4242", "capture_before": "2025-12-01T00:00:00.000Z"}},
        ),
        ({"payment_method_details": {"card": {"last4": "4242", "capture_before": None}}}, {"card": {"last4": "4242"}}),
        (
            {"payment_method_details": {"card": {"last4": "4242", "capture_before": 10**15}}},
            {"card": {"last4": "4242"}},
        ),
        ({"payment_method_details": {"card": {"last4": "4242", "capture_before": True}}}, {"card": {"last4": "4242"}}),
    ],
)
def test_card_is_read_as_far_as_the_charge_shows_it(charge: Any, data: Json) -> None:
    assert card_data(charge) == data


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (None, None),
        ({}, None),
        ("display_details", None),
        ({"type": "display_details", "display_details": None}, {"type": "display_details"}),
        (
            {
                "type": "display_details",
                "display_details": {"email_sent": {"email_sent_to": "a@b.c"}, "expires_at": None},
            },
            {"type": "display_details"},
        ),
    ],
)
def test_action_of_a_refund_is_read_as_far_as_it_is_shown(action: Any, expected: Json | None) -> None:
    refund = {"id": "re_1", "status": "requires_action", "amount": 1, "currency": "usd", "metadata": {}}
    [fact] = refund_facts(refund | {"next_action": action}, FactOrigin("", livemode=False, source="poll"))
    assert fact["data"].get("next_action") == expected
