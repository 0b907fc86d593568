"""Batching connections: requests of a batch commit together, one bad request fails alone, accepted ones are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg import AsyncConnection

from app.api.create_payment import CREATE_PAYMENTS
from app.api.schemas.payments import PaymentRequest
from app.api.versions import VERSIONS
from app.web import batching as batching_module
from app.web.batching import (
    PARALLEL_BATCH_MIN,
    BatchingConnections,
    DatabaseAway,
    RefusedByDatabase,
    Row,
    Unavailable,
)
from app.web.keys import NewKey, new_key
from app.web.worker_scheduler import WorkerScheduler
from db.connect import connect_async
from db.embedded.server import EmbeddedServer
from db.settings import DatabaseAddress, Settings
from tests.conftest import Connection
from tests.support.http_client import unique_name

LOCK = 4711
FAR_SECONDS = 1000.0
ECHO = b"select n, size, session from public.echo(%s)"
MAKE_ECHO = f"""
create table public.echoed_texts (text text not null, constraint is_good check (text not like '%bad%'));
create function public.echo(p_rows jsonb) returns table (n integer, size integer, session integer)
language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared({LOCK}) where p_rows #>> '{{0,text}}' <> 'hurry';
    insert into public.echoed_texts select r.text from jsonb_to_recordset(p_rows) as r (text text);
    return query select r.n, jsonb_array_length(p_rows), pg_backend_pid()
    from jsonb_to_recordset(p_rows) as r (n integer);
end;
$$;
"""


class EchoRequest(msgspec.Struct):
    """A request of the function above."""

    text: str
    request_id: str = "req_test"
    n: int = 0


@pytest.fixture
def echo(conn: Connection) -> Connection:
    """A function that stores its batch and returns its size; it waits for a lock unless the first text is `hurry`."""
    conn.execute(MAKE_ECHO.encode())
    return conn


def create_request(key: NewKey, description: str | None = None) -> PaymentRequest:
    """A payment as the API asks for it."""
    return PaymentRequest(
        n=0,
        request_id=unique_name("req"),
        key_hash=key.hash.hex(),
        address="127.0.0.1",
        api_version=VERSIONS[0],
        idempotency_key=unique_name("key"),
        request_hash="00",
        amount=100,
        currency="usd",
        rail="card",
        method_token="pm_card_visa",
        capture_method="automatic",
        reference=None,
        description=description,
        statement_descriptor_suffix=None,
        return_url="https://shop.example/return",
        off_session=False,
        customer=None,
        metadata={},
    )


def acquire_lock(conn: Connection) -> None:
    """Let every call wait."""
    conn.execute("select pg_advisory_lock(%s)", (LOCK,))


def release_lock(conn: Connection) -> None:
    conn.execute("select pg_advisory_unlock(%s)", (LOCK,))


def echoed_texts(conn: Connection) -> list[str]:
    return [text for (text,) in conn.execute("select text from public.echoed_texts order by text").fetchall()]


def waiting(conn: Connection) -> list[int]:
    """The sessions that wait for the lock."""
    rows = conn.execute("select pid from pg_locks where locktype = 'advisory' and objid = %s and not granted", (LOCK,))
    return [pid for (pid,) in rows.fetchall()]


async def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives once it is true."""
    async with asyncio.timeout(20):
        while not (found := condition()):  # noqa: ASYNC110  the condition is a state of PostgreSQL
            await asyncio.sleep(0.001)
    return found


@asynccontextmanager
async def opened_batching(
    settings: Settings, statement: bytes = ECHO, **options: Any
) -> AsyncGenerator[BatchingConnections]:
    async def connect() -> AsyncConnection[Row]:
        return await connect_async("api" if statement is CREATE_PAYMENTS else "deploy", settings)

    batching = BatchingConnections(connect, statement, **{"sustained_max": 10_000, **options})
    await batching.open()
    try:
        yield batching
    finally:
        await batching.close()


