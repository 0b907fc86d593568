"""A provider's outage is not the event's failure: circuits open, hold, probe and close without an operator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs.database import WORKER_CONNECTIONS_MAX
from jobs.polling import poll_unfinished
from jobs.stripe.connections import NoAnswer, OutgoingRequest, RawResponse, RequestSender
from jobs.stripe.errors import ProviderOutage
from jobs.worker import Worker
from tests.support.payments import Connection, add_merchant, pay, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import (
    NO_AUTOMATIC_RETRY,
    attempts,
    due,
    in_process_worker,
    run_until_idle,
    shorten_delays,
    wait_for_worker,
    watch_requests,
    worker_process,
)

OUT = {"profile": {"error_500_before": 1.0, "reads": 1.0}}
WELL = {"profile": "none", "next": []}
ENDED = ("confirmed", "settled")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("circuit"), "--hang-seconds=60") as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared: SandboxProcess) -> Iterator[SandboxProcess]:
    """A provider that is well, before and after."""
    yield shared
    shared.control("faults", WELL)


@pytest.fixture
def shop(conn: Connection) -> Callable[..., list[str]]:
    """Makes payments, of a merchant at the platform's own account unless another's key is given."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    conn.execute("update surety.environment set kind = 'test'")
    _, own = add_merchant(conn)
    return lambda count=1, key=own, **fields: pay(conn, key, count, **fields)


def pass_time(conn: Connection, interval: str) -> None:
    """The database's clock goes on by so much."""
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update"
        " set ahead = clock.ahead + excluded.ahead",
        (interval,),
    )


def opened(conn: Connection) -> set[str]:
    """Accounts whose circuit is open."""
    return {row[0] for row in conn.execute("select account from surety.circuit_status() where state = 'unreachable'")}


def transitions(conn: Connection) -> list[tuple[str, str]]:
    """The audit entries of circuits: the account and the change."""
    return conn.execute(
        "select snapshot ->> 'account', outcome from audit.entries where kind = 'system' and outcome like 'circuit %'"
        " order by id"
    ).fetchall()


def count(conn: Connection, query: str, *values: Any) -> int:
    row = conn.execute(query.encode(), values or None).fetchone()
    assert row is not None
    return int(row[0])


def calls_made(sandbox: SandboxProcess) -> int:
    """Requests that the provider has failed so far."""
    return sum(row["count"] for row in sandbox.control("faults")["injected"])


async def later(conn: Connection, worker: Worker, interval: str) -> None:
    """Time passes, and the worker does what it does every second."""
    pass_time(conn, interval)
    await worker.circuit_breaker.report_and_probe()
    await run_until_idle(worker)


async def test_ten_minutes_without_the_provider_need_no_operator(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(30)
    async with in_process_worker(database, sandbox.url) as worker:
        sandbox.control("faults", OUT)
        await run_until_idle(worker)
        assert opened(conn) == {""}
        tried = calls_made(sandbox)
        for _ in range(10):
            payments += shop(2)
            await later(conn, worker, "1 minute")
            assert opened(conn) == {""}
        assert calls_made(sandbox) - tried < 20, "only probes were made"
        assert count(conn, "select count(*) from outbox.retries") <= 30, "the rest was not even claimed"
        sandbox.control("faults", WELL)
        await later(conn, worker, "1 minute")
        await run_until_idle(worker)
    assert transitions(conn) == [("", "circuit opened"), ("", "circuit closed")]
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)
    assert count(conn, "select count(*) from outbox.dead_letters") == 0
    assert count(conn, "select count(*) from outbox.retries") == 0
    assert sandbox.control("charges/summary?metadata_key=surety_payment")["double"] == []
    assert not violations(conn)


@pytest.mark.parametrize("fault", ["timeout_after", "reset", "error_500_after", "garbage_200"])
async def test_outage_failures_are_not_counted(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]], fault: str
) -> None:
    payments = shop(8)
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        sandbox.control("faults", {"profile": {fault: 1.0, "reads": 1.0}})
        for _ in range(6):
            await later(conn, worker, "1 hour")
            assert [failures for _, failures, _ in attempts(conn)] == [0] * 8
        sandbox.control("faults", WELL)
        for _ in range(3):
            await later(conn, worker, "1 hour")
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)
    assert sandbox.control("charges/summary?metadata_key=surety_payment")["double"] == []


