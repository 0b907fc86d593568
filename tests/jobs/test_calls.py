"""The loop for calls to the provider: what a verdict of surety.begin_calls leads to, and how results are recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from jobs.drain import claim_batch
from jobs.handlers.calls import ProviderCall, make_call, record_event_results
from jobs.handlers.payments import CREATE
from jobs.recorder import CallResult
from jobs.stripe.errors import ProviderOutage
from tests.support.payments import Connection, add_merchant, create, fact, pay, request, state_of
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import attempts, in_process_worker, run_until_idle


@pytest.fixture
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("calls")) as sandbox:
        yield sandbox


async def test_unknown_verdict_sends_nothing(conn: Connection, database: str, sandbox: SandboxProcess) -> None:
    [(source,)] = conn.execute("select pg_get_functiondef('surety.plan_payment_calls'::regproc)").fetchall()
    assert "then 'send'" in source
    conn.execute(source.replace("then 'send'", "then 'guess'").encode())
    create(conn, [request(add_merchant(conn)[1])])
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
    assert sandbox.get("/v1/payment_intents")["data"] == []
    [(handler, failures, [error])] = attempts(conn)
    assert (handler, failures) == ("submit", 1)
    assert "guess" in error


async def test_call_behind_a_circuit_that_opened_is_not_sent_and_not_counted(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    async with in_process_worker(database, sandbox.url) as worker:
        batch = await claim_batch(worker, "submit")
        assert batch is not None
        call = ProviderCall(
            event_id=batch.event_ids[0], subject_id=payment_id, payment_id=payment_id, account="", provider_id=None,
            amount_minor=10000, currency="usd", livemode=False, verdict="send", operation="create",
            idempotency_key="key", request={}, first_sent_at=None, last_sent_at=None,
            send_number=None,
        )  # fmt: skip
        # The circuit is closed again; the worker learns that by its next report.
        worker.circuit_breaker.blocked = frozenset({""})
        results = await make_call(CREATE, worker, batch, call)
        await record_event_results(worker, batch, results)
    assert sandbox.get("/v1/payment_intents")["data"] == []
    assert attempts(conn) == [("submit", 0, ["not sent: the account's circuit is open"])]


def captured(payment_id: str) -> CallResult:
    return {"facts": [fact(payment_id, "captured", "ch", 10000)]}


async def test_result_whose_caller_is_canceled_is_recorded_before_the_worker_ends(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    first, second = pay(conn, add_merchant(conn)[1], 2)
    async with in_process_worker(database, sandbox.url) as worker:
        await worker.recorder.record([captured(first)])
        # It waits for others now.
        recording = asyncio.create_task(worker.recorder.record([captured(second)]))
        await asyncio.sleep(0)
        recording.cancel()
    assert [state_of(conn, payment_id) for payment_id in (first, second)] == ["confirmed"] * 2


async def test_result_that_can_not_even_be_substituted_is_an_error_of_its_caller_alone(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    first, second, third = pay(conn, add_merchant(conn)[1], 3)
    nul = captured(first)
    nul["facts"][0]["object_id"] = "ch_\0"
    async with in_process_worker(database, sandbox.url) as worker:
        await worker.recorder.record([captured(second)])
        ends = await asyncio.gather(
            worker.recorder.record([nul]), worker.recorder.record([captured(third)]), return_exceptions=True
        )
    assert isinstance(ends[0], psycopg.DataError)
    assert ends[1] == []
    assert [state_of(conn, one) for one in (first, second, third)] == ["initiated", "confirmed", "confirmed"]


async def test_result_is_recorded_once_even_if_no_handler_can_be_scheduled(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    conn.execute("revoke execute on function outbox.schedule_handlers from surety_worker")
    async with in_process_worker(database, sandbox.url) as worker:
        assert await worker.recorder.record([captured(payment_id)]) == []
    assert state_of(conn, payment_id) == "confirmed"
    assert conn.execute("select * from surety.discrepancies").fetchall() == []


async def test_calls_that_the_database_did_not_take_are_reported_again(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    report = "execute on function surety.count_call_results"
    async with in_process_worker(database, sandbox.url) as worker:
        breaker = worker.circuit_breaker
        conn.execute(f"revoke {report} from surety_worker".encode())
        for error in (None, ProviderOutage("no answer"), ProviderOutage("no answer")):
            breaker.count_call("", error, is_command=True)
        with pytest.raises(psycopg.Error):
            await breaker.report_and_probe()
        conn.execute(f"grant {report} to surety_worker".encode())
        breaker.count_call("", ProviderOutage("no answer"), is_command=True)
        await breaker.report_and_probe()
    query = "select answered, failed, consecutive_failures, answered_at is null from surety.circuit_breakers"
    assert conn.execute(query).fetchall() == [(1, 3, 3, False)]
