"""Lanes: what waits together is committed together, nobody suffers for a neighbour, and nothing accepted gets lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg import AsyncConnection

from app.api.create_payment import STATEMENT
from app.api.schemas import AskedPayment
from app.web.batching import Kicker, Lanes, Refused, Row, Unavailable
from app.web.keys import NewKey, new_key
from db.connect import connect_async
from db.embedded import EmbeddedServer
from db.settings import Address, Settings
from tests.conftest import Connection
from tests.support.http_client import fresh

LOCK = 4711
ECHO = b"select n, size, session from public.echo(%s)"
MAKE_ECHO = f"""
create table public.heard (text text not null, constraint is_good check (text not like '%bad%'));
create function public.echo(p_rows jsonb) returns table (n integer, size integer, session integer)
language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared({LOCK}) where p_rows #>> '{{0,text}}' <> 'hurry';
    insert into public.heard select r.text from jsonb_to_recordset(p_rows) as r (text text);
    return query select r.n, jsonb_array_length(p_rows), pg_backend_pid()
    from jsonb_to_recordset(p_rows) as r (n integer);
end;
$$;
"""


class Word(msgspec.Struct):
    """A request of the function above."""

    text: str
    request_id: str = "req_test"
    n: int = 0


@pytest.fixture
def echo(conn: Connection) -> Connection:
    """A function that keeps what it hears and tells the batch's size; unless told to hurry, it waits for the lock."""
    conn.execute(MAKE_ECHO.encode())
    return conn


def wish(key: NewKey, description: str | None = None) -> AskedPayment:
    """A payment as the API asks for it."""
    return AskedPayment(
        n=0,
        request_id=fresh("req"),
        key_hash=key.hash.hex(),
        address="127.0.0.1",
        idempotency_key=fresh("key"),
        request_hash="00",
        amount=100,
        currency="usd",
        rail="card",
        method_token="pm_card_visa",
        capture_method="automatic",
        reference=None,
        description=description,
        statement_descriptor_suffix=None,
        return_url=None,
        customer=None,
        metadata={},
    )


def hold(conn: Connection) -> None:
    """Let every call wait."""
    conn.execute("select pg_advisory_lock(%s)", (LOCK,))


def let_go(conn: Connection) -> None:
    conn.execute("select pg_advisory_unlock(%s)", (LOCK,))


def heard(conn: Connection) -> list[str]:
    return [text for (text,) in conn.execute("select text from public.heard order by text").fetchall()]


def waiting(conn: Connection) -> list[int]:
    """The sessions that wait for the lock."""
    rows = conn.execute("select pid from pg_locks where locktype = 'advisory' and objid = %s and not granted", (LOCK,))
    return [pid for (pid,) in rows.fetchall()]