async def test_breaker_stops_only_its_account(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    _, key = add_merchant(conn, account="acct_out")
    cut_off = shop(5, key)
    fault = "error_500_before"
    sandbox.control(
        "faults",
        {
            "next": [
                {"operation": "balance.retrieve", "fault": fault, "times": 1000},
                *({"operation": "payment_intents.create", "fault": fault, "times": 9, "match": one} for one in cut_off),
            ]
        },
    )
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert opened(conn) == {"acct_out"}
        cut_off += shop(5, key)
        others = shop(20)
        await run_until_idle(worker)
        assert {state_of(conn, payment_id) for payment_id in others} <= set(ENDED)
        assert {state_of(conn, payment_id) for payment_id in cut_off} == {"submitting", "initiated"}
        assert opened(conn) == {"acct_out"}
        [(held,)] = conn.execute("select held from surety.circuit_status() where account = 'acct_out'").fetchall()
        assert held == 10
        before = count(conn, "select count(*) from audit.entries")
        assert await run_until_idle(worker) == 0, "held events are not claimed again"
        assert count(conn, "select count(*) from audit.entries") == before
        sandbox.control("faults", WELL)
        await later(conn, worker, "10 seconds")
    assert {state_of(conn, payment_id) for payment_id in cut_off} <= set(ENDED)
    assert attempts(conn) == []


async def test_impossible_payment_is_dead_lettered_after_three_failures_and_opens_no_breaker(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(20)
    bad = payments[7]
    always = {"operation": "payment_intents.create", "fault": "error_500_before", "times": 99, "match": bad}
    sandbox.control("faults", {"next": [always]})
    async with in_process_worker(database, sandbox.url) as worker:
        for failures in (1, 2):
            await run_until_idle(worker)
            assert [row[:2] for row in attempts(conn)] == [("submit", failures)]
            due(conn)
        await run_until_idle(worker)
    assert conn.execute("select payment_id from outbox.dead_letters").fetchall() == [(bad,)]
    assert {state_of(conn, payment_id) for payment_id in payments if payment_id != bad} <= set(ENDED)
    assert opened(conn) == set()
    retried = "select outcome, snapshot ->> 'failures' from audit.entries where kind = 'retry' and payment_id = %s"
    assert conn.execute(retried + " order by id", (bad,)).fetchall() == [("failed", str(n)) for n in (1, 2, 3)]


class ImpatientSender:
    """Gives up soon on the requests about one payment. A worker that gave up on all would fail on a busy machine."""

    def __init__(self, sender: RequestSender, payment_id: str) -> None:
        self.sender = sender
        self.payment_id = payment_id.encode()

    async def send(self, request: OutgoingRequest) -> RawResponse:
        """Send it once. Raises NoAnswer."""
        try:
            async with asyncio.timeout(0.5 if self.payment_id in request.content else None):
                return await self.sender.send(request)
        except TimeoutError:
            raise NoAnswer("no patience") from None


@pytest.mark.parametrize("fault", ["timeout_after", "timeout_before"])
async def test_a_dead_letter_that_is_replayed_after_25_hours_makes_no_second_charge(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]], fault: str
) -> None:
    payments = shop(10)
    bad = payments[3]
    unknown = "select payment_id from surety.calls where operation = 'create' and coalesce(status, 500) >= 500"
    never = {"operation": "payment_intents.create", "fault": fault, "times": 99, "match": bad}
    sandbox.control("faults", {"next": [never]})

    async with in_process_worker(database, sandbox.url, timeout_seconds=30) as worker:
        patient = worker.stripe.http.sender
        worker.stripe.http.sender = ImpatientSender(patient, bad)
        await run_until_idle(worker)
        assert conn.execute(unknown).fetchall() == [(bad,)]
        for _ in range(2):
            due(conn)
            await run_until_idle(worker)
        assert conn.execute(unknown).fetchall() == [(bad,)]
        sandbox.control("faults", WELL)
        worker.stripe.http.sender = patient
        pass_time(conn, "25 hours")
        sandbox.control("clock", {"advance": 25 * 3600})
        replay = (
            "select outcome from outbox.dead_letters as d, outbox.replay_dead_letter(d.id, 'me', 'it is well again')"
        )
        assert conn.execute(replay).fetchall() == [("replayed",)]
        await run_until_idle(worker)
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)
    made = [charge["metadata"]["surety_payment"] for charge in sandbox.control("charges")]
    assert made.count(bad) == 1
    assert conn.execute(unknown).fetchall() == []


