"""The database under a schedule: one for thousands of them, emptied in between.

Two things differ from production. surety.time_now() reads a setting of the session, which follows the schedule's clock:
so time stands still while nobody moves it, and a replay reads the very same instants. And there is a handler more,
`probe`, whose effect can't be repeated unseen: it counts.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction, waiting
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus

from db.connect import harden
from db.deploy import deploy
from db.errors import DeployError
from db.source import Source
from jobs.worker import Handler
from tests.simulation.loop import PROCESS, Process
from tests.simulation.outages import OPENERS, keep_given_back, look

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
QUIET_MS = 4

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
    "create table simulation.emptied (name text not null)",
    """
    create function simulation.empty() returns void
    language plpgsql set session_replication_role = replica as $$
    declare
        v_name text;
    begin
        for v_name in select name from simulation.emptied loop
            execute 'delete from ' || v_name;
        end loop;
        for v_name in
            select format('%I.%I', schemaname, sequencename) from pg_sequences
            where schemaname in ('surety', 'ledger', 'outbox', 'audit')
        loop
            perform setval(v_name, 1, false);
        end loop;
        update outbox.handlers set seen = pg_current_snapshot(), goal = null, at_xid = '0', at_id = '';
    end;
    $$
    """,
)


TABLES = """
select format('%I.%I', n.nspname, c.relname)
from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
where n.nspname in ('surety', 'ledger', 'outbox', 'audit', 'procrastinate', 'simulation') and c.relkind = 'r'
    and c.relname <> 'emptied'
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
        for (name,) in conn.execute(TABLES.encode()).fetchall():
            if conn.execute(f"select from {name} limit 1".encode()).fetchone() is None:
                conn.execute("insert into simulation.emptied (name) values (%s)", (name,))


class Cursor(AsyncCursor[Any]):
    """Tells its connection what it is going to do."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        wire = self._conn
        assert isinstance(wire, Wire)
        wire.begin_doing(query, params)
        return await super().execute(query, params, **options)


class Wire(AsyncConnection[Any]):
    """A connection that a schedule owns: each statement waits for its turn and may be cut off at its boundaries.

    A statement outside of a transaction gets one of its own, whose commit is a turn again: so transactions of several
    processes are really open side by side, and one that waits for another's lock is noticed and left waiting.
    """

    schedule: Schedule | None = None
    process: Process | None = None
    is_cut = False
    is_still = False
    is_seeded = False
    lease = 0
    has_waited = False
    has_locked = False
    stays_open = False
    is_doomed = False
    doing = ""
    told = ""
    before: tuple[str, ...] = ()

    def begin_doing(self, query: Any, params: Any) -> None:
        """Note what is coming."""
        text = query.decode() if isinstance(query, bytes) else str(query)
        self.doing = text.split("(", 1)[0].split()[-1] if "(" in text else text.split()[0]
        self.has_locked |= self.doing == "pg_try_advisory_lock"
        if self.schedule is not None:
            self.schedule.on_statement(self.doing, params)

    @asynccontextmanager
    async def transaction(self, *given: Any, **options: Any) -> AsyncGenerator[AsyncTransaction]:
        self.doing = "transaction"
        try:
            async with super().transaction(*given, **options) as transaction:
                yield transaction
                self.doing = "commit"
        finally:
            # A rollback takes back what was told in it.
            if self.doing != "commit":
                self.told = ""

    async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        schedule = self.schedule
        if schedule is None:
            return waiting.wait(gen, self.pgconn.socket, interval=interval)
        assert self.process is not None
        if self.is_cut:
            raise psycopg.OperationalError("the connection is closed")
        await schedule.turn(self.process, self.doing)
        if self.is_cut:
            raise psycopg.OperationalError("the connection is closed")
        if schedule.lot("cut_before"):
            raise self.cut()
        is_alone = self.pgconn.transaction_status == TransactionStatus.IDLE and self.doing != "transaction"
        opens = is_alone and self.draw_opening(schedule)
        self.tell_time(schedule.loop.seconds, opens)
        try:
            result = await self.do(gen, opens)
        except psycopg.Error as error:
            self.told = ""
            if not self.is_cut:
                schedule.on_error(self.doing, error)
                if opens:
                    self.run("rollback")
            raise
        finally:
            # Within a transaction nothing is let go that others wait for.
            if self.pgconn.transaction_status != TransactionStatus.INTRANS:
                schedule.locks.settle()
        if schedule.lot("cut_after"):
            raise self.cut()
        return result

    def draw_opening(self, schedule: Schedule) -> bool:
        """Whether others see a statement that stands alone before its commit, or its connection is lost by then."""
        self.stays_open, self.is_doomed = schedule.leaves_open(), schedule.lot("cut_open")
        return self.stays_open or self.is_doomed

    async def do(self, gen: Any, opens: bool) -> Any:
        """Run a statement, with its commit if that is an event of its own."""
        schedule, process = self.schedule, self.process
        assert schedule is not None and process is not None
        found = look(schedule.ground) if self.doing in OPENERS else None
        self.has_waited = False
        result = await self.drive(gen)
        if opens:
            await self.commit_in_turn(schedule, process)
        if found is not None and not self.has_waited:
            keep_given_back(schedule, found)
        return result

    async def commit_in_turn(self, schedule: Schedule, process: Process) -> None:
        """Commit, perhaps after others have gone on, unless the connection is lost before."""
        if self.stays_open:
            await schedule.turn(process, f"{self.doing}: commit")
            if self.is_cut:
                raise psycopg.OperationalError("the connection is closed")
        if self.is_doomed:
            raise self.cut()
        self.run("commit")

    def tell_time(self, seconds: float, opens: bool) -> None:
        """Let the server know what time it is, before it does something."""
        if self.pgconn.transaction_status == TransactionStatus.INERROR:
            return
        told = f"set simulation.ahead = '{seconds:.6f} s'"
        commands = [*self.before, *([told] if told != self.told else []), *(["begin"] if opens else [])]
        self.before = ()
        if commands:
            self.run("; ".join(commands))
        self.told = told

    def run(self, command: str) -> None:
        """Something quick that waits for nobody."""
        result = self.pgconn.exec_(command.encode())
        if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
            raise psycopg.errors.error_from_result(result)

    def cut(self) -> psycopg.OperationalError:
        """Lose the connection: the server rolls back what is open."""
        self.is_cut = True
        self.tidy()
        return psycopg.OperationalError("server closed the connection unexpectedly")

    async def drive(self, gen: Any) -> Any:
        """Run psycopg's own protocol; a lock that another transaction holds is waited for beside the others."""
        assert self.schedule is not None
        try:
            state = next(gen)
            while True:
                if state == waiting.WAIT_R and not self.has_answered():
                    self.has_waited = True
                    await self.schedule.locks.blocked(self)
                state = gen.send(waiting.READY_R if state == waiting.WAIT_R else waiting.READY_W)
        except StopIteration as end:
            return end.value

    def has_answered(self) -> bool:
        """Whether the server has answered, False if it waits for somebody's lock; one of both comes true soon."""
        assert self.schedule is not None
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        while not poll.poll(QUIET_MS):
            if self.schedule.ground.waits_for_a_lock(self):
                return bool(poll.poll(0))
        return True

    def hold_still(self, still: bool) -> None:
        """Stop the server's process that waits, or let it go on: of several that one commit frees, one goes first."""
        assert self.schedule is not None
        if still != self.is_still and self.schedule.ground.is_ours:
            self.is_still = still
            os.kill(self.pgconn.backend_pid, signal.SIGSTOP if still else signal.SIGCONT)

    def tidy(self) -> None:
        """As after a client's death: nothing open, nothing locked."""
        if self.is_still:
            self.hold_still(False)
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            self.cancel()
            while self.pgconn.get_result() is not None:
                pass
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            self.run("rollback")
            self.told = ""
        self._num_transactions = 0
        if self.has_locked:
            self.has_locked = False
            self.run("select pg_advisory_unlock_all(); reset idle_session_timeout")

    async def close(self) -> None:
        """Hang up. Whoever still waits for his turn on it is told so: it is nobody else's in this schedule."""
        if self.schedule is None:
            await super().close()
        elif self.process is PROCESS.get() and not self.is_cut:
            self.is_cut = True
            self.tidy()
            self.schedule.locks.give_up(self)
            self.schedule.locks.settle()