async def send_words(batching: BatchingConnections, *words: str) -> Sequence[Any]:
    """The rows, or errors, that words get."""
    return await asyncio.gather(*(batching.submit(EchoRequest(word)) for word in words), return_exceptions=True)


async def test_single_request_is_sent_at_once(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1) as batching:
        assert (await batching.submit(EchoRequest("alone")))[1] == 1


async def test_requests_that_wait_during_a_batch_form_the_next_batch(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1) as batching:
        acquire_lock(echo)
        first = batching.submit(EchoRequest("first"))
        await until(lambda: waiting(echo))
        rest = [batching.submit(EchoRequest(f"w{n}")) for n in range(10)]
        release_lock(echo)
        assert (await first)[1] == 1
        assert [row[1] for row in await asyncio.gather(*rest)] == [10] * 10


async def test_gathered_requests_that_follow_each_other_share_a_batch(
    echo: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching_module, "QUEUED_SECONDS_MAX", FAR_SECONDS)
    async with opened_batching(settings, connections=2, gather_seconds=0.3) as batching:
        answers = []
        for n in range(3):
            answers.append(batching.submit(EchoRequest(f"w{n}")))
            for _ in range(10):
                await asyncio.sleep(0)
        assert [(await answer)[1] for answer in answers] == [3, 3, 3]
        assert (await batching.submit(EchoRequest("alone")))[1] == 1


async def test_gathering_ends_when_requests_suffice(
    echo: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching_module, "QUEUED_SECONDS_MAX", FAR_SECONDS)
    async with opened_batching(settings, connections=1, gather_seconds=FAR_SECONDS) as batching:
        rows = await send_words(batching, *(f"w{n}" for n in range(PARALLEL_BATCH_MIN)))
        assert [row[1] for row in rows] == [PARALLEL_BATCH_MIN] * PARALLEL_BATCH_MIN


async def test_gathering_ends_when_the_first_request_is_overdue(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1, gather_seconds=FAR_SECONDS) as batching:
        assert (await batching.submit(EchoRequest("first")))[1] == 1


async def test_gathered_requests_are_sent_at_the_end(
    echo: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching_module, "QUEUED_SECONDS_MAX", FAR_SECONDS)
    async with opened_batching(settings, connections=1, gather_seconds=FAR_SECONDS) as batching:
        answer = batching.submit(EchoRequest("last"))
    assert (await answer)[1] == 1


async def test_batch_size_is_bounded(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1, batch_max=4) as batching:
        rows = await send_words(batching, *(f"w{n}" for n in range(10)))
        assert [row[1] for row in rows] == [4] * 8 + [2] * 2


@pytest.mark.parametrize("parallel_batch_min", [2, 5])
async def test_second_connection_starts_when_enough_requests_wait_to_share_its_cost(
    echo: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch, parallel_batch_min: int
) -> None:
    monkeypatch.setattr("app.web.batching.QUEUED_SECONDS_MAX", 60.0)
    monkeypatch.setattr("app.web.batching.PARALLEL_BATCH_MIN", parallel_batch_min)
    enough = max(3, parallel_batch_min)
    async with opened_batching(settings, connections=3) as batching:
        acquire_lock(echo)
        stuck = [batching.submit(EchoRequest(f"stuck{n}")) for n in range(3)]
        await until(lambda: waiting(echo))
        few = [batching.submit(EchoRequest("hurry")) for _ in range(enough - 1)]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in few)
        answered = [*few, batching.submit(EchoRequest("hurry"))]
        assert [row[1] for row in await asyncio.gather(*answered)] == [enough] * enough
        release_lock(echo)
        assert [row[1] for row in await asyncio.gather(*stuck)] == [3] * 3


async def test_blocked_connection_does_not_block_the_others(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=2) as batching:
        acquire_lock(echo)
        stuck = batching.submit(EchoRequest("stuck"))
        [session] = await until(lambda: waiting(echo))
        assert (await batching.submit(EchoRequest("hurry")))[2] != session
        release_lock(echo)
        assert (await stuck)[2] == session