async def test_lookups_of_many_payments_share_one_list_request(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(20)
    async with in_process_worker(database, sandbox.url) as worker:
        requests = watch_requests(worker)
        sandbox.control("faults", {"profile": {"error_500_after": 0.5, "error_500_before": 0.5}})
        await run_until_idle(worker, "submit")
        sandbox.control("faults", WELL)
        for _ in range(3):
            await later(conn, worker, "1 hour")
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)
    lists = [request for request in requests if request.target.startswith("/v1/payment_intents?")]
    assert 1 <= len(lists) <= 4
    assert sandbox.control("charges/summary?metadata_key=surety_payment")["double"] == []


async def test_a_decline_and_a_busy_provider_are_no_outage(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    shop(15, method_token="pm_card_visa_chargeDeclined")
    sandbox.order("payment_intents.create", "rate_limit_429", times=10)
    async with in_process_worker(database, sandbox.url) as worker:
        for _ in range(3):
            await later(conn, worker, "5 seconds")
    assert opened(conn) == set()
    assert count(conn, "select count(*) from surety.payments where state = 'failed'") == 15


async def test_breaker_reopens_with_a_longer_delay_if_only_reads_succeed(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(20)
    sandbox.control("faults", {"profile": {"error_500_before": 1.0}})
    waits = []
    query = (
        "select extract(epoch from next_probe_at - opened_at)::float from surety.circuit_breakers"
        " where opened_at is not null"
    )
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        for _ in range(4):
            waits += [round(wait) for (wait,) in conn.execute(query).fetchall()]
            await later(conn, worker, "61 seconds")
        assert waits == [5, 10, 20, 40]
        assert [failures for _, failures, _ in attempts(conn)] == [0] * 20
        sandbox.control("faults", WELL)
        for _ in range(3):
            await later(conn, worker, "61 seconds")
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)
    assert count(conn, "select count(*) from outbox.dead_letters") == 0


async def test_probe_does_not_close_a_circuit_opened_after_it_started(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    shop(0)
    probed = {"operation": "balance.retrieve", "fault": "slow"}
    sandbox.control("faults", {"slow_seconds": 2, "next": [probed]})
    async with in_process_worker(database, sandbox.url) as worker:
        circuit_breaker, began = worker.circuit_breaker, time.monotonic()
        circuit_breaker.count_call("", ProviderOutage("no answer"), is_command=True)
        considering = asyncio.create_task(circuit_breaker.check_accounts([("", began)]))
        await asyncio.to_thread(eventually, lambda: sandbox.control("faults")["next"] == [])
        for _ in range(10):
            circuit_breaker.count_call("", ProviderOutage("no answer"), is_command=True)
        await circuit_breaker.report_and_probe()
        assert opened(conn) == {""}
        await considering
        assert opened(conn) == {""}
        await later(conn, worker, "6 seconds")
        assert opened(conn) == set(), "the next one was begun after it"


async def test_calls_that_fail_together_share_one_probe_and_an_answer_since_spares_it(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    shop(0)
    async with in_process_worker(database, sandbox.url) as worker:
        probes = watch_requests(worker)
        breaker, a_minute_ago = worker.circuit_breaker, time.monotonic() - 60
        # Both want a probe before the first probe can be answered.
        await asyncio.gather(breaker._probe(""), breaker._probe(""))
        assert len(probes) == 1
        breaker.count_call("", None, is_command=False)
        breaker.count_call("", ProviderOutage("no answer"), is_command=True)
        await breaker.check_accounts([("", a_minute_ago)])
        assert len(probes) == 1, "another call was answered after that one began"
        breaker.count_call("", ProviderOutage("no answer"), is_command=True)
        await breaker.check_accounts([("", time.monotonic())])
        assert len(probes) == 2


async def test_occasional_failures_open_no_breaker_and_are_not_counted(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(30)
    sandbox.control("faults", {"profile": {"error_500_before": 0.25}})
    async with in_process_worker(database, sandbox.url) as worker:
        for _ in range(4):
            payments += shop(30)
            await later(conn, worker, "20 seconds")
            assert opened(conn) == set()
            assert sum(failures for _, failures, _ in attempts(conn)) < 5, "failures during the outage do not count"
        sandbox.control("faults", WELL)
        for _ in range(3):
            await later(conn, worker, "61 seconds")
        # Failures that counted delay their events by up to an hour.
        await later(conn, worker, "80 minutes")
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)
    assert count(conn, "select count(*) from outbox.dead_letters") == 0


async def test_failures_that_end_before_the_answers_to_other_calls_open_no_breaker(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    payments = shop(30)
    create = {"operation": "payment_intents.create"}
    failing, slow = {"fault": "error_500_before", "times": 8}, {"fault": "slow", "times": 22}
    sandbox.control("faults", {"slow_seconds": 1, "next": [create | failing, create | slow]})
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert transitions(conn) == []
        assert [failures for _, failures, _ in attempts(conn)] == [0] * 8
        await later(conn, worker, "1 hour")
    assert {state_of(conn, payment_id) for payment_id in payments} <= set(ENDED)


async def test_polling_stops_while_the_circuit_is_open(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    shop(3)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        sandbox.control("faults", OUT)
        await run_until_idle(worker)
        assert opened(conn) == {""}
        pass_time(conn, "1 hour")
        tried = calls_made(sandbox)
        await poll_unfinished(worker)
        assert calls_made(sandbox) == tried


async def test_blocked_events_become_due_even_if_the_circuit_is_never_closed(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        sandbox.control("faults", OUT)
        await run_until_idle(worker)
        sandbox.control("faults", WELL)
        conn.execute("delete from surety.circuit_breakers")
        await worker.circuit_breaker._report_calls()
        await later(conn, worker, "10 minutes")
    assert state_of(conn, payment_id) in ENDED


async def test_delayed_report_of_a_response_keeps_its_age(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(now,)] = conn.execute("select clock_timestamp()").fetchall()
        busy = [
            asyncio.create_task(worker.database.value("select pg_sleep(0.3)::text"))
            for _ in range(WORKER_CONNECTIONS_MAX)
        ]
        await asyncio.sleep(0)
        await worker.circuit_breaker._report_calls()
        await asyncio.gather(*busy)
    [(answered_at,)] = conn.execute("select answered_at from surety.circuit_breakers").fetchall()
    assert answered_at <= now


def test_outage_under_load_ends_without_an_operator(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Callable[..., list[str]]
) -> None:
    shorten_delays(conn)
    payments = []
    with worker_process(database, sandbox.url, "one"), worker_process(database, sandbox.url, "two"):
        wait_for_worker(conn, 2)
        for turn in range(50):
            payments += shop(2)
            conn.execute("select outbox.schedule_handlers('{submit}')")
            if turn == 10:
                sandbox.control("faults", OUT)
                eventually(lambda: opened(conn) == {""}, 20)
            if turn == 40:
                eventually(lambda: count(conn, "select probes from surety.circuit_breakers") > 0, 20)
                sandbox.control("faults", WELL)
        done = "select count(*) from surety.payments where state <> 'settled'"
        eventually(lambda: count(conn, done) == 0, 180)
    assert count(conn, "select count(*) from outbox.dead_letters") == 0
    assert sandbox.control("charges/summary?metadata_key=surety_payment")["double"] == []
    assert not violations(conn)
