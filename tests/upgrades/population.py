"""A database with a few hundred payments in every state, and with whatever else can be unfinished in it."""

from __future__ import annotations

import json

from tests.support.dead_letters import exhaust_retries
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    command,
    create,
    fact,
    money,
    pay,
    record,
    record_results,
    request,
)

AMOUNT_MINOR = 10_000
EACH = 10
"""Payments per history."""

HISTORIES: tuple[tuple[str, ...], ...] = (
    ("submitted",),
    ("submitted", "action"),
    ("submitted", "processing"),
    ("submitted", "failed"),
    ("submitted", "canceled"),
    ("submitted", "captured"),
    ("submitted", "captured", "money"),
    ("submitted", "captured", "money", "available"),
    ("submitted", "captured", "money", "available", "dispute needs_response"),
    ("submitted", "captured", "money", "available", "dispute needs_response", "dispute won"),
    ("submitted", "captured", "dispute needs_response", "dispute lost"),
)
"""What the provider says of a payment, one after the other."""

DISPUTE_KINDS = {"needs_response": "dispute_opened", "won": "dispute_won", "lost": "dispute_lost"}


def populate(conn: Connection) -> None:
    """Fill a database that was just deployed. Needs all rights."""
    conn.execute("select surety.set_livemode(false, 'operator:tester')")
    merchant, key = add_merchant(conn, name="Acme Books")
    suspended, _ = add_merchant(conn, name="Suspended Ltd")
    add_dead_letters(conn, key)
    add_histories(conn, key)
    add_settled_payments(conn, key)
    add_manual_captures(conn, key)
    add_refunds(conn, key)
    add_unfinished_calls(conn, key)
    add_customers(conn, key)
    add_discrepancies(conn, key)
    add_webhooks(conn)
    add_held_payments(conn, merchant, key)
    conn.execute("select surety.suspend_merchant(%s, true, 'operator:tester')", (suspended,))


def provider_fact(payment_id: str, said: str, revision: int) -> Fact:
    """One of the words of HISTORIES as a fact."""
    word, _, status = said.partition(" ")
    if word == "dispute":
        kind = DISPUTE_KINDS[status]
        return fact(payment_id, kind, "dp", AMOUNT_MINOR, revision=revision, data={"status": status})
    if word == "money":
        return money(payment_id, "txn", "charge", AMOUNT_MINOR, 320)
    if word == "available":
        return money(payment_id, "txn", "charge", AMOUNT_MINOR, 320) | {"kind": "available"}
    if word == "captured":
        return fact(payment_id, "captured", "ch", AMOUNT_MINOR)
    data = {"type": "redirect", "url": "https://hooks.example/3ds"} if word == "action" else {}
    return fact(payment_id, word, "pi", data=data)


def add_histories(conn: Connection, key: bytes) -> None:
    """Payments that stand where their histories end."""
    for number, history in enumerate(HISTORIES):
        for place, payment_id in enumerate(
            pay(conn, key, EACH, amount=AMOUNT_MINOR, metadata={"history": str(number)}, description="A book")
        ):
            for revision, said in enumerate(history):
                # Some get all facts at once, as after an outage.
                if place % 2:
                    record(conn, [provider_fact(payment_id, said, revision)])
            if not place % 2:
                record(conn, [provider_fact(payment_id, said, revision) for revision, said in enumerate(history)])


def drain(conn: Connection, handler: str, function: str) -> None:
    """Let a function of SQL handle the events of its handler that are due."""
    claim = "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'worker-1')"
    while row := conn.execute(claim, (handler,)).fetchone():
        conn.execute(f"select {function}(%s, %s, %s)".encode(), row)


def add_settled_payments(conn: Connection, key: bytes) -> None:
    """Payments whose money came and was expected."""
    for payment_id in pay(conn, key, 2 * EACH, amount=AMOUNT_MINOR):
        record(conn, [provider_fact(payment_id, said, 0) for said in ("submitted", "captured", "money", "available")])
    drain(conn, "expect_settlement", "surety.expect_settlement")
    drain(conn, "meet_settlement", "surety.meet_expected_settlement")


def add_manual_captures(conn: Connection, key: bytes) -> None:
    """Authorized payments: some to be captured, some canceled, some left."""
    for number, payment_id in enumerate(pay(conn, key, EACH, amount=AMOUNT_MINOR, capture_method="manual")):
        record(conn, [fact(payment_id, "submitted", "pi"), fact(payment_id, "authorized", "ch", AMOUNT_MINOR)])
        if number % 3 == 1:
            expect(command(conn, "capture_payment", key, payment_id=payment_id), 202)
        if number % 3 == 2:
            expect(command(conn, "cancel_payment", key, payment_id=payment_id), 202)


def add_refunds(conn: Connection, key: bytes) -> None:
    """Refunds asked for, succeeded, failed, in part and in whole; one that was made at the provider."""
    for number, payment_id in enumerate(pay(conn, key, 2 * EACH, amount=AMOUNT_MINOR)):
        record(conn, [fact(payment_id, "submitted", "pi"), fact(payment_id, "captured", "ch", AMOUNT_MINOR)])
        part = AMOUNT_MINOR if number % 3 == 0 else 2500
        asked = command(conn, "create_refund", key, payment_id=payment_id, amount=part, reason="duplicate")
        expect(asked, 201)
        refund_id = asked["body"]["id"]
        if kind := (None, "refund_pending", "refund_succeeded", "refund_failed")[number % 4]:
            record(conn, [fact(payment_id, kind, "re", part, data={"refund": refund_id})])
        if number % 7 == 0 and part < AMOUNT_MINOR:
            record(conn, [fact(payment_id, "refund_succeeded", "re_dashboard", 500, data={})])