class Ground:
    """One database, laid, and connections to it; `is_ours` if nobody else has a process on its server."""

    def __init__(self, url: str, *, is_ours: bool) -> None:
        self.is_ours = is_ours
        self.url = harden(url, "deploy")
        self._source = altered()
        self.overseer = psycopg.connect(self.url, autocommit=True, prepare_threshold=0)
        self.overseer.prepared_max = None
        # Who sets aside the triggers forgets all his plans.
        self.sweeper = psycopg.connect(self.url, autocommit=True)
        self.wires: list[Wire] = []
        self.free: list[Wire] = []
        self.used = 0
        self.batch_size: int | None = None
        rows = self.rows("select handler, event_types, batch_size, lease_seconds from outbox.list_handlers()")
        self.handlers = {row[0]: Handler(*row) for row in rows}

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

    def deploy_again(self) -> bool:
        """Replace all functions by the same ones, beside whatever is open: who has called one calls another now.

        False if it gave way to who holds a lock, for he can't go on before it has; time stands still meanwhile.
        """
        try:
            deploy(self.url, self._source, force=True, lock_seconds_max=-1)
        except DeployError as error:
            if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                raise
            return False
        return True

    def move_clock(self, seconds: float) -> None:
        """Let the overseer see the schedule's time."""
        self.overseer.execute(f"set simulation.ahead = '{seconds:.6f} s'".encode())

    def empty(self) -> None:
        """Begin anew; chance inside the database follows from the seed too."""
        if self.used % SWEEP_EVERY == 0:
            self.sweeper.execute("vacuum (analyze)")
        self.used += 1
        self.sweeper.execute("select simulation.empty()")
        self.move_clock(0)
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
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(") ")[2].startswith("R")


def fraction(seed: int, number: int) -> float:
    """A seed for a connection's random()."""
    return ((seed * 7919 + number * 104729) % 1_000_003) / 1_000_003