async def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives once it is true."""
    async with asyncio.timeout(20):
        while not (found := condition()):  # noqa: ASYNC110  what is waited for happens in PostgreSQL
            await asyncio.sleep(0.001)
    return found


@asynccontextmanager
async def opened(settings: Settings, statement: bytes = ECHO, **options: Any) -> AsyncGenerator[Lanes]:
    async def connect() -> AsyncConnection[Row]:
        return await connect_async("api" if statement is STATEMENT else "deploy", settings)

    lanes = Lanes(connect, statement, **{"standing_max": 10_000, **options})
    await lanes.open()
    try:
        yield lanes
    finally:
        await lanes.close()


async def say(lanes: Lanes, *words: str) -> Sequence[Any]:
    """The rows, or errors, that words get."""
    return await asyncio.gather(*(lanes.ask(Word(word)) for word in words), return_exceptions=True)


async def test_alone_a_request_waits_for_nobody(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=1) as lanes:
        assert (await lanes.ask(Word("alone")))[1] == 1


async def test_what_waits_while_a_batch_is_away_forms_the_next_one(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=1) as lanes:
        hold(echo)
        first = lanes.ask(Word("first"))
        await until(lambda: waiting(echo))
        rest = [lanes.ask(Word(f"w{n}")) for n in range(10)]
        let_go(echo)
        assert (await first)[1] == 1
        assert [row[1] for row in await asyncio.gather(*rest)] == [10] * 10


async def test_a_batch_is_bounded(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=1, batch_max=4) as lanes:
        rows = await say(lanes, *(f"w{n}" for n in range(10)))
        assert [row[1] for row in rows] == [4] * 8 + [2] * 2


@pytest.mark.parametrize("shared_min", [2, 5])
async def test_another_lane_begins_when_as_many_wait_as_are_worked_on_and_share_its_cost(
    echo: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch, shared_min: int
) -> None:
    monkeypatch.setattr("app.web.batching.HELD_UP_SECONDS", 60.0)
    monkeypatch.setattr("app.web.batching.SHARED_MIN", shared_min)
    enough = max(3, shared_min)
    async with opened(settings, lanes=3) as lanes:
        hold(echo)
        stuck = [lanes.ask(Word(f"stuck{n}")) for n in range(3)]
        await until(lambda: waiting(echo))
        few = [lanes.ask(Word("hurry")) for _ in range(enough - 1)]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in few)
        answered = [*few, lanes.ask(Word("hurry"))]
        assert [row[1] for row in await asyncio.gather(*answered)] == [enough] * enough
        let_go(echo)
        assert [row[1] for row in await asyncio.gather(*stuck)] == [3] * 3


async def test_a_lane_that_is_held_up_holds_up_no_other(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=2) as lanes:
        hold(echo)
        stuck = lanes.ask(Word("stuck"))
        [session] = await until(lambda: waiting(echo))
        assert (await lanes.ask(Word("hurry")))[2] != session
        let_go(echo)
        assert (await stuck)[2] == session


@pytest.mark.parametrize("bad", [0, 7, 19])
async def test_one_bad_request_takes_no_neighbour_along(
    echo: Connection, settings: Settings, bad: int, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"w{n:02}" if n != bad else "bad" for n in range(20)]
    async with opened(settings, lanes=1) as lanes:
        rows = await say(lanes, *words)
        assert (await lanes.ask(Word("x")))[1] == 1
    refused = rows[bad]
    assert isinstance(refused, Refused)
    assert refused.error.diag.constraint_name == "is_good"
    assert all(isinstance(row, tuple) for n, row in enumerate(rows) if n != bad)
    assert heard(echo) == sorted([*(word for word in words if word != "bad"), "x"])
    assert "req_test" in caplog.text


async def test_text_that_postgresql_cant_hold_hurts_no_neighbour(conn: Connection, settings: Settings) -> None:
    key = new_key(livemode=False)
    conn.execute("select surety.add_api_key(surety.add_merchant('Acme Books'), %s, %s)", (key.hash, key.hint))
    asked = [wish(key, description="a\0b" if n == 5 else None) for n in range(12)]
    async with opened(settings, STATEMENT, lanes=1) as lanes:
        rows = await asyncio.gather(*map(lanes.ask, asked), return_exceptions=True)
    assert isinstance(rows[5], Refused)
    assert [row[1] for row in rows if isinstance(row, tuple)] == [201] * 11
    assert conn.execute("select count(*) from surety.payments").fetchone() == (11,)


async def test_past_the_bounded_line_a_request_is_refused_at_once_and_not_accepted(
    echo: Connection, settings: Settings
) -> None:
    async with opened(settings, lanes=1, waiting_max=3) as lanes:
        hold(echo)
        first = lanes.ask(Word("a"))
        await until(lambda: waiting(echo))
        rest = [lanes.ask(Word(word)) for word in "bcd"]
        with pytest.raises(Unavailable):
            lanes.ask(Word("too many"))
        let_go(echo)
        await asyncio.gather(first, *rest)
        await lanes.ask(Word("e"))
    assert heard(echo) == ["a", "b", "c", "d", "e"]


async def test_a_burst_is_let_in_and_what_stands_for_longer_is_not(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=1, standing_max=8) as lanes:
        await lanes.ask(Word("calm"))
        hold(echo)
        burst = [lanes.ask(Word(f"w{n}")) for n in range(100)]
        await until(lanes.is_full)
        with pytest.raises(Unavailable):
            lanes.ask(Word("more"))
        let_go(echo)
        assert len(await asyncio.gather(*burst)) == 100
        assert not lanes.is_full()
        assert (await lanes.ask(Word("calm again")))[1] >= 1


async def test_a_batch_whose_connection_is_lost_is_asked_again(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=1) as lanes:
        hold(echo)
        answers = [lanes.ask(Word(word)) for word in "abc"]
        [session] = await until(lambda: waiting(echo))
        echo.execute("select pg_terminate_backend(%s)", (session,))
        await until(lambda: session not in (again := waiting(echo)) and again)
        let_go(echo)
        rows = await asyncio.gather(*answers)
        assert {row[2] for row in rows} != {session}
    assert heard(echo) == ["a", "b", "c"]


async def test_an_outage_shorter_than_patience_is_not_noticed_and_a_longer_one_is_told(settings: Settings) -> None:
    with EmbeddedServer(durable=True) as server:
        with psycopg.connect(server.url, autocommit=True) as conn:
            conn.execute(MAKE_ECHO.encode())
        there = msgspec.structs.replace(settings, database_url=Address(server.url))
        async with opened(there, lanes=2, patience_seconds=0.5) as lanes:
            await lanes.ask(Word("before"))
            server.halt("immediate")
            with pytest.raises(Unavailable):
                await lanes.ask(Word("too long"))
            lanes.patience_seconds = 20
            meanwhile = lanes.ask(Word("meanwhile"))
            server._spawn(*server._how)
            await meanwhile
            with psycopg.connect(server.url, autocommit=True) as conn:
                assert heard(conn) == ["before", "meanwhile"]


async def test_lanes_open_while_the_database_is_away_and_not_where_waiting_would_not_help(settings: Settings) -> None:
    failures: list[psycopg.Error] = [psycopg.OperationalError("away"), psycopg.ProgrammingError("no such database")]

    async def connect() -> AsyncConnection[Any]:
        raise failures[0]

    lanes = Lanes(connect, ECHO, lanes=2)
    await lanes.open()
    await lanes.close()
    failures.pop(0)
    with pytest.raises(psycopg.ProgrammingError):
        await Lanes(connect, ECHO, lanes=2).open()


async def test_a_function_replaced_by_a_deploy_fails_no_request(echo: Connection, settings: Settings) -> None:
    async with opened(settings, b"select * from public.echo(%s)", lanes=1) as lanes:
        assert len(await lanes.ask(Word("a"))) == 3
        definition = echo.execute("select pg_get_functiondef('public.echo'::regproc)").fetchone()
        assert definition is not None
        wider = definition[0].replace("session integer)", "session integer, more integer)")
        wider = wider.replace("pg_backend_pid()", "pg_backend_pid(), 1")
        with echo.transaction():
            echo.execute("drop function public.echo(jsonb)")
            echo.execute(wider)
        assert len(await lanes.ask(Word("b"))) == 4
    assert heard(echo) == ["a", "b"]


async def test_what_no_request_has_caused_divides_no_batch(
    echo: Connection, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(settings, lanes=1) as lanes:
        echo.execute("alter function public.echo(jsonb) rename to other")
        rows = await say(lanes, *(f"w{n}" for n in range(10)))
        assert {type(row) for row in rows} == {Unavailable}
        assert len(caplog.records) == 1
        echo.execute("alter function public.other(jsonb) rename to echo")
        await lanes.ask(Word("again"))


async def test_a_database_restored_elsewhere_accepts_nothing(conn: Connection, settings: Settings) -> None:
    key = new_key(livemode=False)
    conn.execute("select surety.add_api_key(surety.add_merchant('Acme Books'), %s, %s)", (key.hash, key.hint))
    conn.execute("update outbox.epochs set system_identifier = 1")
    async with opened(settings, STATEMENT, lanes=1) as lanes:
        with pytest.raises(Unavailable):
            await lanes.ask(wish(key))


async def test_closing_finishes_what_waits_and_refuses_what_comes(echo: Connection, settings: Settings) -> None:
    async with opened(settings, lanes=1, batch_max=2) as lanes:
        hold(echo)
        answers = [lanes.ask(Word(f"w{n}")) for n in range(7)]
        await until(lambda: waiting(echo))
        closing = asyncio.create_task(lanes.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            lanes.ask(Word("late"))
        let_go(echo)
        await closing
        assert len(await asyncio.gather(*answers)) == 7


@pytest.mark.parametrize("failure", [psycopg.OperationalError("gone"), Unavailable("gone")], ids=type)
async def test_kicks_are_made_one_at_a_time_and_together(caplog: pytest.LogCaptureFixture, failure: Exception) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    begun: list[asyncio.Event] = []

    async def kick() -> None:
        gate = gates[len(begun)]
        begun.append(gate)
        await gate.wait()
        if len(begun) == 1:
            raise failure

    kicker = Kicker(kick, every_seconds=0)
    kicker.kick()
    await until(lambda: len(begun) == 1)
    for _ in range(100):
        kicker.kick()
    assert len(begun) == 1
    gates[0].set()
    await until(lambda: len(begun) == 2)
    gates[1].set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(begun) == 2
    kicker.kick()
    await until(lambda: len(begun) == 3)
    await kicker.close()
    assert "kick failed" in caplog.text
