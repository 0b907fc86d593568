"""Which words of a payer are searched for in texts that belong to no payment, and what stays of those around them."""

from __future__ import annotations

import json

from psycopg.types.json import Jsonb

from tests.cli.conftest import Run, said
from tests.support.payments import Connection, add_merchant, command, fact, pay, record

METHOD = (
    "insert into surety.payment_methods (id, customer_id, merchant_id, type, provider_id, usage, mandate, payment_id,"
    " created_at) select surety.new_id('spm', now()), customer_id, merchant_id, 'card', 'pm_1', 'off_session',"
    ' \'{"ip_address": "203.0.113.7"}\', id, now() from surety.payments where id = %s returning id'
)


def reject(conn: Connection, **body: str) -> None:
    """Store a webhook as the receiver does when its signature is invalid."""
    query = "select surety.store_rejected_webhook('stripe', 'wrong-signature', 'no', '{}', %s, '')"
    conn.execute(query, (json.dumps(body, ensure_ascii=False).encode(),))


def rejected(conn: Connection) -> list[dict[str, str]]:
    rows = conn.execute("select convert_from(body, 'UTF8')::jsonb from surety.rejected_webhooks order by id").fetchall()
    return [body for (body,) in rows]


def end(conn: Connection, payment: str, intent: str) -> None:
    record(conn, [fact(payment, "submitted", intent, 10000), fact(payment, "failed", intent)])


def test_rejected_webhooks_are_deleted_by_address_full_name_and_ids_only(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    named = {"email": "ada@payer.example", "name": "Ada King"}
    [first] = pay(conn, key, customer=named, description="refund")
    [second] = pay(conn, key, customer={"email": "r@r.example", "name": "refund"}, description="charge")
    end(conn, first, "pi_1")
    end(conn, second, "pi_2")
    [(intent,)] = conn.execute("select provider_id from surety.payments where id = %s", (second,)).fetchall()
    kept = {"type": "charge.refund.updated", "of": "Ada"}
    for body in (kept, {"to": "ada@payer.example"}, {"by": "Ada King"}, {"id": intent}, {"id": first}):
        reject(conn, **body)
    for payment in (first, second):
        said(run("customers", "erase", "--merchant", merchant, "--payment", payment))
    assert rejected(conn) == [kept]


def test_rejected_webhooks_about_a_stored_customer_are_deleted(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    customer = command(conn, "create_customer", key, email="Ada@payer.example", name="Ada King")["body"]["id"]
    for text in ("Ada@payer.example", "ada@payer.example", "Ada King", customer, "another"):
        reject(conn, text=text)
    said(run("customers", "erase", "--merchant", merchant, "--customer", customer))
    assert rejected(conn) == [{"text": "another"}]


def test_words_are_replaced_in_texts_and_not_in_names_or_between_them(conn: Connection) -> None:
    attempts = [{"error": 'an error of "Zoë"', "status": 400}, {"error": 'sent {"name": "a \\"b\\""}', "at": None}]
    words = ["error", "}, {", '"Zoë"', 'a "b"']
    row = conn.execute("select surety.replace_words(%s, %s)", (Jsonb(attempts), words)).fetchone()
    assert row is not None
    assert row[0] == [
        {"error": "an (erased) of (erased)", "status": 400},
        {"error": 'sent {"name": "(erased)"}', "at": None},
    ]


def test_saved_method_keeps_its_mandate_as_long_as_it_can_be_charged(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    customer = command(conn, "create_customer", key)["body"]["id"]
    [payment] = pay(conn, key, customer_id=customer)
    end(conn, payment, "pi")
    [(method,)] = conn.execute(METHOD, (payment,)).fetchall()
    words = ("customers", "erase", "--merchant", merchant, "--payment", payment)
    kept = f"kept until the customer is erased: the mandate of {method}"
    mandate = "select mandate from surety.payment_methods"
    assert kept in said(run(*words))
    assert conn.execute(mandate).fetchone() == ({"ip_address": "203.0.113.7"},)
    conn.execute("update surety.payment_methods set detached_at = now()")
    assert "mandate" not in said(run(*words))
    assert conn.execute(mandate).fetchone() == ({},)
