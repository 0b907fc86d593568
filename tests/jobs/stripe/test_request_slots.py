"""The pace of requests: shared by all workers, reserved together by requests that wait together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from jobs.stripe.client import StripeGateway
from tests.support.payments import Connection
from tests.support.sandbox_process import SandboxProcess
from tests.support.workers import in_process_worker, run_until_idle, watch_requests


@pytest.fixture
def reservations(conn: Connection) -> Iterator[Callable[[], int]]:
    """Counts the statements that reserved slots."""
    conn.execute("create sequence public.reservations")
    conn.execute(
        "create function public.count_reservation() returns trigger language plpgsql security definer as"
        " $$ begin perform nextval('public.reservations'); return null; end $$"
    )
    conn.execute(
        "create trigger count_reservation after insert on surety.request_slots"
        " for each statement execute function public.count_reservation()"
    )

    def count() -> int:
        row = conn.execute("select last_value, is_called from public.reservations").fetchone()
        assert row is not None
        return int(row[0]) if row[1] else 0

    yield count
    conn.execute("drop trigger count_reservation on surety.request_slots")
    conn.execute("drop function public.count_reservation()")
    conn.execute("drop sequence public.reservations")


def test_slots_reserved_together_are_those_reserved_one_by_one(conn: Connection) -> None:
    # One statement each, so that its time stands still.
    query = """
        select seconds from unnest(%s) as count
        cross join unnest(surety.reserve_request_slots('stripe', %s, 50, true, count)) as seconds
    """
    together = [seconds for (seconds,) in conn.execute(query, ([40, 1, 19], "acct_1")).fetchall()]
    one_by_one = [seconds for (seconds,) in conn.execute(query, ([1] * 60, "acct_2")).fetchall()]
    assert together == pytest.approx(one_by_one)
    # A burst of half a second's requests goes at once; the last of 60 waits for the rest.
    assert together[:25] == [0] * 25
    assert together[-1] == pytest.approx(0.7)


def test_requests_that_are_not_urgent_take_no_slot_for_which_they_would_wait(conn: Connection) -> None:
    query = """
        select (surety.reserve_request_slots('stripe', account, 50, is_urgent, count))[count]
        from (values ('', true, 60), ('', false, 1), ('', true, 1), ('acct_other', false, 1))
            as asked (account, is_urgent, count)
    """
    assert [wait for (wait,) in conn.execute(query).fetchall()] == [pytest.approx(0.7), None, pytest.approx(0.72), 0]


async def test_a_bounded_rate_holds_for_real_calls(
    conn: Connection, database: str, sandbox: SandboxProcess, payment: Callable[..., str]
) -> None:
    for _ in range(12):
        payment()
    async with in_process_worker(database, sandbox.url, per_second=10) as worker:
        began = time.monotonic()
        await run_until_idle(worker, "submit")
        # Five go at once, the last of the other seven 0.7 s after the first.
        assert time.monotonic() - began > 0.69


async def fetch_many(stripe: StripeGateway, count: int, *, urgent: bool = True) -> list[BaseException]:
    """Send so many requests at once. Returns their errors."""
    calls = [stripe.fetch_intent("", "pi_absent", urgent=urgent) for _ in range(count)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [result for result in results if isinstance(result, BaseException)]


async def test_requests_that_wait_together_reserve_their_slots_in_one_statement(
    conn: Connection, database: str, sandbox: SandboxProcess, reservations: Callable[[], int]
) -> None:
    async with in_process_worker(database, sandbox.url, per_second=1000) as worker:
        requests = watch_requests(worker)
        await fetch_many(worker.stripe, 40)
        assert (len(requests), reservations()) == (40, 1)
        await fetch_many(worker.stripe, 2)
        assert (len(requests), reservations()) == (42, 2)
        await fetch_many(worker.stripe, 3, urgent=False)
        assert (len(requests), reservations()) == (45, 5)


async def test_canceled_requests_hold_up_no_other(conn: Connection, database: str, sandbox: SandboxProcess) -> None:
    async with in_process_worker(database, sandbox.url, per_second=1000) as worker:
        requests = watch_requests(worker)
        calls = [asyncio.create_task(worker.stripe.fetch_intent("", "pi_absent", urgent=True)) for _ in range(10)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == len(requests) == 5
        await fetch_many(worker.stripe, 5)
        assert len(requests) == 10


async def test_failed_reservation_fails_its_requests_and_none_after_them(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    async with in_process_worker(database, sandbox.url, per_second=1000) as worker:
        requests = watch_requests(worker)
        conn.execute("alter table surety.request_slots add constraint refused check (false) not valid")
        errors = await fetch_many(worker.stripe, 5)
        assert [type(error) for error in errors] == [psycopg.errors.CheckViolation] * 5
        assert requests == []
        conn.execute("alter table surety.request_slots drop constraint refused")
        await fetch_many(worker.stripe, 5)
        assert len(requests) == 5
