"""The database under a schedule: one for thousands of them, emptied in between.

Two things differ from production. surety.time_now() reads a setting of the session, which follows the schedule's clock:
so time stands still while nobody moves it, and a replay reads the very same instants. And there is a handler more,
`probe`, whose effect can't be repeated unseen: it counts.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
from psycopg import waiting
from psycopg.pq import ConnStatus

from db.connect import harden
from db.deploy.deploy import deploy
from db.deploy.source import Source
from db.errors import DeployError
from jobs.worker import Handler
from tests.simulation.loop import Process
from tests.simulation.wires import Cursor, Wire

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

SERVER = {
    "autovacuum": "off",
    # The schedule sees a circle itself, and a process that looks for one now and then could not be held still.
    "deadlock_timeout": "1h",
    "plan_cache_mode": "force_generic_plan",
    # Each process has some thirty at most; one refused would be a fault that no seed has drawn.
    "max_connections": "400",
}
PREFIX = "surety_simulation"
SWEEP_EVERY = 100
WHOLE_DEPLOYS = 0.2
FEW_FUNCTIONS = 5

TIME = "select statement_timestamp() + coalesce((select clock.ahead from surety.clock), interval '0');"
# A constant month, for what looks into a table would not be expanded where it is called.
CLOCK = """
    select timestamptz '{month}' + coalesce(nullif(current_setting('simulation.ahead', true), ''), '0')::interval;
"""
SETUP = (
    "update surety.environment set kind = 'test', created_at = date_trunc('month', now())",
    "create schema simulation",
    # What can't be done twice unseen, nor left out.
    "create table simulation.effects (event_id text not null)",
    """
    create function simulation.count_effects(p_batch bigint, p_fence bigint, p_event_ids text[]) returns boolean
    language plpgsql as $$
    begin
        -- Nothing but the fence keeps back who has lost the batch.
        insert into simulation.effects (event_id) select unnest(p_event_ids);
        return outbox.finish(p_batch, p_fence, p_event_ids);
    end;
    $$
    """,
    """
    insert into outbox.handlers (handler, event_types, batch_size, batches_at_once, epoch, seen)
    select 'probe', array_agg('payment.' || state) || '{webhook.received}', 3, 2, outbox.epoch(), '1:1:'
    from surety.states
    """,
    """
    create function simulation.tell(p_lie text, p_payment text) returns text
    language plpgsql as $$
    -- The code with which a lie is refused, null if it is believed; it is taken back in any case.
    begin
        execute p_lie using p_payment;
        set constraints all immediate;
        raise exception using errcode = 'SIM00';
    exception when others then
        return nullif(sqlstate, 'SIM00');
    end;
    $$
    """,
)


SCHEMAS = "('surety', 'ledger', 'outbox', 'audit', 'procrastinate', 'simulation')"
TABLES = f"""
select format('%I.%I', n.nspname, c.relname)
from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
where n.nspname in {SCHEMAS} and c.relkind = 'r'
"""
SEQUENCES = f"select format('%I.%I', schemaname, sequencename) from pg_sequences where schemaname in {SCHEMAS}"
# Statement by statement, so that their plans last.
EMPTY = """
create function simulation.empty() returns void
language plpgsql as $$
begin
    {statements}
    update outbox.handlers set seen = pg_current_snapshot(), goal = null, at_xid = '0', at_id = '';
