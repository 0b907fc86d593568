"""The rail to Stripe, against the sandbox: whatever goes wrong on the way, a payment is charged once or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from jobs.stripe.shown import METHOD_UNKNOWN
from tests.support.payments import Connection, add_merchant, command, path_of, pay, state_of, violations
from tests.support.sandbox_process import SandboxProcess
from tests.support.workers import (
    NO_AUTOMATIC_RETRY,
    attempts,
    due,
    in_process_worker,
    run_until_idle,
    shorten_delays,
    watch_requests,
)

PIPELINE = ("submit", "confirm", "cancel")


def charges(sandbox: SandboxProcess, payment_id: str) -> int:
    """Successful charges of one payment, by the sandbox's own memory."""
    return sum(charge["metadata"]["surety_payment"] == payment_id for charge in sandbox.control("charges"))


def intents(sandbox: SandboxProcess, payment_id: str) -> list[dict[str, Any]]:
    """Every intent that was made for one payment."""
    page = sandbox.get("/v1/payment_intents", {"limit": 100})["data"]
    return [intent for intent in page if intent["metadata"].get("surety_payment") == payment_id]


async def test_a_payment_is_created_unconfirmed_then_confirmed_by_id(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment(description="a book", statement_descriptor_suffix="BOOKS")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        assert state_of(conn, payment_id) == "provider_submitted"
        [intent] = intents(sandbox, payment_id)
        assert (intent["status"], intent["description"]) == ("requires_confirmation", "a book")
        await run_until_idle(worker, "confirm")
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "confirmed"]
    assert charges(sandbox, payment_id) == 1
    query = "select kind, outcome, snapshot ->> 'operation', duration_ms > 0 from audit.entries"
    result = conn.execute(query + " where kind in ('call', 'answer') order by id").fetchall()
    assert result == [
        ("call", "sent", "create", None),
        ("answer", "answered", "create", True),
        ("call", "sent", "confirm", None),
        ("answer", "answered", "confirm", True),
    ]


OPERATIONS = {"submit": "payment_intents.create", "confirm": "payment_intents.confirm"}
# The fault, whether it may have happened, what the attempt is remembered by.
FAULTS = {
    "timeout_before": "no answer within 1 s",
    "timeout_after": "no answer within 1 s",
    "reset": "no answer: ",
    "error_500_before": "Stripe 500: ",
    "error_500_after": "Stripe 500: ",
    "garbage_200": "Stripe 200: an answer that makes no sense",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("handler", OPERATIONS)
async def test_unknown_outcome_is_never_charged_twice(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], handler: str, fault: str
) -> None:
    payment_id = payment()
    sandbox.order(OPERATIONS[handler], fault, match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        await run_until_idle(worker, "submit")
        await run_until_idle(worker, "confirm")
        [(failed, failures, [error])] = attempts(conn)
        assert (failed, failures) == (handler, 1)
        assert error.startswith(FAULTS[fault])
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    # Who asked may have seen its balance transaction as well.
    assert state_of(conn, payment_id) in {"confirmed", "settled"}
    assert charges(sandbox, payment_id) == 1
    assert len(intents(sandbox, payment_id)) == 1
    assert attempts(conn) == []
    assert not violations(conn)


@pytest.mark.parametrize("fault", ["timeout_before", "timeout_after", "error_500_before", "error_500_after"])
async def test_cancellation_of_unknown_outcome_is_looked_up(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], fault: str
) -> None:
    payment_id = payment("pm_card_visa_chargeDeclined")
    sandbox.order("payment_intents.cancel", fault, match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        await run_until_idle(worker, *PIPELINE)
        assert state_of(conn, payment_id) == "provider_submitted"
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert state_of(conn, payment_id) == "failed"
    assert [intent["status"] for intent in intents(sandbox, payment_id)] == ["canceled"]


@pytest.mark.parametrize("fault", ["conflict_409", "rate_limit_429"])
@pytest.mark.parametrize("handler", OPERATIONS)
async def test_rate_limit_response_is_not_counted_as_a_failure(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], handler: str, fault: str
) -> None:
    payment_id = payment()
    sandbox.order(OPERATIONS[handler], fault, match=payment_id, times=5)
    query = "select failures, due_at - (attempts -> -1 ->> 'at')::timestamptz from outbox.retries"
    async with in_process_worker(database, sandbox.url) as worker:
        for turn in range(5):
            await run_until_idle(worker, *PIPELINE)
            [(failures, wait)] = conn.execute(query).fetchall()
            assert failures == 0
            assert wait.total_seconds() == pytest.approx(2**turn, abs=0.01)
            due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert state_of(conn, payment_id) == "confirmed"
    assert charges(sandbox, payment_id) == 1