def add_unfinished_calls(conn: Connection, key: bytes) -> None:
    """Payments whose calls were sent and not answered, with batches that are still leased."""
    pay(conn, key, EACH, amount=AMOUNT_MINOR)
    batch, fence, _ = claimed(conn, "submit")
    conn.execute("select from surety.begin_calls(%s, %s, 'create', 'worker:w')", (batch, fence))


def claimed(conn: Connection, handler: str) -> tuple[int, int, list[str]]:
    """The next batch of a handler."""
    row = conn.execute(
        "select batch_id, fence, event_ids from outbox.claim_batch(%s, 'worker-1')", (handler,)
    ).fetchone()
    assert row is not None, f"nothing is due for {handler}"
    return row[0], row[1], row[2]


def add_dead_letters(conn: Connection, key: bytes) -> None:
    """Dead letters, open and closed, and an event that waits for its next attempt."""
    pay(conn, key, EACH, amount=AMOUNT_MINOR)
    letters = exhaust_retries(conn, "submit")
    for letter in letters[:3]:
        conn.execute("select * from outbox.discard_dead_letter(%s, 'operator:tester', 'a test order')", (letter,))
    for letter in letters[3:6]:
        conn.execute("select * from outbox.replay_dead_letter(%s, 'operator:tester', 'it works again')", (letter,))
    conn.execute("update outbox.handlers set retry_after = default where handler = 'submit'")
    pay(conn, key, 2, amount=AMOUNT_MINOR)
    batch, fence, event_ids = claimed(conn, "submit")
    record_results(conn, batch, fence, [{"event_id": each, "error": "Stripe 500"} for each in event_ids])


def add_customers(conn: Connection, key: bytes) -> None:
    """Customers with saved payment methods, payments by them, and one that was erased."""
    for number in range(EACH):
        made = command(conn, "create_customer", key, email=f"payer{number}@example.com", name="Ada Lovelace")
        expect(made, 201)
        customer = made["body"]["id"]
        save = {"usage": "off_session", "mandate": {"accepted_at": "2026-11-01T12:00:00Z", "text": "I agree."}}
        [saving] = create(conn, [request(key, customer_id=customer, save_method=save)])
        paid = saving["payment_id"]
        record(conn, [provider_fact(paid, said, 0) for said in ("submitted", "captured")])
        shown = {"id": f"pm_{number}", "brand": "visa", "last4": "4242", "fingerprint": f"card_{number % 3}"}
        conn.execute("select surety.record_saved_method(%s, %s, surety.time_now())", (paid, json.dumps(shown)))
        [(method,)] = conn.execute("select id from surety.payment_methods where payment_id = %s", (paid,)).fetchall()
        by_method = request(key, saved_method=method, method_token=None, off_session=True, return_url=None)
        assert create(conn, [by_method])[0]["status"] == 201
    gone = command(conn, "create_customer", key, email="gone@example.com")["body"]["id"]
    conn.execute("select surety.erase_customer(%s, surety.time_now())", (gone,))


def add_discrepancies(conn: Connection, key: bytes) -> None:
    """Facts that contradict their payments, foreign money; some discrepancies closed."""
    for number, payment_id in enumerate(pay(conn, key, EACH, amount=AMOUNT_MINOR)):
        record(conn, [fact(payment_id, "captured", "ch", AMOUNT_MINOR)])
        amount, currency = (AMOUNT_MINOR - 1, "usd") if number % 2 else (AMOUNT_MINOR, "eur")
        record(conn, [fact(payment_id, "captured", "ch", amount, currency=currency)])
    record(conn, [money(None, "txn_foreign", "charge", 777, 52)])


def add_webhooks(conn: Connection) -> None:
    """Webhooks that wait to be interpreted, and one that was refused."""
    webhooks = [
        {
            "n": number, "provider": "stripe", "account": "", "livemode": False, "event_id": f"evt_{number}",
            "type": "payment_intent.succeeded", "headers": {}, "body": json.dumps({"id": f"evt_{number}"}),
        }
        for number in range(EACH)
    ]  # fmt: skip
    conn.execute("select n, is_new from surety.receive_webhooks(%s)", (json.dumps(webhooks),))
    conn.execute(
        "select surety.store_rejected_webhook('stripe', 'wrong-signature', 'no match', '{}', %s, '192.0.2.1')", (b"{}",)
    )


def add_held_payments(conn: Connection, merchant: str, key: bytes) -> None:
    """Payments on hold, decided and undecided, under limits."""
    conn.execute("select surety.add_velocity_rule(%s, 'email', '1 hour', 1, null, null, 'hold')", (merchant,))
    conn.execute("select surety.set_money_limit(%s, 'usd', 10000, 100000000)", (merchant,))
    held = pay(conn, key, EACH, amount=AMOUNT_MINOR, customer={"email": "held@example.com"})[1:]
    for number, payment_id in enumerate(held):
        if decision := (None, "released", "refused")[number % 3]:
            conn.execute("select * from surety.decide_hold(%s, %s, 'operator:tester', 'seen')", (payment_id, decision))


def expect(outcome: dict[str, object], status: int) -> None:
    """Fail unless a command had this status."""
    assert outcome["status"] == status, outcome
