"""Changes that no webhook brings and no handler asks for are found by the periodic jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.polling import poll_balance_transactions, poll_events, poll_unfinished
from jobs.worker import Worker
from tests.support.payments import Connection, add_merchant, command, fact, ledger_of, pay, record, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, in_process_worker, run_until_idle, shorten_delays, watch_requests


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("lost_webhooks"), "--hang-seconds=1", "--payout-seconds=0") as sandbox:
        yield sandbox


@pytest.fixture
def key_hash(conn: Connection) -> bytes:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    return add_merchant(conn)[1]


async def charged(conn: Connection, worker: Worker, key_hash: bytes) -> tuple[str, str]:
    """A payment that was charged, and its intent."""
    [payment_id] = pay(conn, key_hash)
    await run_until_idle(worker, "submit", "confirm", "expect_settlement")
    await poll_balance_transactions(worker)
    [(intent,)] = conn.execute("select provider_id from surety.payments where id = %s", (payment_id,)).fetchall()
    return payment_id, intent


def give_up(conn: Connection, handler: str) -> None:
    """What a handler would try again later is a dead letter now."""
    query = "select outbox.dead_letter_events(%s, array_agg(event_id), 'it failed', now()) from outbox.retries"
    conn.execute(query, (handler,))
    assert one(conn, "select count(*) from outbox.dead_letters where closed_at is null") == 1


def one(conn: Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query.encode(), values or None).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


async def test_refund_and_dispute_without_webhooks_are_polled(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        refunded, intent = await charged(conn, worker, key_hash)
        disputed, other = await charged(conn, worker, key_hash)
        sandbox.control("refunds", {"payment_intent": intent, "amount": 4000})
        sandbox.control("disputes", {"payment_intent": other})
        await poll_events(worker)
        await run_until_idle(worker, "apply_webhooks")
        assert state_of(conn, refunded) == "partially_refunded"
        assert state_of(conn, disputed) == "disputed"
        await poll_events(worker)
        heard, events = one(conn, "select count(*), count(distinct event_id) from surety.provider_events")
        assert heard == events, "what was read is not read again"
        await poll_balance_transactions(worker)
    assert ledger_of(conn)["disputed"] == 10000
    result = [row[0] for row in conn.execute("select summary from surety.trace_payment(%s)", (refunded,))]
    assert any("from the list of events" in line for line in result)
    assert not any("signature" in line for line in result), "listed events bear no signature"
    assert one(conn, "select count(*) from audit.entries where kind = 'webhook' and outcome = 'listed'") == heard
    assert not violations(conn)


async def test_warning_of_fraud_without_webhooks_is_polled_and_closed_by_a_refund(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        payment_id, intent = await charged(conn, worker, key_hash)
        sandbox.control("fraud-warnings", {"payment_intent": intent})
        await poll_events(worker)
        await run_until_idle(worker, "apply_webhooks")
        query = "select fraud_warning - 'at' from surety.payments"
        assert one(conn, query) == {"type": "misc", "actionable": True}
        sandbox.control("refunds", {"payment_intent": intent})
        await poll_events(worker)
        await run_until_idle(worker, "apply_webhooks")
        assert one(conn, query) == {"type": "misc", "actionable": False}
    summaries = [row[0] for row in conn.execute("select summary from surety.trace_payment(%s)", (payment_id,))]
    types = [line.split()[0] for line in summaries if "fraud warning" in line]
    assert types == ["radar.early_fraud_warning.created", "radar.early_fraud_warning.updated"]
    assert not violations(conn)


async def test_late_refund_failure_without_a_webhook_is_polled(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        payment_id, _ = await charged(conn, worker, key_hash)
        assert command(conn, "create_refund", key_hash, payment_id=payment_id)["status"] == 201
        await run_until_idle(worker, "refund")
        assert state_of(conn, payment_id) == "refunded"
        sandbox.control(f"refunds/{one(conn, 'select provider_id from surety.refunds')}", {"outcome": "failed"})
        await poll_events(worker)
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) in {"confirmed", "settled"}
    assert one(conn, "select state from surety.refunds") == "failed"


async def test_refunds_whose_events_are_listed_no_longer_are_known_by_their_balance_transactions(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        payment_id, intent = await charged(conn, worker, key_hash)
        made = sandbox.control("refunds", {"payment_intent": intent, "amount": 4000})["id"]
        await poll_balance_transactions(worker)
        assert state_of(conn, payment_id) == "partially_refunded"
        assert command(conn, "create_refund", key_hash, payment_id=payment_id)["status"] == 201
        await run_until_idle(worker, "refund")
        assert state_of(conn, payment_id) == "refunded"
        for (refund,) in conn.execute("select provider_id from surety.refunds").fetchall():
            sandbox.control(f"refunds/{refund}", {"outcome": "failed"})
        await poll_balance_transactions(worker)
    assert state_of(conn, payment_id) in {"confirmed", "settled"}
    refunds = conn.execute("select provider_id = %s, state from surety.refunds order by id", (made,)).fetchall()
    assert refunds == [(True, "failed"), (False, "failed")]
    assert "reserved_for_refunds" not in ledger_of(conn)
    assert not violations(conn)


async def test_ended_refund_and_dispute_are_fetched_again_at_an_operator_s_word(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        payment_id, intent = await charged(conn, worker, key_hash)
        refund = sandbox.control("refunds", {"payment_intent": intent, "amount": 4000})["id"]
        dispute = sandbox.control("disputes", {"payment_intent": intent, "amount": 5000})["id"]
        sandbox.control(f"disputes/{dispute}", {"outcome": "lost"})
        await poll_events(worker)
        await run_until_idle(worker, "apply_webhooks")
        assert state_of(conn, payment_id) == "reversed"
        sandbox.control(f"refunds/{refund}", {"outcome": "failed"})
        sandbox.control(f"disputes/{dispute}", {"outcome": "reinstated"})
        for table in ("payments", "refunds", "disputes"):
            conn.execute(f"update surety.{table} set poll_at = now()".encode())
        await poll_unfinished(worker)
        assert one(conn, "select r.poll_at, d.poll_at from surety.refunds as r, surety.disputes as d") == (None, None)
    assert one(conn, "select state from surety.refunds") == "failed"
    assert state_of(conn, payment_id) in {"confirmed", "settled"}


async def test_polled_event_and_its_webhook_are_stored_once(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        await charged(conn, worker, key_hash)
        await poll_events(worker)
        heard = conn.execute("select event_id, type, body from surety.provider_events order by id").fetchall()
        assert {type for _, type, _ in heard} >= {"payment_intent.created", "payment_intent.succeeded"}
        webhooks = [
            {
                "n": number, "provider": "stripe", "account": "", "livemode": False, "event_id": event, "type": type,
                "headers": {"stripe-signature": "t=1"}, "body": body,
            }
            for number, (event, type, body) in enumerate(heard)
        ]  # fmt: skip
        result = conn.execute("select is_new from surety.receive_webhooks(%s)", (json.dumps(webhooks),)).fetchall()
    assert {is_new for (is_new,) in result} == {False}


async def test_polled_events_are_stored_without_client_secrets(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url) as worker:
        await charged(conn, worker, key_hash)
        await poll_events(worker)
    bodies = conn.execute("select body from surety.provider_events where type like 'payment_intent.%'").fetchall()
    assert bodies
    for (body,) in bodies:
        assert json.loads(body)["data"]["object"]["client_secret"] is None
        assert "_secret_" not in body


async def test_interrupted_list_is_read_again_from_its_start(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        await charged(conn, worker, key_hash)
        sandbox.order("events.list", "error_500_before")
        await poll_events(worker)
        assert (
            one(conn, "select count(*) from surety.poll_cursors where polled_to is not null and list = 'events'") == 0
        )
        await poll_events(worker)
    assert one(conn, "select count(*) from surety.poll_cursors where polled_to is not null and list = 'events'") == 1
    assert one(conn, "select count(*) from surety.provider_events") > 0


async def test_events_that_are_listed_no_more_are_a_critical_discrepancy(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    move_back = "update surety.poll_cursors set polled_to = polled_to - %s::interval where list = 'events'"
    query = "select subject, severity from surety.discrepancies where kind = 'unrecorded'"
    async with in_process_worker(database, sandbox.url) as worker:
        await poll_events(worker)
        conn.execute(move_back, ("29 days",))
        await poll_events(worker)
        assert not conn.execute(query).fetchall()
        conn.execute(move_back, ("31 days",))
        await poll_events(worker)
        await poll_events(worker)
    [(subject, severity)] = conn.execute(query).fetchall()
    assert (subject.split(":")[:2], severity) == (["stripe/", "events"], "critical")


@pytest.mark.parametrize("fault", ["timeout_after", "timeout_before"])
async def test_dead_lettered_submission_is_looked_up_while_unfinished(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes, fault: str
) -> None:
    [payment_id] = pay(conn, key_hash)
    async with in_process_worker(database, sandbox.url, judged=False, timeout_seconds=0.3) as worker:
        sandbox.order("payment_intents.create", fault, match=payment_id)
        await run_until_idle(worker, "submit")
        give_up(conn, "submit")
        conn.execute("update surety.payments set poll_at = now()")
        await poll_unfinished(worker)
        if fault == "timeout_before":
            assert state_of(conn, payment_id) == "submitting"
            poll_count, seconds = one(
                conn, "select poll_count, extract(epoch from poll_at - now())::int from surety.payments"
            )
            assert poll_count == 1
            assert seconds > 300
            assert one(conn, "select outcome from audit.entries where kind = 'answer' order by id desc") == "absent"
            assert one(conn, "select count(*) from outbox.dead_letters where closed_at is null") == 1
            return
        assert state_of(conn, payment_id) == "provider_submitted"
        await run_until_idle(worker, "confirm", "expect_settlement")
        for _ in range(200):
            await poll_balance_transactions(worker)
            if state_of(conn, payment_id) == "settled":
                break
            await asyncio.sleep(0.02)
    assert state_of(conn, payment_id) == "settled"
    assert one(conn, "select closed_as from outbox.dead_letters") == "resolved"
    assert not violations(conn)


async def test_lookups_of_many_submissions_share_one_list_request(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    pay(conn, key_hash, 40)
    [batch] = conn.execute("select batch_id, fence from outbox.claim_batch('submit', 'worker:dead')").fetchall()
    conn.execute("select from surety.begin_calls(%s, %s, 'create', 'worker:dead')", batch)
    conn.execute("update surety.payments set poll_at = now()")
    async with in_process_worker(database, sandbox.url) as worker:
        requests = watch_requests(worker)
        await poll_unfinished(worker)
    assert one(conn, "select count(*) from audit.entries where kind = 'answer' and outcome = 'absent'") == 40
    assert [request.target.partition("?")[0] for request in requests].count("/v1/payment_intents") == 1


async def test_intent_that_the_provider_does_not_have_is_a_critical_discrepancy(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "submitted", "pi", provider_id="pi_absent")])
    conn.execute("update surety.payments set poll_at = now()")
    async with in_process_worker(database, sandbox.url) as worker:
        await poll_unfinished(worker)
    found = conn.execute("select kind, subject, payment_id, severity from surety.discrepancies").fetchall()
    assert found == [("missing_at_provider", f"pi_{payment_id[-12:]}", payment_id, "critical")]
    assert state_of(conn, payment_id) == "provider_submitted"


async def test_balance_transaction_that_can_not_be_stored_is_a_critical_discrepancy(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    """It alone is left out; the others on its page are booked."""
    conn.execute("alter table surety.facts add constraint no_money check (kind <> 'money' or amount_minor <> 1234)")
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        pay(conn, key_hash, amount=1234)
        await charged(conn, worker, key_hash)
        charges = {row[0] for row in conn.execute("select object_id from surety.facts where kind = 'captured'")}
        listed = ("/v1/balance_transactions", {"limit": 100})
        eventually(lambda: charges <= {line["source"] for line in sandbox.get(*listed)["data"]})
        await poll_balance_transactions(worker)
    [(kind, subject, severity)] = conn.execute("select kind, subject, severity from surety.discrepancies")
    assert (kind, subject[:4], severity) == ("unrecorded", "txn_", "critical")
    assert one(conn, "select count(*) from surety.facts where kind = 'money'") == 1


async def test_dead_lettered_refund_is_looked_up_among_refunds_of_its_payment(
    conn: Connection, database: str, sandbox: SandboxProcess, key_hash: bytes
) -> None:
    async with in_process_worker(database, sandbox.url, judged=False, timeout_seconds=0.3) as worker:
        payment_id, _ = await charged(conn, worker, key_hash)
        made = command(conn, "create_refund", key_hash, payment_id=payment_id)["body"]["id"]
        sandbox.order("refunds.create", "timeout_after", match=made)
        await run_until_idle(worker, "refund")
        give_up(conn, "refund")
        conn.execute("update surety.refunds set poll_at = now()")
        await poll_unfinished(worker)
    assert state_of(conn, payment_id) == "refunded"
    assert one(conn, "select state from surety.refunds") == "succeeded"
    assert one(conn, "select closed_as from outbox.dead_letters") == "resolved"
    assert not violations(conn)
