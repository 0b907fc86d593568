"""What an adversary tried against the SQL core and what must hold all the same."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from tests.conftest import Connect
from tests.support.payments import (
    Connection,
    add_merchant,
    as_bank_fact,
    create,
    fact,
    ledger_of,
    money,
    path_of,
    pay,
    record,
    request,
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
    told = json.dumps([refused | {"refused": {"code": "amount_too_small"}}])
    conn.execute("select surety.record_call_results('worker:test', %s)", (told,))


def test_manual_payment_is_authorized_before_it_is_captured(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, capture_method="manual")
    record(conn, [fact(payment_id, "submitted", "pi"), fact(payment_id, "authorized", "ch", 10000)])
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "authorized"]


def test_an_ach_payment_is_processing_before_it_is_confirmed(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, rail="ach")
    record(conn, [fact(payment_id, "processing", "pi")])
    assert state_of(conn, payment_id) == "processing"


def test_authorization_precedes_its_cancellation_within_one_batch(conn: Connection, key_hash: bytes) -> None:
    called_off, under_way = pay(conn, key_hash, 2, capture_method="manual")
    record(conn, [fact(called_off, "authorized", "ch", 10000), fact(called_off, "canceled", "pi")])
    assert path_of(conn, called_off)[-2:] == ["authorized", "canceled"]
    record(conn, [fact(under_way, "processing", "pi")])
    record(conn, [fact(under_way, "authorized", "ch", 10000)])
    assert path_of(conn, under_way)[-1] == "processing", "it is further than that"
    assert not violations(conn)


def test_a_credit_waits_for_the_confirmation_of_its_entry(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash, rail="ach")
    record(conn, [as_bank_fact(fact(payment_id, "processing", "entry"))])
    record(conn, [as_bank_fact(money(payment_id, "credit", "ach_credit", 10000))])
    assert (state_of(conn, payment_id), ledger_of(conn)) == ("processing", {"bank": 10000, "ach_clearing": -10000})
    record(conn, [as_bank_fact(fact(payment_id, "captured", "entry", 10000))])
    assert path_of(conn, payment_id)[-3:] == ["processing", "confirmed", "settled"]
    assert one(conn, "select count(*) from surety.pending_money") == 0, "there is nothing to ask Stripe about"


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
    told = [fact(None, "returned", "return", 5000), money(None, "txn", "ach_return", -5000, 250)]
    record(conn, [as_bank_fact(each) for each in told])
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
    assert discrepancies(conn, payment_id) == ["state"], "it ended here, and lives at the bank"
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
def test_two_final_facts_of_one_intent_are_a_discrepancy(
    conn: Connection, key_hash: bytes, order: tuple[str, str]
) -> None:
    [payment_id] = pay(conn, key_hash)
    for kind in order:
        record(conn, [fact(payment_id, kind, "pi")])
    assert state_of(conn, payment_id) == order[0]
    assert discrepancies(conn, payment_id) == ([] if order[0] == "failed" else ["state"])
    assert not violations(conn)


def test_contradiction_within_one_batch_is_a_discrepancy(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000), fact(payment_id, "captured", "ch", 9000)])
    assert discrepancies(conn, payment_id) == ["amount"]


@pytest.mark.parametrize("batches", [1, 2])
def test_one_charge_of_two_payments_is_a_discrepancy(conn: Connection, key_hash: bytes, batches: int) -> None:
    first, second = pay(conn, key_hash, 2)
    told = [fact(payment_id, "captured", "ch", 10000) | {"object_id": "ch_one"} for payment_id in (first, second)]
    for facts in [told] if batches == 1 else [[one] for one in told]:
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
    conn.execute("update surety.merchants set fee_basis_points = 0, fee_fixed_minor = 0")
    record(conn, [money(payment_id, "txn", "charge", 10000, 320), fact(payment_id, "available", "txn", 10000)])
    assert ledger_of(conn, payment_id) == {
        "available": 9625,
        "provider_balance": 9680,
        "fee_revenue": 375,
        "provider_cost": 320,
    }


def test_failure_recorded_again_after_a_lost_commit_is_no_error(conn: Connection, key_hash: bytes) -> None:
    pay(conn, key_hash, 2)
    batch, fence, events = claimed(conn, "submit")
    told = json.dumps([{"event_id": events[0], "error": "it did not work"}])
    for _ in range(2):
        assert one(conn, "select outbox.fail_events(%s, %s, %s)", batch, fence, told)
    assert conn.execute("select failures from outbox.retries").fetchall() == [(1,)]


def test_suspect_of_a_paused_handler_blocks_no_other_suspect(conn: Connection, key_hash: bytes) -> None:
    pay(conn, key_hash)
    claimed(conn, "submit")
    conn.execute("update outbox.batches set is_suspect = true, leased_until = now() - interval '1 second'")
    conn.execute("update outbox.handlers set paused_at = now() where handler = 'submit'")
    conn.execute(
        "insert into outbox.retries (handler, event_id, worker_deaths, due_at) values ('settle', 'evt_1', 2, now())"
    )
    assert claimed(conn, "settle")[2] == ["evt_1"]


def test_claim_of_an_event_written_in_the_same_transaction_is_not_taken_for_a_restore(
    conn: Connection, key_hash: bytes
) -> None:
    with conn.transaction():
        pay(conn, key_hash)
        conn.execute("select * from outbox.claim_batch('submit', 'w')")


def test_a_database_that_went_back_in_time_in_its_own_cluster_gets_a_new_restore_generation(
    conn: Connection, key_hash: bytes
) -> None:
    pay(conn, key_hash, 2)
    with conn.transaction():
        conn.execute("set local session_replication_role = replica")
        conn.execute("update outbox.events set xid = '1000000000000'")
    assert one(conn, "select outbox.begin_restore_generation('test')") == 2
    assert one(conn, "select outbox.begin_restore_generation('test')") == 2
    assert len(claimed(conn, "submit")[2]) == 2


def test_decline_and_expired_action_request_one_cancellation(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "action", "pi")])
    conn.execute("select surety.cancel_expired_actions(interval '-1 second')")
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


def test_concurrent_use_of_a_key_with_different_bodies_is_a_reuse(conn: Connection, key_hash: bytes) -> None:
    pay(conn, key_hash, reference="order-1")
    both = [
        request(key_hash, idempotency_key="one", reference="order-1"),
        request(key_hash, idempotency_key="one", reference="order-1"),
        request(key_hash, idempotency_key="one", reference="order-2", request_hash="01"),
    ]
    answers = [(answer["status"], answer["problem"], answer["detail"] is None) for answer in create(conn, both)]
    assert answers == [
        (409, "reference-taken", False),
        (409, "reference-taken", False),
        (422, "idempotency-key-reused", True),
    ]
    assert create(conn, both[2:])[0]["status"] == 201, "nothing took effect, so the key is free"


@pytest.mark.parametrize("kind", ["operator", "request", "denied", "webhook", "dead_letter", "step"])
def test_worker_cannot_write_audit_entries_of_other_actors(connect: Connect, kind: str) -> None:
    entry = {"kind": kind, "actor": "operator:boss", "outcome": "allowed", "version": 1, "to_state": "settled"}
    with pytest.raises(psycopg.DatabaseError) as refusal:
        connect("worker").execute("select audit.write_entries(%s)", (json.dumps([entry]),))
    assert refusal.value.sqlstate == "SU008"


def buffers(conn: Connection, query: str, *values: Any) -> int:
    conn.execute(query.encode(), values)  # what the catalog costs is read by then
    [plan] = one(conn, "explain (analyze, buffers, format json) " + query, *values)
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


def bodies(conn: Connection, key_hash: bytes, **asked: Any) -> list[str]:
    order = ("state", "status", "reference", "created_from", "created_before", "limit", "starting_after")
    values = [({"limit": 20} | asked).get(name) for name in order]
    body = one(conn, "select body from api.list_payments(%s, %s, %s, %s, %s, %s, %s, %s)", key_hash, *values)
    return [payment["id"] for payment in json.loads(body)["data"]]


def test_payment_page_cost_is_independent_of_other_merchants(conn: Connection, key_hash: bytes) -> None:
    mine = pay(conn, key_hash, 3, reference=None)
    [ordered] = pay(conn, key_hash, reference="order-1")
    _, other = add_merchant(conn)
    theirs = pay(conn, other, 4000)
    for analyzed in (False, True):
        if analyzed:
            conn.execute("analyze surety.payments")
        query = "select * from api.list_payments(%s, %s, null, %s, null, null, 20, %s)"
        assert buffers(conn, query, key_hash, None, None, None) < 200
        assert buffers(conn, query, key_hash, "failed", None, None) < 200
        assert buffers(conn, query, other, None, "order-1", None) < 200
        assert buffers(conn, query, other, None, None, sorted(theirs)[30]) < 400
    assert sorted(bodies(conn, key_hash)) == sorted([*mine, ordered])
    assert bodies(conn, key_hash, reference="order-1") == [ordered]


def test_every_filter_of_the_list_holds_alone_and_together(conn: Connection, key_hash: bytes) -> None:
    first, second, third = sorted(pay(conn, key_hash, 3))
    record(conn, [fact(second, "captured", "ch", 10000)])
    now = datetime.now(UTC)
    for asked, expected in (
        ({}, [third, second, first]),
        ({"limit": 2}, [third, second]),
        ({"starting_after": second}, [first]),
        ({"state": "confirmed"}, [second]),
        ({"status": "succeeded"}, [second]),
        ({"state": "confirmed", "status": "pending"}, []),
        ({"state": "confirmed", "starting_after": second}, []),
        ({"created_from": now - timedelta(hours=1)}, [third, second, first]),
        ({"created_from": now + timedelta(hours=1)}, []),
        ({"created_before": now + timedelta(hours=1), "limit": 1}, [third]),
        ({"created_before": now - timedelta(hours=1)}, []),
        ({"created_before": datetime(1960, 1, 1, tzinfo=UTC)}, []),
        ({"created_from": datetime(1960, 1, 1, tzinfo=UTC)}, [third, second, first]),
        ({"reference": "nobody's"}, []),
    ):
        assert bodies(conn, key_hash, **asked) == expected, asked


def test_internal_events_are_hidden_from_merchants(conn: Connection, key_hash: bytes) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "action", "pi"), fact(payment_id, "attempt_failed", "pi")])
    conn.execute("select surety.cancel_expired_actions(interval '-1 second')")
    body = json.loads(one(conn, "select body from api.list_events(%s, null, 20)", key_hash))
    assert {event["type"] for event in body["data"]} == {
        f"payment.{state}" for state in ("initiated", "submitting", "provider_submitted", "requires_action")
    }
    assert all(event["created_at"] and event["data"]["state"] for event in body["data"])


def test_concurrently_opened_accounts_are_opened_once(conn: Connection, database: str) -> None:
    currencies = [row[0] for row in conn.execute("select currency from surety.currencies order by currency")]
    start = threading.Barrier(6)

    def post(number: int) -> None:
        with psycopg.connect(harden(database, "deploy"), autocommit=True) as connection:
            for currency in currencies:
                cause = f"txn_{number}_{currency}"
                start.wait(timeout=30)
                connection.execute(
                    "select ledger.post(array[row(%s, 'foreign', null, null, 'stripe/', %s, 5, 0, 5, null, null, null,"
                    " null, null)::ledger.entry], now())",
                    (cause, currency),
                )

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(post, number) for number in range(6)]:
            done.result(timeout=60)
    assert one(conn, "select count(*) from ledger.accounts") == 2 * len(currencies)


@pytest.mark.parametrize("kind", ["canceled", "failed", "processing", "action", "attempt_failed"])
def test_second_intent_does_not_change_the_payment(conn: Connection, key_hash: bytes, kind: str) -> None:
    [payment_id] = pay(conn, key_hash, reference="order-1")
    record(conn, [fact(payment_id, "submitted", "pi")])
    told = record(conn, [fact(payment_id, "submitted", "orphan"), fact(payment_id, kind, "orphan")])
    assert told == ([] if kind in {"canceled", "failed"} else ["payment.orphan_found"])
    state, intent = conn.execute("select state, provider_id from surety.payments").fetchall()[0]
    assert (state, intent) == ("provider_submitted", f"pi_{payment_id[-12:]}")
    assert one(conn, "select count(*) from surety.payment_references") == 1
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    assert state_of(conn, payment_id) == "confirmed"
    assert not violations(conn)


def test_handler_receives_the_events_of_its_deployed_code(conn: Connection, database: str) -> None:
    query = "select event_types, batch_size from outbox.list_handlers() where handler = 'cancel'"
    [(wanted, _)] = conn.execute(query).fetchall()
    conn.execute("update outbox.handlers set batch_size = 50")
    conn.execute(
        "update outbox.handler_events set event_type = 'payment.failed' where event_type = 'payment.action_overdue'"
    )
    deploy(database, force=True)
    assert len(wanted) > 1
    assert conn.execute(query).fetchone() == (wanted, 50)