@pytest.mark.parametrize("bad", [0, 7, 19])
async def test_one_bad_request_does_not_fail_its_batch(
    echo: Connection, settings: Settings, bad: int, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"w{n:02}" if n != bad else "bad" for n in range(20)]
    async with opened_batching(settings, connections=1) as batching:
        rows = await send_words(batching, *words)
        assert (await batching.submit(EchoRequest("x")))[1] == 1
    refused = rows[bad]
    assert isinstance(refused, RefusedByDatabase)
    assert refused.error.diag.constraint_name == "is_good"
    assert all(isinstance(row, tuple) for n, row in enumerate(rows) if n != bad)
    assert echoed_texts(echo) == sorted([*(word for word in words if word != "bad"), "x"])
    assert "req_test" in caplog.text


async def test_text_that_postgresql_cannot_store_does_not_fail_its_batch(conn: Connection, settings: Settings) -> None:
    key = new_key(livemode=False)
    conn.execute("select surety.add_api_key(surety.add_merchant('Acme Books'), %s, %s)", (key.hash, key.hint))
    asked = [create_request(key, description="a\0b" if n == 5 else None) for n in range(12)]
    async with opened_batching(settings, CREATE_PAYMENTS, connections=1) as batching:
        rows = await asyncio.gather(*map(batching.submit, asked), return_exceptions=True)
    assert isinstance(rows[5], RefusedByDatabase)
    assert [row[1] for row in rows if isinstance(row, tuple)] == [201] * 11
    assert conn.execute("select count(*) from surety.payments").fetchone() == (11,)


async def test_request_beyond_the_bounded_queue_is_refused_at_once(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1, queue_max=3) as batching:
        acquire_lock(echo)
        first = batching.submit(EchoRequest("a"))
        await until(lambda: waiting(echo))
        rest = [batching.submit(EchoRequest(word)) for word in "bcd"]
        with pytest.raises(Unavailable):
            batching.submit(EchoRequest("too many"))
        release_lock(echo)
        await asyncio.gather(first, *rest)
        await batching.submit(EchoRequest("e"))
    assert echoed_texts(echo) == ["a", "b", "c", "d", "e"]


async def test_burst_is_queued_and_sustained_overload_is_refused(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1, sustained_max=8) as batching:
        await batching.submit(EchoRequest("calm"))
        acquire_lock(echo)
        burst = [batching.submit(EchoRequest(f"w{n}")) for n in range(100)]
        await until(batching.is_full)
        with pytest.raises(Unavailable):
            batching.submit(EchoRequest("more"))
        release_lock(echo)
        assert len(await asyncio.gather(*burst)) == 100
        assert not batching.is_full()
        assert (await batching.submit(EchoRequest("calm again")))[1] >= 1


async def test_batch_is_retried_after_its_connection_was_lost(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1) as batching:
        acquire_lock(echo)
        answers = [batching.submit(EchoRequest(word)) for word in "abc"]
        [session] = await until(lambda: waiting(echo))
        echo.execute("select pg_terminate_backend(%s)", (session,))
        await until(lambda: session not in (again := waiting(echo)) and again)
        release_lock(echo)
        rows = await asyncio.gather(*answers)
        assert {row[2] for row in rows} != {session}
    assert echoed_texts(echo) == ["a", "b", "c"]


async def test_outage_is_noticed_only_if_longer_than_the_retry_limit(settings: Settings) -> None:
    with EmbeddedServer(durable=True) as server:
        with psycopg.connect(server.url, autocommit=True) as conn:
            conn.execute(MAKE_ECHO.encode())
        there = msgspec.structs.replace(settings, database_url=DatabaseAddress(server.url))
        async with opened_batching(there, connections=2, retry_seconds_max=0.5) as batching:
            await batching.submit(EchoRequest("before"))
            server.halt("immediate")
            with pytest.raises(Unavailable):
                await batching.submit(EchoRequest("too long"))
            batching.retry_seconds_max = 20
            meanwhile = batching.submit(EchoRequest("meanwhile"))
            server._spawn(*server._launched_with)
            await meanwhile
            with psycopg.connect(server.url, autocommit=True) as conn:
                assert echoed_texts(conn) == ["before", "meanwhile"]


