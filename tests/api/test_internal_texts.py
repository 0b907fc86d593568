"""Texts for operators stay with operators: no route of a merchant shows them."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from app.api.routes import MERCHANT_ROUTES
from app.cli.trace import read_trace
from tests.api.test_customers import save_method
from tests.support.http_client import Connection, Merchant
from tests.support.payments import fact, money, record

WORKER = "worker-seven"
OPERATOR = "ada@acme.example"
OPERATOR_ADDRESS = "203.0.113.77"
REASON = "our provider contract ended"
PYTHON_ERROR = "KeyError: balance_transaction"
PROVIDER_ERROR = "Received unknown parameter: statement_descriptor"
REQUEST_LOG = "https://dashboard.stripe.example/logs/req_1"
TEXTS = (WORKER, OPERATOR, OPERATOR_ADDRESS, REASON, PYTHON_ERROR, PROVIDER_ERROR, REQUEST_LOG, "database_user")


def value(conn: Connection, query: str, *parameters: Any) -> Any:
    """The first column of the first row."""
    row = conn.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def write_provider_call(conn: Connection, payment_id: str) -> None:
    """A call and its answer, an error with the provider's text."""
    call = {"kind": "call", "actor": f"worker:{WORKER}", "payment_id": payment_id}
    answer = call | {
        "kind": "answer",
        "outcome": "rejected",
        "reason": PROVIDER_ERROR,
        "snapshot": {"operation": "create", "status": 400, "error": {"request_log_url": REQUEST_LOG}},
    }
    asked = call | {"outcome": "sent", "snapshot": {"operation": "create", "key": f"{payment_id}:create"}}
    conn.execute("select audit.write_entries(%s)", (json.dumps([asked, answer]),))


def discard_submission(conn: Connection, payment_id: str) -> None:
    """The payment's submission fails until it is a dead letter, which an operator discards."""
    conn.execute("update outbox.handlers set retry_after = '{0 s}' where handler = 'submit'")
    for _ in range(2):
        claimed = conn.execute(
            "select batch_id, fence, event_ids from outbox.claim_batch('submit', %s)", (f"worker:{WORKER}",)
        )
        batch = claimed.fetchone()
        assert batch is not None
        failed = [{"event_id": event_id, "error": PYTHON_ERROR} for event_id in batch[2]]
        conn.execute("select outbox.fail_events(%s, %s, %s)", (batch[0], batch[1], json.dumps(failed)))
    letter = value(conn, "select id from outbox.dead_letters where payment_id = %s", payment_id)
    outcome = value(
        conn,
        "select outcome from outbox.discard_dead_letter(%s, %s, %s, false, 'req_of_operator', %s)",
        letter, f"operator:{OPERATOR}", REASON, OPERATOR_ADDRESS,
    )  # fmt: skip
    assert outcome == "discarded"


def close_discrepancy(conn: Connection, payment_id: str) -> None:
    """An operator closes a discrepancy of the payment."""
    discrepancy = value(
        conn,
        "select surety.open_discrepancy('amount', %s, 'critical', %s,"
        " jsonb_build_array(surety.differing_amount('amount', 1, 2)), %s, null, surety.time_now(), %s)",
        payment_id, PYTHON_ERROR, payment_id, payment_id,
    )  # fmt: skip
    resolve = "select outcome from surety.resolve_discrepancy(%s, 'explained', %s, %s)"
    assert value(conn, resolve, discrepancy, REASON, f"operator:{OPERATOR}") == "resolved"


def reverse_payment(conn: Connection, payment_id: str) -> None:
    """The payment is captured, refunded in part, and disputed."""
    output = {"status": "needs_response", "reason": "fraudulent", "evidence_due_at": "2099-12-01T00:00:00Z"}
    facts = [
        fact(payment_id, "captured", "ch", 4999),
        money(payment_id, "txn", "charge", 4999, 175),
        fact(payment_id, "refund_succeeded", "re", 1000),
        fact(payment_id, "dispute_opened", "du", 3999, revision=1, data=output),
    ]
    for one in facts:
        value(conn, "select surety.record_facts(%s, %s)", json.dumps([one]), f"worker:{WORKER}")
    record(conn, [money(payment_id, "txn_d", "dispute", -3999, 1500)])


def documents(merchant: Merchant, payment_ids: list[str]) -> dict[str, str]:
    """The text of every document that the merchant's routes give, by its path."""
    refunds = [refund["id"] for refund in merchant.get("/v1/refunds")["data"]]
    disputes = [dispute["id"] for dispute in merchant.get("/v1/disputes")["data"]]
    events = [event["id"] for event in merchant.get("/v1/events")["data"]]
    customer = merchant.client.post("/v1/customers", headers={"Idempotency-Key": "customer"}).json()["id"]
    method = save_method(merchant.conn, merchant, customer)
    merchant.conn.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))
    hooks = {"url": "https://shop.example/", "event_types": ["*"]}
    made = merchant.client.post("/v1/webhook_endpoints", json=hooks, headers={"Idempotency-Key": "hooks"})
    ids = {
        "customer_id": [customer],
        "payment_method_id": [method],
        "payment_id": payment_ids,
        "refund_id": refunds,
        "dispute_id": disputes,
        "event_id": events,
        "webhook_endpoint_id": [made.json()["id"]],
    }
    shown = {}
    for route in MERCHANT_ROUTES:
        parameters = re.findall(r"{(\w+)}", route.path)
        for one in ids[parameters[-1]] if parameters else [""]:
            path = re.sub(r"{\w+}$|{\w+}(?=/[a-z_]+$)", one, route.path).replace("{customer_id}", customer)
            # A POST without a body is refused: its problem document is shown too.
            query = {"month": datetime.now(UTC).strftime("%Y-%m")} if "statements" in path else {}
            headers = {"Idempotency-Key": "key-of-" + one}
            answer = merchant.client.request(route.method, path, headers=headers, params=query)
            assert answer.status_code < 500 and (answer.status_code == 200 or route.method != "GET"), answer.text
            shown[f"{route.method} {path}"] = answer.text
    assert refunds and disputes
    return shown


def test_merchants_read_no_text_that_is_for_operators(merchant: Merchant) -> None:
    conn = merchant.conn
    discarded = merchant.pay()["id"]
    write_provider_call(conn, discarded)
    discard_submission(conn, discarded)
    close_discrepancy(conn, discarded)
    reversed_ = merchant.pay()["id"]
    write_provider_call(conn, reversed_)
    reverse_payment(conn, reversed_)

    for path, text in documents(merchant, [discarded, reversed_]).items():
        assert [forbidden for forbidden in TEXTS if forbidden in text] == [], path
    kept = json.dumps([read_trace(conn, payment_id) for payment_id in (discarded, reversed_)])
    assert [text for text in TEXTS if text not in kept] == []


def test_merchants_still_read_what_was_decided_about_their_payment(merchant: Merchant) -> None:
    payment_id = merchant.pay()["id"]
    write_provider_call(merchant.conn, payment_id)
    discard_submission(merchant.conn, payment_id)
    entries = merchant.get(f"/v1/payments/{payment_id}/trace")["entries"]
    summaries = [entry["summary"] for entry in entries]
    assert {"→ create", "← create rejected", "submit failed, time 1", "operator discarded"} <= set(summaries)
    assert "failed by discarded" in summaries
    decided = entries[summaries.index("operator discarded")]
    assert (decided["actor"], decided["data"]) == ({"type": "operator", "id": None}, {})
    answered = entries[summaries.index("← create rejected")]
    assert answered["data"] == {"operation": "create", "status": 400}