end;
$$
"""


def altered() -> Source:
    """What is deployed here."""
    source = Source.installed()
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    alter(source, "surety.time_now", TIME, CLOCK.format(month=month))
    # Each month ahead costs every plan a little.
    alter(source, "surety.maintain_partitions", "default 3", "default 1")
    return source


def alter(source: Source, function: str, before: str, after: str) -> None:
    """Deploy a function with another text."""
    assert any(one.identity == function and before in one.text for one in source.statements), function
    vars(source)["statements"] = [
        replace(one, text=one.text.replace(before, after)) if one.identity == function else one
        for one in source.statements
    ]


def lay(url: str) -> None:
    """Deploy all that a ground needs; it can be copied then."""
    deploy(url, altered())
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        for statement in SETUP:
            conn.execute(statement.encode())
        # What holds rows by now is law; the rest goes after each schedule.
        rest = [
            name for name in names(conn, TABLES) if not conn.execute(f"select from {name} limit 1".encode()).rowcount
        ]
        statements = [f"delete from {name};" for name in rest]
        statements += [f"perform setval('{name}', 1, false);" for name in names(conn, SEQUENCES)]
        conn.execute(EMPTY.format(statements="\n    ".join(statements)).encode())


def names(conn: psycopg.Connection[Any], query: str) -> list[str]:
    """What a query finds, one name a row."""
    return [name for (name,) in conn.execute(query.encode())]


class Ground:
    """One database, laid, and connections to it; `is_ours` if nobody else has a process on its server.

    A schedule and the server's processes take turns, so on one and the same processor nobody has to be woken up on
    another.
    """

    def __init__(self, url: str, *, is_ours: bool, processor: int | None = None) -> None:
        self.is_ours = is_ours
        self.processor = processor
        self.url = harden(url, "deploy")
        self._source = altered()
        self.overseer = psycopg.connect(self.url, autocommit=True, prepare_threshold=0)
        self.overseer.prepared_max = None
        # Its triggers are set aside for good: whoever changes that forgets all his plans.
        self.sweeper = psycopg.connect(self.url, autocommit=True)
        self.sweeper.execute("set session_replication_role = replica")
        for pid in (os.getpid(), self.overseer.pgconn.backend_pid, self.sweeper.pgconn.backend_pid):
            self.bind(pid)
        self.wires: list[Wire] = []
        self.free: list[Wire] = []
        self.used = 0
        self.batch_size: int | None = None
        rows = self.rows("select handler, event_types, batch_size, lease_seconds from outbox.list_handlers()")
        self.handlers = {row[0]: Handler(*row) for row in rows}

    def bind(self, pid: int) -> None:
        """Keep a process on the schedule's processor."""
        if self.is_ours and self.processor is not None:
            os.sched_setaffinity(pid, {self.processor})

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the overseer sees, who is no part of the schedule."""
        return self.overseer.execute(query.encode(), values or None).fetchall()

    def let_batches_hold(self, events: int) -> None:
        """How many events a batch holds: few, so that it is seldom the whole of what waits, or as many as there are."""
        if self.batch_size == events:
            return
        for name, handler in self.handlers.items():
            self.handlers[name] = msgspec.structs.replace(handler, batch_size=events)
        # Where a claim is open, it stays as it is for now: the overseer waits for nobody.
        told = self.rows(
            "update outbox.handlers set batch_size = %s where handler in"
            " (select handler from outbox.handlers for update skip locked) returning handler",
            events,
        )
        self.batch_size = events if len(told) == len(self.handlers) else None

    def deploy_again(self, chance: random.Random) -> bool:
        """Replace functions by the same ones, beside whatever is open: who has called one calls another now.

        Seldom all of them, by a whole deploy, for after one every connection plans all anew; else a few, as it would.
        False if it gave way to who holds a lock, for he can't go on before it has; time stands still meanwhile.
        """
        if chance.random() < WHOLE_DEPLOYS:
            try:
                deploy(self.url, self._source, force=True, lock_seconds_max=-1)
            except DeployError as error:
                if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                    raise
                return False
            return True
        functions = [one for one in self._source.statements if one.kind == "function"]
        texts = [one.text.rstrip(";") for one in chance.sample(functions, FEW_FUNCTIONS)]
        self.overseer.execute("; ".join(texts).encode(), prepare=False)
        return True

    def move_clock(self, seconds: float) -> None:
        """Let the overseer see the schedule's time."""
        self.overseer.execute(f"set simulation.ahead = '{seconds:.6f} s'".encode())

    def empty(self, seed: int) -> None:
        """Begin anew; chance inside the database follows from the seed too."""
        if self.used % SWEEP_EVERY == 0:
            self.sweeper.execute("vacuum (analyze)")
        self.used += 1
        self.sweeper.execute("select simulation.empty()")
        self.move_clock(0)
        # Merchants' ids are the overseer's, and locks are taken in their order.
        self.overseer.execute(f"set seed = {fraction(seed, -1)}".encode(), prepare=False)
        for wire in self.wires:
            if wire.schedule is not None:
                wire.tidy()
            wire.schedule, wire.before = None, ()
            wire.is_seeded = False
        self.free = self.wires[::-1]

    def lease(self, schedule: Schedule, process: Process) -> Wire:
        """A connection for a process."""
        if not self.free:
            wire = waiting.wait_conn(Wire._connect_gen(self.url), interval=0.1)
            wire._autocommit = True
            self.bind(wire.pgconn.backend_pid)
            # As if it had worked for long.
            wire.prepare_threshold, wire.prepared_max = 0, None
            wire.cursor_factory = Cursor
            self.wires.append(wire)
            self.free.append(wire)
        wire = self.free.pop()
        assert wire.pgconn.status == ConnStatus.OK
        if not wire.is_seeded:
            wire.is_seeded = True
            wire.before = (f"set seed = {fraction(schedule.plan.seed, self.wires.index(wire))}",)
        wire.schedule, wire.process, wire.is_cut = schedule, process, False
        wire.lease += 1
        # Who held it before may have died in the middle of a statement.
        wire.lock = asyncio.Lock()
        return wire

    def take_back(self, wire: Wire) -> None:
        """A connection that its process has no use for any more."""
        if wire not in self.free:
            if wire.is_cut or (wire.process and wire.process.is_dead) or wire.pgconn.transaction_status:
                wire.tidy()
            schedule, wire.schedule = wire.schedule, None
            self.free.append(wire)
            if schedule is not None:
                schedule.locks.give_up(wire)
                schedule.locks.settle()

    def take_back_all(self, process: Process) -> None:
        """All that a dead process has held."""
        for wire in self.wires:
            if wire.process is process and wire.schedule is not None:
                self.take_back(wire)

    def waits_for_a_lock(self, wire: Wire) -> bool:
        """Whether the server's process of a connection stands in line for a lock."""
        pid = wire.pgconn.backend_pid
        return not (self.is_ours and is_running(pid)) and bool(
            self.rows("select cardinality(pg_blocking_pids(%s)) > 0", pid)[0][0]
        )


class Pool:
    """A process's connections, as jobs.database asks for them."""

    def __init__(self, schedule: Schedule, process: Process) -> None:
        self._schedule = schedule
        self._process = process

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Wire]:
        """One of them."""
        wire = self._schedule.ground.lease(self._schedule, self._process)
        lease = wire.lease
        try:
            yield wire
        finally:
            # Of a process that has died the server has noticed it, and somebody else may have the connection by now.
            if wire.lease == lease:
                self._schedule.ground.take_back(wire)


def is_running(pid: int) -> bool:
    """Whether a process works, or would if there were a processor; False where that is not to be seen."""
    try:
        stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.read(stat, 200).rpartition(b") ")[2].startswith(b"R")
    finally:
        os.close(stat)


def fraction(seed: int, number: int) -> float:
    """A seed for a connection's random()."""
    return ((seed * 7919 + number * 104729) % 1_000_003) / 1_000_003