async def test_connections_open_during_an_outage_but_not_on_permanent_errors(settings: Settings) -> None:
    failures: list[psycopg.Error] = [psycopg.OperationalError("away"), psycopg.ProgrammingError("no such database")]

    async def connect() -> AsyncConnection[Any]:
        raise failures[0]

    batching = BatchingConnections(connect, ECHO, connections=2)
    await batching.open()
    await batching.close()
    failures.pop(0)
    with pytest.raises(psycopg.ProgrammingError):
        await BatchingConnections(connect, ECHO, connections=2).open()


async def test_a_function_replaced_by_a_deploy_fails_no_request(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, b"select * from public.echo(%s)", connections=1) as batching:
        assert len(await batching.submit(EchoRequest("a"))) == 3
        definition = echo.execute("select pg_get_functiondef('public.echo'::regproc)").fetchone()
        assert definition is not None
        wider = definition[0].replace("session integer)", "session integer, more integer)")
        wider = wider.replace("pg_backend_pid()", "pg_backend_pid(), 1")
        with echo.transaction():
            echo.execute("drop function public.echo(jsonb)")
            echo.execute(wider)
        assert len(await batching.submit(EchoRequest("b"))) == 4
    assert echoed_texts(echo) == ["a", "b"]


async def test_batch_is_not_split_for_errors_that_no_request_caused(
    echo: Connection, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened_batching(settings, connections=1) as batching:
        echo.execute("alter function public.echo(jsonb) rename to other")
        rows = await send_words(batching, *(f"w{n}" for n in range(10)))
        assert {type(row) for row in rows} == {DatabaseAway}
        assert len(caplog.records) == 1
        echo.execute("alter function public.other(jsonb) rename to echo")
        await batching.submit(EchoRequest("again"))


async def test_restored_database_accepts_nothing(conn: Connection, settings: Settings) -> None:
    key = new_key(livemode=False)
    conn.execute("select surety.add_api_key(surety.add_merchant('Acme Books'), %s, %s)", (key.hash, key.hint))
    conn.execute("update outbox.restore_generations set system_identifier = 1")
    async with opened_batching(settings, CREATE_PAYMENTS, connections=1) as batching:
        with pytest.raises(Unavailable):
            await batching.submit(create_request(key))


async def test_closing_finishes_waiting_requests_and_refuses_new_ones(echo: Connection, settings: Settings) -> None:
    async with opened_batching(settings, connections=1, batch_max=2) as batching:
        acquire_lock(echo)
        answers = [batching.submit(EchoRequest(f"w{n}")) for n in range(7)]
        await until(lambda: waiting(echo))
        closing = asyncio.create_task(batching.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            batching.submit(EchoRequest("late"))
        release_lock(echo)
        await closing
        assert len(await asyncio.gather(*answers)) == 7


@pytest.mark.parametrize("failure", [psycopg.OperationalError("gone"), Unavailable("gone")], ids=type)
async def test_workers_are_scheduled_by_one_call_at_a_time(
    caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    begun: list[asyncio.Event] = []

    async def schedule() -> None:
        gate = gates[len(begun)]
        begun.append(gate)
        await gate.wait()
        if len(begun) == 1:
            raise failure

    scheduler = WorkerScheduler(schedule, interval_seconds=0)
    scheduler.schedule()
    await until(lambda: len(begun) == 1)
    for _ in range(100):
        scheduler.schedule()
    assert len(begun) == 1
    gates[0].set()
    await until(lambda: len(begun) == 2)
    gates[1].set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(begun) == 2
    scheduler.schedule()
    await until(lambda: len(begun) == 3)
    await scheduler.close()
    assert "scheduling workers failed" in caplog.text
