"""Periodic jobs: a failure is recorded and reported, and one bad row or list stops no other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.finding import FindingId
from app.status_findings import find_problems
from jobs.leader import run_periodic_jobs
from jobs.periodic import PERIODIC_JOBS, PeriodicJob, run_and_record
from jobs.polling import poll_events
from jobs.worker import Worker
from tests.support.payments import Connection, add_merchant, fact, pay, record
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import in_process_worker, run_until_idle, wait_for_worker, worker_process


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("periodic_jobs"), "--payout-seconds=0") as sandbox:
        yield sandbox


def move_clock(conn: Connection, ahead: str) -> None:
    """Move the test database's clock."""
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update set ahead = excluded.ahead", (ahead,)
    )


def status(conn: Connection) -> dict[str, Any]:
    row = conn.execute("select surety.read_status()").fetchone()
    assert row is not None
    document: dict[str, Any] = row[0]
    return document


def findings(conn: Connection, id: FindingId) -> list[tuple[int, str]]:
    """The urgency and the text of the findings of a kind."""
    return [(finding.urgency, finding.what) for finding in find_problems(status(conn)) if finding.id == id]


@pytest.mark.parametrize("count", [0, 30, 1023, 2_147_483_647])
def test_payment_polled_any_number_of_times_stops_no_claim(conn: Connection, count: int) -> None:
    _, key_hash = add_merchant(conn)
    first, second = pay(conn, key_hash, 2)
    record(conn, [fact(one, "submitted", "pi", provider_id=f"pi_{one}") for one in (first, second)])
    conn.execute("update surety.payments set poll_at = now() - interval '1 hour'")
    conn.execute("update surety.payments set poll_count = %s where id = %s", (count, first))
    claimed = conn.execute("select payment_id from surety.claim_objects_to_poll(10)").fetchall()
    assert {row[0] for row in claimed} == {first, second}
    rows = conn.execute("select poll_at < now() + interval '65 minutes' from surety.payments").fetchall()
    assert rows == [(True,), (True,)]


