"""Traces of refunds, disputes, settlements and failures."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Console

from app.cli.trace import read_summary, render_trace
from tests.support.payments import Connection, Fact, add_merchant, fact, money, pay, record

PAID = (("captured", "ch", 10000), ("available", "txn", 10000))


def paid(conn: Connection) -> tuple[str, bytes]:
    """A settled payment of 100.00 USD, and the hash of its merchant's key."""
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [money(payment_id, "txn", "charge", 10000, 320), *(fact(payment_id, *output) for output in PAID)])
    return payment_id, key_hash


def receive_webhook(conn: Connection, payment_id: str, event: str, *facts: Fact) -> None:
    """Record facts of a webhook."""
    row = conn.execute(
        "insert into surety.provider_events (id, provider, account, livemode, event_id, type, headers, body,"
        " received_at)"
        " values (surety.new_id('wh', now()), 'stripe', '', false, %s, %s, '{}', '{}', now()) returning id",
        (f"evt_{event}", event),
    ).fetchone()
    assert row is not None
    record(conn, [{**output, "source": "webhook", "source_id": row[0]} for output in facts])


def printed_trace(conn: Connection, payment_id: str) -> str:
    """The trace as it is printed."""
    console = Console(width=200, highlight=False, color_system=None)
    with console.capture() as said:
        console.print(render_trace(conn, payment_id))
    return said.get()


def last(conn: Connection, payment_id: str) -> str:
    return printed_trace(conn, payment_id).splitlines()[-1]


def test_trace_shows_a_refund_with_its_amount_and_transfers(conn: Connection) -> None:
    payment_id, _ = paid(conn)
    receive_webhook(
        conn, payment_id, "refund.created",
        fact(payment_id, "refund_succeeded", "re", 2500), money(payment_id, "txn_r", "refund", -2500),
    )  # fmt: skip
    output = printed_trace(conn, payment_id)
    assert "refund.created (evt_refund.created), signature valid: refund succeeded 25.00 USD (re_" in output
    assert "refund -25.00 USD, fee 0.00 USD (txn_r_" in output
    assert "partially_refunded" in output
    assert (
        "25.00 USD debit available, credit reserved_for_refunds" in output
        and "25.00 USD debit reserved_for_refunds, credit provider_balance" in output
    )
    assert last(conn, payment_id).startswith("1 charge · 1 refund · ")
    assert last(conn, payment_id).endswith("nothing open")


def test_trace_shows_a_failed_refund_and_does_not_count_it(conn: Connection) -> None:
    payment_id, _ = paid(conn)
    record(conn, [fact(payment_id, "refund_succeeded", "re", 2500)])
    record(conn, [fact(payment_id, "refund_failed", "re", 2500)])
    assert "refund failed 25.00 USD (re_" in printed_trace(conn, payment_id)
    assert "refund" not in last(conn, payment_id)


def test_trace_shows_a_read_call_without_an_idempotency_key(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    asked = {"kind": "call", "actor": "worker:w", "payment_id": payment_id, "outcome": "asked"}
    conn.execute("select audit.write_entries(%s)", (json.dumps([asked | {"snapshot": {"operation": "fetch"}}]),))
    assert "→ " in printed_trace(conn, payment_id)
    output = conn.execute("select summary from surety.trace_payment(%s) where kind = 'call'", (payment_id,)).fetchall()
    assert output == [("→ fetch",)]


def test_a_refund_under_way_is_open(conn: Connection) -> None:
    payment_id, _ = paid(conn)
    record(conn, [fact(payment_id, "refund_pending", "re", 2500)])
    assert last(conn, payment_id).endswith("25.00 USD to be refunded")


def test_a_dispute_is_open_until_it_is_decided(conn: Connection) -> None:
    payment_id, _ = paid(conn)
    withdrawn = money(payment_id, "txn_d", "dispute", -10000, 1500)
    output = {"status": "needs_response", "reason": "fraudulent", "evidence_due_at": "2026-12-01T00:00:00Z"}
    receive_webhook(
        conn, payment_id, "charge.dispute.created",
        fact(payment_id, "dispute_opened", "du", 10000, revision=1, data=output), withdrawn,
    )  # fmt: skip
    assert "evidence due by 2026-12-01T00:00:00.000Z" in last(conn, payment_id)
    printed = printed_trace(conn, payment_id)
    assert "signature valid: dispute opened 100.00 USD (du_" in printed
    assert "signature valid: dispute -100.00 USD, fee 15.00 USD (txn_d_" in printed
    assert "1 dispute" in last(conn, payment_id) and last(conn, payment_id).endswith("100.00 USD disputed")
    record(conn, [fact(payment_id, "dispute_lost", "du", 10000, revision=2)])
    assert read_summary(conn, payment_id)["state"] == "reversed"
    assert "1 dispute" in last(conn, payment_id) and last(conn, payment_id).endswith("nothing open")


def fail(conn: Connection, handler: str, error: str) -> None:
    row = conn.execute(
        "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'worker-1')", (handler,)
    ).fetchone()
    assert row is not None
    failures = [{"event_id": event_id, "error": error} for event_id in row[2]]
    conn.execute("select outbox.fail_events(%s, %s, %s)", (row[0], row[1], json.dumps(failures)))


def test_trace_says_what_a_payment_waits_for(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    payment_id, other = pay(conn, key_hash, 2)
    assert last(conn, payment_id).endswith("not sent yet: it waits for a worker")
    batch = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch('submit', 'worker-1')").fetchone()
    assert batch is not None
    conn.execute("select outbox.release_events(%s, %s, %s, '1 minute', 'access_refused', 'Stripe 401')", batch)
    assert re.search(r" · submit waits since \S+Z: the provider refuses its call", last(conn, payment_id))
    assert "waits for a worker" not in last(conn, payment_id)
    assert last(conn, other).count("submit waits since") == 1
    conn.execute("update outbox.retries set due_at = now()")
    fail(conn, "submit", "Stripe 400")
    assert re.search(r" · submit failed, time 1, next attempt at \S+Z", last(conn, payment_id))


def entries(conn: Connection, key_hash: bytes, payment_id: str) -> list[dict[str, Any]]:
    """The entries of the merchant's trace."""
    row = conn.execute("select body::json from api.get_trace(%s, %s)", (key_hash, payment_id)).fetchone()
    assert row is not None
    output: list[dict[str, Any]] = row[0]["entries"]
    return output


def test_errors_of_retries_and_dead_letters_are_hidden_from_merchants(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("update outbox.handlers set retry_after = '{0 s,0 s}'")
    for _ in range(3):
        fail(conn, "submit", 'Stripe 400 parameter_invalid: currency "usx"')
    output = printed_trace(conn, payment_id)
    for time in (1, 2, 3):
        assert f'submit failed, time {time}: Stripe 400 parameter_invalid: currency "usx"' in output
    assert "dead letter of submit: it failed 3 times" in output
    assert last(conn, payment_id).endswith("dead letter of submit")
    merchants = [entry["summary"] for entry in entries(conn, key_hash, payment_id) if entry["kind"] == "retry"]
    assert merchants == [*(f"submit failed, time {time}" for time in (1, 2, 3)), "dead letter of submit"]
    assert "usx" not in json.dumps(entries(conn, key_hash, payment_id))
