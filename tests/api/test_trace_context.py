"""The trace context of a request reaches the events that it causes, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.support.http_client import Merchant, unique_name
from tests.support.payments import create, request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CONTEXT = f"00-{TRACE}-00f067aa0ba902b7-01"


def contexts(merchant: Merchant, aggregate_id: str) -> Mapping[str, str | None]:
    """The trace context of each event of an object, by its type."""
    query = "select type, traceparent from outbox.events where aggregate_id = %s"
    return dict(merchant.conn.execute(query, (aggregate_id,)).fetchall())


def test_event_of_a_request_has_its_trace_context(merchant: Merchant) -> None:
    made = merchant.post(traceparent=CONTEXT).json()["id"]
    assert contexts(merchant, made) == {"payment.initiated": CONTEXT}
    headers = {"idempotency-key": unique_name("cancel")}
    assert merchant.client.post(f"/v1/payments/{made}/cancel", json={}, headers=headers).status_code == 200
    assert contexts(merchant, made) == {"payment.initiated": CONTEXT, "payment.canceled": None}


def test_event_of_a_command_has_its_trace_context(merchant: Merchant) -> None:
    made = merchant.pay()["id"]
    headers = {"idempotency-key": unique_name("cancel"), "traceparent": CONTEXT}
    assert merchant.client.post(f"/v1/payments/{made}/cancel", json={}, headers=headers).status_code == 200
    assert contexts(merchant, made) == {"payment.initiated": None, "payment.canceled": CONTEXT}


def test_requests_of_one_batch_keep_their_own_trace_contexts(merchant: Merchant) -> None:
    [(hashed,)] = merchant.conn.execute("select hash from surety.api_keys where id = %s", (merchant.key_id,)).fetchall()
    other = CONTEXT.replace(TRACE, TRACE[::-1])
    asked = [request(hashed) | {"n": n} for n in range(3)]
    asked[0]["traceparent"], asked[2]["traceparent"] = CONTEXT, other
    found = [contexts(merchant, row["payment_id"])["payment.initiated"] for row in create(merchant.conn, asked)]
    assert found == [CONTEXT, None, other]
    # The setting ends with its transaction, though the session goes on.
    [row] = create(merchant.conn, [request(hashed)])
    assert contexts(merchant, row["payment_id"]) == {"payment.initiated": None}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (f"01-{TRACE}-00f067aa0ba902b7-01-later", CONTEXT),
        (f"00-{TRACE}-00f067aa0ba902b7-01-more", None),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (CONTEXT.upper(), None),
        (CONTEXT[:-1], None),
        ("", None),
    ],
)
def test_invalid_trace_context_is_ignored(merchant: Merchant, sent: str, kept: str | None) -> None:
    made = merchant.post(traceparent=sent)
    assert made.status_code == 201
    assert contexts(merchant, made.json()["id"]) == {"payment.initiated": kept}


def test_event_has_the_time_at_which_it_was_emitted(merchant: Merchant) -> None:
    made = merchant.pay()["id"]
    query = "select at = (payload ->> 'at')::timestamptz from outbox.events where aggregate_id = %s"
    # The payload's time has milliseconds.
    query = query.replace("at =", "date_trunc('milliseconds', at) =")
    assert merchant.conn.execute(query, (made,)).fetchall() == [(True,)]