async def test_failing_periodic_job_is_a_finding_until_it_succeeds(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    async def fail(_worker: object) -> None:
        await asyncio.sleep(0)
        raise ValueError("a bad row")

    async with in_process_worker(database, sandbox.url) as worker:
        with pytest.raises(ValueError, match="bad row"):
            await run_and_record(worker, "check_deadlines", fail)
        assert findings(conn, "periodic-job-failing") == [], "one failure may be chance"
        with pytest.raises(ValueError, match="bad row"):
            await run_and_record(worker, "check_deadlines", fail)
        [(urgency, what)] = findings(conn, "periodic-job-failing")
        assert urgency == 1 and "check_deadlines has failed 2 times" in what and "ValueError: a bad row" in what
        move_clock(conn, "11 minutes")
        [(urgency, _)] = findings(conn, "periodic-job-failing")
        assert urgency == 2
        await run_and_record(worker, "check_deadlines", PERIODIC_JOBS["check_deadlines"])
        assert findings(conn, "periodic-job-failing") == []


async def test_periodic_job_that_no_longer_runs_is_a_finding(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    conn.execute("insert into procrastinate.procrastinate_workers default values")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_and_record(worker, "check_deadlines", PERIODIC_JOBS["check_deadlines"])
        assert findings(conn, "periodic-job-late") == []
        move_clock(conn, "6 minutes")
        [(urgency, what)] = findings(conn, "periodic-job-late")
        assert urgency == 2 and "check_deadlines has not succeeded for 6 min" in what
        await run_and_record(worker, "check_deadlines", PERIODIC_JOBS["check_deadlines"])
        assert findings(conn, "periodic-job-late") == []


async def test_unreadable_list_is_a_finding_and_stops_no_other_account(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    account = "acct_other"
    add_merchant(conn, account=account)
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        sandbox.order("events.list", "error_500_before")
        await poll_events(worker)
        lists = conn.execute("select account, failures, polled_to is not null from surety.poll_cursors order by 1")
        assert lists.fetchall() == [("", 1, False), (account, 0, True)]
        assert findings(conn, "list-unreadable") == []
        move_clock(conn, "16 minutes")
        [(urgency, what)] = findings(conn, "list-unreadable")
        assert urgency == 1 and "stripe's list events can't be read for 16 min" in what and "500" in what
        move_clock(conn, "2 hours")
        assert [urgency for urgency, _ in findings(conn, "list-unreadable")] == [2]
        await poll_events(worker)
        assert findings(conn, "list-unreadable") == []


async def test_list_that_can_not_be_stored_ends_only_its_own_reading(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    """The events of one account can't be stored, as by a constraint; the account after it is still read."""
    account = "acct_after"
    _, key_hash = add_merchant(conn)
    add_merchant(conn, account=account)
    conn.execute("alter table surety.provider_event_keys add constraint no_event check (account <> '')")
    async with in_process_worker(database, sandbox.url) as worker:
        pay(conn, key_hash)
        await run_until_idle(worker, "submit")
        await poll_events(worker)
    lists = conn.execute("select account, failures, error ~ 'no_event' from surety.poll_cursors order by 1").fetchall()
    assert lists == [("", 1, True), (account, 0, None)]


def test_old_unfinished_objects_are_findings(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "submitted", "pi", provider_id="pi_1")])
    assert findings(conn, "unfinished-objects") == []
    move_clock(conn, "2 hours")
    [(urgency, what)] = findings(conn, "unfinished-objects")
    assert urgency == 1 and what.startswith("1 payment in provider_submitted for longer than 60 min")
    assert payment_id in what
    move_clock(conn, "2 days")
    assert [urgency for urgency, _ in findings(conn, "unfinished-objects")] == [2]
    record(conn, [fact(payment_id, "failed", "pi")])
    assert findings(conn, "unfinished-objects") == []


async def test_upkeep_deletes_all_expired_idempotency_keys_in_one_run(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    conn.execute(
        "insert into surety.idempotency_keys"
        " (merchant_id, route, key, request_hash, payment_id, status, response, created_at)"
        " select 'mer', 'POST /', 'key-' || n, '', '', 201, '', now() - interval '31 days'"
        " from generate_series(1, 25000) as n"
    )
    async with in_process_worker(database, sandbox.url) as worker:
        await run_and_record(worker, "maintain", PERIODIC_JOBS["maintain"])
    assert conn.execute("select count(*) from surety.idempotency_keys").fetchone() == (0,)


async def test_all_overdue_settlements_are_reported_in_one_run(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash, 1100)
    conn.execute(
        "insert into surety.expectations (payment_id, kind, opened_at, due_at)"
        " select id, 'settlement', now() - interval '9 days', now() - interval '2 days' from surety.payments"
    )
    async with in_process_worker(database, sandbox.url) as worker:
        await run_and_record(worker, "check_deadlines", PERIODIC_JOBS["check_deadlines"])
    assert conn.execute("select count(*) from surety.discrepancies where kind = 'overdue'").fetchone() == (1100,)


def test_worker_that_starts_after_months_makes_partitions_before_it_works(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    move_clock(conn, "250 days")
    entries = (
        "select to_regclass('audit.entries' || to_char(surety.time_now() at time zone 'UTC', '_YYYYMM')) is not null"
    )
    assert conn.execute(entries).fetchone() == (False,)
    with worker_process(database, sandbox.url):
        wait_for_worker(conn)
        assert conn.execute(entries).fetchone() == (True,)


def test_webhooks_that_do_not_arrive_are_a_finding_until_one_arrives(conn: Connection) -> None:
    def event(n: int, **headers: str) -> str:
        event = {"n": 0, "provider": "stripe", "account": "", "livemode": False, "event_id": f"evt_{n}", "type": "x"}
        return json.dumps([event | {"headers": headers, "body": "{}"}])

    conn.execute("select surety.receive_webhooks(%s)", (event(0, signature="t=1"),))
    for n in range(1, 3):
        conn.execute("select surety.store_polled_events(%s)", (event(n),))
    move_clock(conn, "10 minutes")
    assert findings(conn, "webhooks-missing") == []
    conn.execute("select surety.store_polled_events(%s)", (event(3),))
    conn.execute("""select surety.count_refusals('webhook', '{"no-signature": 4}')""")
    [(urgency, what)] = findings(conn, "webhooks-missing")
    assert urgency == 1
    assert what == (
        "no webhook arrives (the last one 10 min ago): 3 events found by polling alone, the first 10 min ago"
    )
    conn.execute("""select surety.count_refusals('webhook', '{"wrong-signature": 4}')""")
    move_clock(conn, "70 minutes")
    [(urgency, what)] = findings(conn, "webhooks-missing")
    assert urgency == 2
    conn.execute("select surety.receive_webhooks(%s)", (event(4, signature="t=1"),))
    assert findings(conn, "webhooks-missing") == []
    for n in range(5, 8):
        conn.execute("select surety.store_polled_events(%s)", (event(n),))
    assert findings(conn, "webhooks-missing") == [], "webhooks may be slower than a poll"


class RunningJobs:
    """A periodic job that goes on until it is released, in each worker that runs it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.canceled: list[str] = []
        self.ended: list[str] = []
        self.release = asyncio.Event()

    async def run(self, worker: Worker) -> None:
        """The job."""
        self.begun.append(worker.name)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.canceled.append(worker.name)
            raise
        self.ended.append(worker.name)


async def until(check: Callable[[], bool]) -> None:
    """Until a condition is true, while other tasks run."""
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110  the condition is in the database
            await asyncio.sleep(0.02)


def replace_jobs(monkeypatch: pytest.MonkeyPatch, **jobs: PeriodicJob) -> None:
    """Other periodic jobs, under names of those that exist."""
    monkeypatch.setattr("jobs.leader.PERIODIC_JOBS", jobs)


LEADERS = (
    "from pg_locks where locktype = 'advisory' and objsubid = 1 and granted"
    " and database = (select oid from pg_database where datname = current_database())"
)


async def test_next_leader_starts_the_jobs_that_the_last_one_left(
    conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = RunningJobs()
    replace_jobs(monkeypatch, maintain=jobs.run)
    async with (
        in_process_worker(database, "http://unused") as here,
        in_process_worker(database, "http://unused") as there,
    ):
        there.name = "there"
        async with asyncio.TaskGroup() as group:
            group.create_task(run_periodic_jobs(here))
            await until(lambda: jobs.begun == ["here"])
            group.create_task(run_periodic_jobs(there))
            scheduled = "select count(*) from surety.periodic_jobs where job = 'schedule_due_handlers'"
            await until(lambda: conn.execute(scheduled).fetchone() == (1,))
            conn.execute(f"select pg_terminate_backend(pid) {LEADERS}".encode())
            await until(lambda: len(jobs.begun) == 2)
            await until(lambda: jobs.canceled == ["here"])
            leader, other = (there, here) if jobs.begun[1] == "there" else (here, there)
            leader.stopping.set()
            await asyncio.sleep(0)
            jobs.release.set()
            await until(lambda: jobs.ended == [leader.name])
            await until(lambda: len(jobs.begun) == 3)
            assert jobs.begun[2] == other.name
            other.stopping.set()
    assert conn.execute(f"select count(*) {LEADERS}".encode()).fetchone() == (0,)


async def test_failing_turn_of_the_leader_is_a_finding_and_its_jobs_go_on(
    conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = RunningJobs()
    replace_jobs(monkeypatch, maintain=jobs.run)
    function = "execute on function outbox.schedule_work_since(text)"
    conn.execute(f"revoke {function} from surety_worker".encode())
    try:
        async with in_process_worker(database, "http://unused") as worker, asyncio.TaskGroup() as group:
            group.create_task(run_periodic_jobs(worker))
            await until(lambda: findings(conn, "periodic-job-failing") != [])
            [(_, what)] = findings(conn, "periodic-job-failing")
            assert "schedule_due_handlers has failed" in what and "permission denied" in what
            conn.execute(f"grant {function} to surety_worker".encode())
            await until(lambda: findings(conn, "periodic-job-failing") == [])
            jobs.release.set()
            worker.stopping.set()
        assert (jobs.begun, jobs.canceled) == (["here"], [])
    finally:
        conn.execute(f"grant {function} to surety_worker".encode())


async def test_job_that_fails_unforeseen_is_recorded_and_started_again(
    conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = []

    async def fail(_worker: object) -> None:
        await asyncio.sleep(0)
        begun.append("job")
        raise ValueError("a bad row")

    replace_jobs(monkeypatch, check_deadlines=fail)
    async with (
        in_process_worker(database, "http://unused", SURETY_POLL_SECONDS="1") as worker,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(run_periodic_jobs(worker))
        await until(lambda: len(begun) == 3)
        worker.stopping.set()
    assert conn.execute("select failures from surety.periodic_jobs where job = 'check_deadlines'").fetchone() == (3,)
    assert "check_deadlines failed" in caplog.text and "a bad row" in caplog.text
