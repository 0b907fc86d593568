"""Facts that contradict their payment, come late or come twice: legal paths, booked money, open discrepancies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.payments import (
    Connection,
    add_merchant,
    as_bank_fact,
    fact,
    ledger_of,
    money,
    path_of,
    pay,
    record,
    state_of,
    violations,
)

Claim = tuple[int, int, list[str]]


@pytest.fixture
def key_hash(conn: Connection) -> bytes:
    return add_merchant(conn)[1]


def claimed(conn: Connection, handler: str) -> Claim:
    row = conn.execute("select batch_id, fence, event_ids from outbox.claim_batch(%s, 'w')", (handler,)).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def discrepancies(conn: Connection, payment_id: str) -> list[str]:
    query = "select kind from surety.discrepancies where payment_id = %s order by kind"
    return [row[0] for row in conn.execute(query, (payment_id,))]


def one(conn: Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def submitting(conn: Connection, payment_id: str) -> None:
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'submitting', 'test', now(), 'test')",
        (payment_id,),
    )


def refuse(conn: Connection, payment_id: str) -> None:
    refused = {"payment_id": payment_id, "operation": "create", "status": 400, "outcome": "refused"}
    results = json.dumps([refused | {"refused": {"code": "amount_too_small"}}])
    conn.execute("select surety.record_results('worker:test', %s)", (results,))


def test_manual_payment_is_authorized_before_it_is_captured(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, capture_method="manual")
    record(conn, [fact(payment_id, "submitted", "pi"), fact(payment_id, "authorized", "ch", 10000)])
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "authorized"]


def test_an_ach_payment_is_processing_before_it_is_confirmed(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, rail="ach")
    record(conn, [fact(payment_id, "processing", "pi")])
    assert state_of(conn, payment_id) == "processing"


def test_authorization_precedes_its_cancellation_within_one_batch(conn: Connection, key_hash: bytes) -> None:
    canceled, processing = pay(conn, key_hash, 2, capture_method="manual")
    record(conn, [fact(canceled, "authorized", "ch", 10000), fact(canceled, "canceled", "pi")])
    assert path_of(conn, canceled)[-2:] == ["authorized", "canceled"]
    record(conn, [fact(processing, "processing", "pi")])
    record(conn, [fact(processing, "authorized", "ch", 10000)])
    assert path_of(conn, processing)[-1] == "processing", "a later fact does not take it back"
    assert not violations(conn)


def test_a_credit_waits_for_the_confirmation_of_its_entry(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, rail="ach")
    record(conn, [as_bank_fact(fact(payment_id, "processing", "entry"))])
    record(conn, [as_bank_fact(money(payment_id, "credit", "ach_credit", 10000))])
    assert (state_of(conn, payment_id), ledger_of(conn)) == ("processing", {"bank": 10000, "ach_clearing": -10000})
    record(conn, [as_bank_fact(fact(payment_id, "captured", "entry", 10000))])
    assert path_of(conn, payment_id)[-3:] == ["processing", "confirmed", "settled"]
    assert one(conn, "select count(*) from surety.pending_money") == 0, "no balance transaction of Stripe is awaited"


def test_bank_account_is_not_the_merchants_stripe_account(conn: Connection) -> None:
    _, key_hash = add_merchant(conn, account="acct_1")
    [payment_id] = pay(conn, key_hash, rail="ach")
    record(conn, [as_bank_fact(fact(payment_id, "captured", "entry", 10000, account="odfi_1"))])
    record(conn, [fact(payment_id, "captured", "ch", 10000, account="odfi_1")])
    assert ledger_of(conn, payment_id) == {"ach_clearing": 10000, "pending": 9625, "fee_revenue": 375}
    assert discrepancies(conn, payment_id) == ["account"]
    assert one(conn, "select array_agg(id) from ledger.accounts where kind = 'ach_clearing'") == [
        "ach_clearing:bank/odfi_1:usd"
    ]


def test_bank_fact_about_a_card_payment_is_a_discrepancy(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [as_bank_fact(fact(payment_id, "captured", "entry", 10000))])
    record(conn, [as_bank_fact(money(payment_id, "credit", "ach_credit", 10000))])
    assert state_of(conn, payment_id) == "initiated"
    assert ledger_of(conn, payment_id) == {"bank": 10000, "suspense": 10000}
    assert discrepancies(conn, payment_id) == ["account", "account"]


def test_return_of_an_unknown_entry_is_a_discrepancy_and_is_posted(conn: Connection) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    facts = [fact(None, "returned", "return", 5000), money(None, "txn", "ach_return", -5000, 250)]
    record(conn, [as_bank_fact(each) for each in facts])
    conn.execute("insert into surety.clock (ahead) values ('16 minutes')")
    conn.execute("select surety.retry_unmatched_facts()")
    assert ledger_of(conn) == {"bank": -5250, "suspense": -5250}
    kinds = one(conn, "select array_agg(kind order by kind) from surety.discrepancies")
    assert kinds == ["foreign", "return_without_entry"]


def test_bank_fee_is_a_cost_and_other_debits_go_to_suspense(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, rail="ach")
    record(
        conn, [as_bank_fact(money(None, "fee", "fee", -300)), as_bank_fact(money(payment_id, "odd", "charge", -700))]
    )
    assert ledger_of(conn) == {"bank": -1000, "provider_cost": 300, "suspense": -700}
    assert discrepancies(conn, payment_id) == ["category"]


def test_a_return_before_its_confirmation_is_a_failure_with_its_reason(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, rail="ach", reference="order-1")
    returned = fact(payment_id, "returned", "return", 10000, data={"failure": {"code": "R01"}})
    record(conn, [as_bank_fact(returned)])
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "processing", "failed"]
    assert one(conn, "select failure from surety.payments") == {"code": "R01"}
    record(conn, [as_bank_fact(fact(payment_id, "dishonored", "return", 10000))])
    assert discrepancies(conn, payment_id) == ["state"], "it has ended here, and the bank reopened it"
    record(conn, [as_bank_fact(fact(payment_id, "captured", "entry", 10000))])
    assert path_of(conn, payment_id)[-2:] == ["failed", "confirmed"]
    assert one(conn, "select failure from surety.payments") is None
    assert not violations(conn)


@pytest.mark.parametrize("capture", ["automatic", "manual"])
def test_payment_that_succeeds_after_failing_unsubmitted_can_settle_and_be_refunded(
    conn: Connection, key_hash: bytes, capture: str
) -> None:
    [payment_id] = pay(conn, key_hash, capture_method=capture)
    submitting(conn, payment_id)
    refuse(conn, payment_id)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    record(conn, [money(payment_id, "txn", "charge", 10000, 320), fact(payment_id, "available", "txn", 10000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re", 1000)])
    expected = ["initiated", "submitting", "failed", "confirmed", "settled", "partially_refunded"]
    assert path_of(conn, payment_id) == expected
    assert not violations(conn)


def test_refusal_reason_survives_later_facts(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    submitting(conn, payment_id)
    refuse(conn, payment_id)
    record(conn, [fact(payment_id, "submitted", "pi")])
    assert one(conn, "select failure from surety.payments") == {"code": "amount_too_small"}


@pytest.mark.parametrize("order", [("failed", "canceled"), ("canceled", "failed")])
def test_failed_and_canceled_intents_have_ended_alike(
    conn: Connection, key_hash: bytes, order: tuple[str, str]
) -> None:
    [payment_id] = pay(conn, key_hash)
    for kind in order:
        record(conn, [fact(payment_id, kind, "pi")])
    assert state_of(conn, payment_id) == order[0]
    assert discrepancies(conn, payment_id) == []
    assert not violations(conn)


@pytest.mark.parametrize("order", [("attempt_failed", "canceled"), ("canceled", "attempt_failed")])
def test_intent_that_was_canceled_after_a_failed_attempt_has_failed(
    conn: Connection, key_hash: bytes, order: tuple[str, str]
) -> None:
    [payment_id] = pay(conn, key_hash)
    failure = {"code": "card_declined"}
    record(conn, [fact(payment_id, order[0], "pi", data={"failure": failure})])
    record(conn, [fact(payment_id, order[1], "pi", data={"failure": failure})])
    assert state_of(conn, payment_id) == ("failed" if order[0] == "attempt_failed" else "canceled")
    assert one(conn, "select failure from surety.payments") == failure
    assert discrepancies(conn, payment_id) == []


def test_object_that_could_not_be_read_is_a_discrepancy_until_it_is_recorded(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    charged = fact(payment_id, "captured", "ch", 10000)
    broken: dict[str, Any] = {"kind": "unrecorded", "subject": charged["object_id"], "detail": "ch has no amount"}
    broken["fields"] = [{"field": "record", "here": None, "there": charged["object_id"]}]
    results = json.dumps([{"operation": "list", "outcome": "answered", "discrepancy": broken}])
    is_open = "select closed_at is null from surety.discrepancies order by occurrence desc limit 1"
    conn.execute("select surety.record_results('worker:test', %s)", (results,))
    assert one(conn, is_open)
    record(conn, [charged])
    assert not one(conn, is_open)
    conn.execute("select surety.record_results('worker:test', %s)", (results,))
    assert one(conn, is_open), "it is unreadable again"
    record(conn, [charged])
    assert not one(conn, is_open)


def test_contradiction_within_one_batch_is_a_discrepancy(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000), fact(payment_id, "captured", "ch", 9000)])
    assert discrepancies(conn, payment_id) == ["amount"]


@pytest.mark.parametrize("batches", [1, 2])
def test_one_charge_of_two_payments_is_a_discrepancy(conn: Connection, key_hash: bytes, batches: int) -> None:
    first, second = pay(conn, key_hash, 2)
    both = [fact(payment_id, "captured", "ch", 10000) | {"object_id": "ch_one"} for payment_id in (first, second)]
    for facts in [both] if batches == 1 else [[one] for one in both]:
        record(conn, facts)
    assert sorted([state_of(conn, first), state_of(conn, second)]) == ["confirmed", "initiated"]
    assert [*discrepancies(conn, first), *discrepancies(conn, second)] == ["duplicate"]


def test_money_that_does_not_fit_its_payment_is_booked_to_suspense(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [money(payment_id, "txn", "charge", 900, 10, currency="eur")])
    assert ledger_of(conn, payment_id) == {"provider_balance eur": 890, "suspense eur": 890}
    assert discrepancies(conn, payment_id) == ["currency"]


def test_money_of_the_other_mode_is_not_posted(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [money(payment_id, "txn", "charge", 900, 10, livemode=True)])
    assert ledger_of(conn, payment_id) == {}


def test_a_fee_that_changes_between_capture_and_settlement_changes_nothing(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    conn.execute("update surety.merchants set fee_basis_points = 0")
    conn.execute("update surety.currencies set fee_fixed_minor = 0")
    record(conn, [money(payment_id, "txn", "charge", 10000, 320), fact(payment_id, "available", "txn", 10000)])
    assert ledger_of(conn, payment_id) == {
        "available": 9625,
        "provider_balance": 9680,
        "fee_revenue": 375,
        "provider_cost": 320,
    }


def test_decline_and_expired_action_request_one_cancellation(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "action", "pi")])
    conn.execute("select surety.emit_expired_actions(interval '-1 second')")
    record(conn, [fact(payment_id, "attempt_failed", "pi")])
    batch, fence, _ = claimed(conn, "cancel")
    calls = conn.execute("select verdict from surety.begin_calls(%s, %s, 'cancel', 'w')", (batch, fence)).fetchall()
    assert calls == [("send",), ("skip",)]


def test_reported_overdue_settlement_does_not_hide_later_ones(conn: Connection, key_hash: bytes) -> None:
    for payment_id in pay(conn, key_hash, 3):
        conn.execute(
            "insert into surety.expectations (payment_id, kind, opened_at, due_at)"
            " values (%s, 'settlement', now(), now() - interval '1 day')",
            (payment_id,),
        )
    assert [one(conn, "select surety.open_overdue_discrepancies(2)") for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("kind", ["canceled", "failed", "processing", "action", "attempt_failed"])
def test_second_intent_does_not_change_the_payment(conn: Connection, key_hash: bytes, kind: str) -> None:
    [payment_id] = pay(conn, key_hash, reference="order-1")
    record(conn, [fact(payment_id, "submitted", "pi")])
    event_types = record(conn, [fact(payment_id, "submitted", "orphan"), fact(payment_id, kind, "orphan")])
    assert event_types == ([] if kind in {"canceled", "failed"} else ["payment.orphan_found"])
    state, intent = conn.execute("select state, provider_id from surety.payments").fetchall()[0]
    assert (state, intent) == ("provider_submitted", f"pi_{payment_id[-12:]}")
    assert one(conn, "select count(*) from surety.payment_references") == 1
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    assert state_of(conn, payment_id) == "confirmed"
    assert not violations(conn)


def test_intent_reported_with_another_amount_is_never_confirmed_and_its_cancellation_ends_the_payment(
    conn: Connection, key_hash: bytes
) -> None:
    [payment_id] = pay(conn, key_hash, reference="order-1")
    submitting(conn, payment_id)
    record(conn, [fact(payment_id, "submitted", "pi", 9999)])
    record(conn, [fact(payment_id, "submitted", "pi", 10000)])
    assert state_of(conn, payment_id) == "submitting", "whichever of the reports was wrong"
    record(conn, [fact(payment_id, "canceled", "pi")])
    assert state_of(conn, payment_id) == "canceled"
    assert discrepancies(conn, payment_id) == ["amount"]
    assert state_of(conn, pay(conn, key_hash, reference="order-1")[0]) == "initiated"
    assert violations(conn) == {}