@pytest.mark.parametrize("fault", ["timeout_before", "timeout_after"])
async def test_list_is_read_before_another_intent_is_created_after_23_hours(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], fault: str
) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    payment_id = payment()
    sandbox.order("payment_intents.create", fault, match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        await run_until_idle(worker, "submit")
        conn.execute("insert into surety.clock (ahead) values ('23 hours 1 minute')")
        await run_until_idle(worker, "submit")
        asked = conn.execute("select count(*) from audit.entries where outcome = 'asked'").fetchone()
        assert asked == (1,)
        assert state_of(conn, payment_id) == "provider_submitted"
        await run_until_idle(worker, "confirm")
    row = conn.execute("select idempotency_key from surety.calls where operation = 'create'").fetchone()
    key = f"{payment_id}:create"
    assert row == (key if fault == "timeout_after" else f"{key}:2",)
    assert len(intents(sandbox, payment_id)) == 1
    assert charges(sandbox, payment_id) == 1


async def test_same_request_is_sent_under_the_same_key_within_23_hours(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    payment_id = payment()
    sandbox.order("payment_intents.create", "timeout_after", match=payment_id)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        requests = watch_requests(worker)
        await run_until_idle(worker, "submit")
        conn.execute("insert into surety.clock (ahead) values ('22 hours 58 minutes')")
        await run_until_idle(worker, "submit")
    sent = [request for request in requests if request.method == "POST"]
    assert [request.headers["Idempotency-Key"] for request in sent] == [f"{payment_id}:create"] * 2
    assert sent[0] == sent[1]
    assert state_of(conn, payment_id) == "provider_submitted"


async def test_a_decline_cancels_the_intent_before_the_payment_has_failed(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment("pm_card_visa_chargeDeclinedInsufficientFunds")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit", "confirm")
        assert state_of(conn, payment_id) == "provider_submitted"
        await run_until_idle(worker, "cancel")
    assert state_of(conn, payment_id) == "failed"
    failure = {
        "code": "card_declined",
        "decline_code": "insufficient_funds",
        "message": "Your card has insufficient funds.",
    }
    assert conn.execute("select failure from surety.payments").fetchone() == (failure,)
    assert [intent["status"] for intent in intents(sandbox, payment_id)] == ["canceled"]
    assert charges(sandbox, payment_id) == 0
    assert attempts(conn) == []


async def test_a_refusal_of_the_card_itself_fails_the_payment_at_once(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    payment_id = payment("pm_of_another_account")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
    assert path_of(conn, payment_id) == ["initiated", "submitting", "failed"]
    [(failure,)] = conn.execute("select failure from surety.payments").fetchall()
    assert failure == {"code": "resource_missing", "message": METHOD_UNKNOWN}
    assert attempts(conn) == []


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("create", ["initiated", "submitting", "failed"]),
        ("confirm", ["initiated", "submitting", "provider_submitted", "failed"]),
    ],
)
async def test_refusal_without_code_or_parameter_ends_the_payment_with_the_provider_s_words(
    conn: Connection, database: str, sandbox: SandboxProcess, operation: str, path: list[str]
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, reference="order 1")
    sandbox.order(f"payment_intents.{operation}", "refused_400")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
    assert path_of(conn, payment_id) == path
    [(failure,)] = conn.execute("select failure from surety.payments").fetchall()
    assert failure == {"code": "invalid_request_error", "message": "This request cannot be processed."}
    assert attempts(conn) == []
    assert charges(sandbox, payment_id) == 0
    [again] = pay(conn, key_hash, reference="order 1")
    assert state_of(conn, again) == "initiated", "the reference can be used again"


async def test_refusal_of_a_refund_without_code_or_parameter_releases_its_reserve(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, method_token="pm_card_visa")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        refund = command(conn, "create_refund", key_hash, payment_id=payment_id, amount=1000)
        assert refund["problem"] is None, refund
        sandbox.order("refunds.create", "refused_400")
        await run_until_idle(worker, "refund")
    refunds = conn.execute("select state, failure from surety.refunds").fetchall()
    assert refunds == [("failed", {"code": "invalid_request_error", "message": "This request cannot be processed."})]
    assert conn.execute("select refund_pending_minor from surety.payments").fetchall() == [(0,)]
    assert attempts(conn) == []
    assert violations(conn) == {}


@pytest.mark.parametrize("operation", ["create", "list"])
async def test_an_error_that_proves_nothing_is_dead_lettered_and_the_payment_waits(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str], operation: str
) -> None:
    payment_id = payment()
    if operation == "list":
        faults = [
            {"operation": "payment_intents.create", "fault": "error_500_after"},
            {"operation": "payment_intents.list", "fault": "refused_400", "times": 10},
        ]
        sandbox.control("faults", {"next": faults})
    else:
        sandbox.order("payment_intents.create", "reused_key_400", times=10)
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        for _ in range(4):
            await run_until_idle(worker, *PIPELINE)
            due(conn)
    [(reason,)] = conn.execute("select reason from outbox.dead_letters").fetchall()
    assert reason == "it failed 3 times"
    assert state_of(conn, payment_id) == "submitting"


async def test_slow_call_does_not_delay_results_of_concurrent_calls(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    slow = payment()
    others = [payment() for _ in range(40)]
    sandbox.order("payment_intents.create", "timeout_before", match=slow)
    query = "select count(*) from surety.payments where state = 'provider_submitted'"
    async with in_process_worker(database, sandbox.url, judged=False, timeout_seconds=30) as worker:
        working = asyncio.create_task(run_until_idle(worker, "submit"))
        while conn.execute(query).fetchone() != (len(others),):
            assert not working.done(), "the slow call was waited for"
            await asyncio.sleep(0.005)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    assert state_of(conn, slow) == "submitting"
