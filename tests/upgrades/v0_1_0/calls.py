"""How the processes of 0.1.0 call its functions. Frozen: a later version must answer these calls as well."""

from __future__ import annotations

import json
from typing import Any, LiteralString

import psycopg

Connection = psycopg.Connection[tuple[Any, ...]]
AMOUNT_MINOR = 10_000

READS: dict[LiteralString, tuple[Any, ...]] = {
    "select body from api.get_balance(%s, %s)": ("",),
    "select body from api.list_balance_transactions(%s, %s, %s, %s, %s)": (None, 10, None, ""),
    "select body from api.list_currencies(%s, %s)": ("",),
    "select body from api.list_payments(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)": (
        *(None, None, None, None, None, 10, None, "{}"),
        "",
    ),
    "select body from api.list_events(%s, %s, %s, %s, %s, %s)": (None, 10, None, None, ""),
    "select body from api.list_customers(%s, %s, %s, %s, %s)": (None, 10, None, ""),
    "select is_suspended from api.identify_merchant(%s, %s, %s)": ("read", ""),
}
"""Statements about a merchant, by its key's hash, and the other values."""

STATUS: tuple[LiteralString, ...] = (
    "select surety.read_livemode()",
    "select handler, event_types, batch_size, lease_seconds from outbox.list_handlers()",
    "select outbox.schedule_handlers('{submit}')",
    "select name, violations from surety.check_invariants()",
    "select surety.read_clock()",
)


def live_payment(conn: Connection, key_hash: bytes, number: int) -> str:
    """A payment from its request to its refund, as the API, a worker and the receiver lead it; returns its id."""
    payment_id = create_payment(conn, key_hash, number)
    submit(conn, payment_id)
    receive_webhook(conn, payment_id)
    data = {"category": "charge", "fee": 320, "net": AMOUNT_MINOR - 320, "available_at": "2026-12-08T00:00:00Z"}
    said = {"submitted": "pi", "captured": "ch", "money": "txn", "available": "txn"}
    for kind, object_id in said.items():
        known = fact(payment_id, kind, object_id, data if object_id == "txn" else {})
        conn.execute("select surety.record_facts(%s, %s)", (json.dumps([known]), "system:poll"))
    refund(conn, key_hash, payment_id, number)
    read(conn, key_hash, payment_id)
    return payment_id


def create_payment(conn: Connection, key_hash: bytes, number: int) -> str:
    """POST /v1/payments; returns the payment's id."""
    request = {
        "n": 0, "key_hash": key_hash.hex(), "request_id": f"req_old_{number}", "address": "192.0.2.7",
        "api_version": "2026-11-30", "idempotency_key": f"old-{number}", "request_hash": "00", "amount": AMOUNT_MINOR,
        "currency": "usd", "rail": "card", "method_token": "pm_card_visa", "capture_method": "automatic",
        "reference": f"old-{number}", "return_url": "https://shop.example/return", "off_session": False,
        "metadata": {"by": "0.1.0"}, "customer": {"email": f"payer{number}@example.com"},
    }  # fmt: skip
    query = "select n, status, problem, detail, body, is_replayed, payment_id from api.create_payments(%s)"
    [(_, status, problem, detail, _, _, payment_id)] = conn.execute(query, (json.dumps([request]),)).fetchall()
    assert status == 201, (problem, detail)
    return str(payment_id)


def submit(conn: Connection, payment_id: str) -> None:
    """A worker claims the payments that are due, and creates their intents."""
    claim = "select batch_id, fence, event_ids from outbox.claim_batch(%s, %s, make_interval(secs => %s))"
    for batch, fence, event_ids in conn.execute(claim, ("submit", "worker:old", 60)).fetchall():
        conn.execute("select outbox.renew_lease(%s, %s)", (batch, fence))
        begun = conn.execute(
            "select event_id, payment_id from surety.begin_calls(%s, %s, %s, %s)",
            (batch, fence, "create", "worker:old"),
        ).fetchall()
        answered = {"operation": "create", "outcome": "answered", "status": 200, "duration_ms": 80.5}
        results = [
            {"batch_id": batch, "fence": fence, "event_id": event_id, "payment_id": of}
            | (answered | {"facts": [fact(of, "submitted", "pi")]})
            for event_id, of in begun
        ]
        left = set(event_ids) - {event_id for event_id, _ in begun}
        results += [{"batch_id": batch, "fence": fence, "event_id": event_id} for event_id in sorted(left)]
        query = "select lost_batches, event_types from surety.record_results(%s, %s)"
        conn.execute(query, ("worker:old", json.dumps(results)))


def receive_webhook(conn: Connection, payment_id: str) -> None:
    """POST /stripe, a webhook that says nothing of interest."""
    webhook = {
        "n": 0, "provider": "stripe", "account": "", "livemode": False, "event_id": f"evt_of_{payment_id}",
        "type": "payment_intent.created", "headers": {}, "body": "{}", "address": "192.0.2.8",
    }  # fmt: skip
    conn.execute("select n, is_new from surety.receive_webhooks(%s)", (json.dumps([webhook]),))


def refund(conn: Connection, key_hash: bytes, payment_id: str, number: int) -> None:
    """POST /v1/payments/{id}/refunds, and what the provider says of it."""
    asked = {
        "key_hash": key_hash.hex(), "request_id": f"req_ref_{number}", "address": "192.0.2.7",
        "api_version": "2026-11-30", "idempotency_key": f"old-refund-{number}", "request_hash": "00",
        "payment_id": payment_id, "amount": 2500, "reason": None, "metadata": {},
    }  # fmt: skip
    query = "select status, problem, detail, body, is_replayed from api.create_refund(%s)"
    [(status, problem, _, body, _)] = conn.execute(query, (json.dumps(asked),)).fetchall()
    assert status == 201, problem
    known = fact(payment_id, "refund_succeeded", "re", {"refund": json.loads(body)["id"]}) | {"amount_minor": 2500}
    conn.execute("select surety.record_facts(%s, %s)", (json.dumps([known]), "worker:old"))


def read(conn: Connection, key_hash: bytes, payment_id: str) -> None:
    """What merchants and operators ask."""
    for query, values in READS.items():
        assert conn.execute(query, (key_hash, *values)).fetchone() is not None, query
    for query in ("select body from api.get_payment(%s, %s, %s)", "select body from api.get_trace(%s, %s, %s)"):
        [(body,)] = conn.execute(query, (key_hash, payment_id, "")).fetchall()
        assert body is not None, query
    for query in STATUS:
        assert conn.execute(query).fetchall(), query


def fact(payment_id: str, kind: str, object_id: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the provider says, as 0.1.0 reads it."""
    return {
        "payment_id": payment_id, "provider": "stripe", "account": "", "livemode": False,
        "object_id": f"{object_id}_{payment_id[4:]}", "kind": kind, "amount_minor": AMOUNT_MINOR, "currency": "usd",
        "source": "poll", "data": data or {}, "occurred_at": "2026-12-01T00:00:00Z",
    }  # fmt: skip
