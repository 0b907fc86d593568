"""The database under a schedule, emptied between thousands of schedules.

Three things differ from production. surety.time_now() reads a setting of the session that follows the schedule's
clock, so a replay reads the very same instants. There is one more handler, `probe`: it counts its effects, so a
repeated effect is visible. And in most schedules of months a partition is for three months.
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
from db.deploy.source import VersionFiles
from db.errors import DeployError
from jobs.worker import HandlerSettings
from tests.simulation.connections import Cursor, SimulatedConnection
from tests.simulation.loop import Process

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

SERVER = {
    "autovacuum": "off",
    # The schedule detects deadlocks itself. A periodic deadlock check would resume suspended backends.
    "deadlock_timeout": "1h",
    "plan_cache_mode": "force_generic_plan",
    # What costs time and is of no use here.
    "constraint_exclusion": "off",
    "max_parallel_workers_per_gather": "0",
    "track_activities": "off",
    "track_counts": "off",
    "update_process_title": "off",
    # Each process has about thirty at most. A refused connection would be a fault outside of the seed.
    "max_connections": "400",
}
PREFIX = "surety_simulation"
VACUUM_EVERY = 100
WHOLE_DEPLOYS = 0.2
FEW_FUNCTIONS = 5

TIME = "select statement_timestamp() + coalesce((select clock.ahead from surety.clock), interval '0');"
# A constant month: a function that reads a table would not be inlined.
CLOCK = """
    select timestamptz '{month}' + coalesce(nullif(current_setting('simulation.ahead', true), ''), '0')::interval;
"""
# Plans take longer with each partition, so most schedules of months have one for three months.
QUARTERS = (
    ("date_trunc('month', surety.time_now()", "date_trunc('quarter', surety.time_now()"),
    ("months => p_months_ahead), '1 month'", "months => 3 * p_months_ahead), '3 months'"),
    ("v_month + interval '1 month'", "v_month + interval '3 months'"),
)
SETUP = (
    "update surety.environment set kind = 'test', created_at = date_trunc('month', now())",
    "create schema simulation",
    # Effects of the probe, one row each.
    "create table simulation.effects (event_id text not null)",
    """
    create function simulation.count_effects(p_batch bigint, p_fence bigint, p_event_ids text[]) returns boolean
    language plpgsql as $$
    begin
        -- Only the fencing token stops a worker that has lost the batch.
        insert into simulation.effects (event_id) select unnest(p_event_ids);
        return outbox.complete_events(p_batch, p_fence, p_event_ids);
    end;
    $$
    """,
    """
    insert into outbox.handlers (handler, meaning, batch_size, batches_at_once, generation, seen)
    values ('probe', 'Counts effects.', 3, 2, outbox.current_restore_generation(), '1:1:')
    """,
    """
    insert into outbox.handler_events (handler, event_type)
    select 'probe', 'payment.' || state from surety.states
    union all
    select 'probe', 'webhook.received'
    """,
    """
    create function simulation.attempt_write(p_statement text, p_payment text) returns text
    language plpgsql as $$
    -- The SQLSTATE with which an illegal write is refused, null if it is accepted. It is rolled back in any case.
    begin
        execute p_statement using p_payment;
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
where n.nspname in {SCHEMAS} and c.relkind in ('r', 'p') and not c.relispartition
"""
SEQUENCES = f"select format('%I.%I', schemaname, sequencename) from pg_sequences where schemaname in {SCHEMAS}"
# Static statements, so that their plans are cached.
EMPTY = """
create function simulation.empty() returns void
language plpgsql as $$
begin
    {statements}
    update outbox.handlers set seen = pg_current_snapshot(), goal = null, at_xid = '0', at_id = '';
end;
$$
"""


def simulated_source(partition_months: int = 1) -> VersionFiles:
    """The source that is deployed in the simulation, with partitions for one month or for three."""
    source = VersionFiles.installed()
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    replace_function_text(source, "surety.time_now", TIME, CLOCK.format(month=month))
    # Each partition ahead makes every plan slower.
    replace_function_text(source, "surety.maintain_partitions", "default 3", "default 1")
    for before, after in QUARTERS if partition_months > 1 else ():
        replace_function_text(source, "surety.maintain_partitions", before, after)
    return source


def replace_function_text(source: VersionFiles, function: str, before: str, after: str) -> None:
    """Deploy a function with another text."""
    assert any(one.identity == function and before in one.text for one in source.statements), (function, before)
    vars(source)["statements"] = [
        replace(one, text=one.text.replace(before, after)) if one.identity == function else one
        for one in source.statements
    ]


def prepare_template(url: str, partition_months: int) -> None:
    """Deploy a template database."""
    deploy(url, simulated_source(partition_months))
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        for statement in SETUP:
            conn.execute(statement.encode())
        # Tables with rows belong to the schema. All others are emptied after each schedule.
        rest = [
            name for name in names(conn, TABLES) if not conn.execute(f"select from {name} limit 1".encode()).rowcount
        ]
        statements = [f"delete from {name};" for name in rest]
        statements += [f"perform setval('{name}', 1, false);" for name in names(conn, SEQUENCES)]
        conn.execute(EMPTY.format(statements="\n    ".join(statements)).encode())


def names(conn: psycopg.Connection[Any], query: str) -> list[str]:
    """The names that a query finds, one in each row."""
    return [name for (name,) in conn.execute(query.encode())]


class SimulatedDatabase:
    """One database and connections to it. `is_own_server`: the server was started for these simulations.

    A schedule and the server's processes take turns, so keeping them on one processor avoids switching.
    """

    def __init__(
        self, url: str, *, is_own_server: bool, partition_months: int = 1, processor: int | None = None
    ) -> None:
        self.is_own_server = is_own_server
        self.partition_months = partition_months
        self.processor = processor
        self.url = harden(url, "deploy")
        self._source = simulated_source(partition_months)
        self.observer = psycopg.connect(self.url, autocommit=True, prepare_threshold=0)
        self.observer.prepared_max = None
        # Triggers stay disabled here: changing the setting would discard all plans.
        self.resetter = psycopg.connect(self.url, autocommit=True)
        self.resetter.execute("set session_replication_role = replica")
        for pid in (os.getpid(), self.observer.pgconn.backend_pid, self.resetter.pgconn.backend_pid):
            self.bind(pid)
        self.connections: list[SimulatedConnection] = []
        self.free: list[SimulatedConnection] = []
        self.used = 0
        self.batch_size: int | None = None
        rows = self.rows("select handler, event_types, batch_size, lease_seconds from outbox.list_handlers()")
        self.handlers = {row[0]: HandlerSettings(*row) for row in rows}

    def bind(self, pid: int) -> None:
        """Keep a process on the schedule's processor."""
        if self.is_own_server and self.processor is not None:
            os.sched_setaffinity(pid, {self.processor})

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of a query by the observer, a connection outside of the schedule."""
        return self.observer.execute(query.encode(), values or None).fetchall()

    def set_batch_size(self, events: int) -> None:
        """Set the batch size of all handlers: small, so that a batch seldom holds all waiting events, or unlimited."""
        if self.batch_size == events:
            return
        for name, handler in self.handlers.items():
            self.handlers[name] = msgspec.structs.replace(handler, batch_size=events)
        # A handler with an open claim keeps its size for now: the observer waits for no lock.
        result = self.rows(
            "update outbox.handlers set batch_size = %s where handler in"
            " (select handler from outbox.handlers for update skip locked) returning handler",
            events,
        )
        self.batch_size = events if len(result) == len(self.handlers) else None

    def redeploy(self, chance: random.Random) -> bool:
        """Replace functions by identical ones beside open transactions.

        Seldom all of them by a whole deploy, because every connection plans everything again after one; else a few.
        False if the deploy gave up waiting for a lock: the lock's holder can't continue while the deploy waits.
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
        self.observer.execute("; ".join(texts).encode(), prepare=False)
        return True

    def move_clock(self, seconds: float) -> None:
        """Set the schedule's time for the observer."""
        self.observer.execute(f"set simulation.ahead = '{seconds:.6f} s'".encode())

    def empty(self, seed: int) -> None:
        """Empty the database for a new schedule. Random values inside of the database follow from the seed as well."""
        if self.used % VACUUM_EVERY == 0:
            self.resetter.execute("vacuum (analyze)")
        self.used += 1
        self.resetter.execute("select simulation.empty()")
        self.move_clock(0)
        # The observer creates the merchants' ids, and locks are taken in the order of ids.
        self.observer.execute(f"set seed = {fraction(seed, -1)}".encode(), prepare=False)
        for connection in self.connections:
            if connection.schedule is not None:
                connection.reset_session()
            connection.schedule, connection.before = None, ()
            connection.is_seeded = False
        self.free = self.connections[::-1]

    def lease(self, schedule: Schedule, process: Process) -> SimulatedConnection:
        """A connection for a process."""
        if not self.free:
            connection = waiting.wait_conn(SimulatedConnection._connect_gen(self.url), interval=0.1)
            connection._autocommit = True
            self.bind(connection.pgconn.backend_pid)
            # All statements are prepared, as on a connection that has been used for long.
            connection.prepare_threshold, connection.prepared_max = 0, None
            connection.cursor_factory = Cursor
            self.connections.append(connection)
            self.free.append(connection)
        connection = self.free.pop()
        assert connection.pgconn.status == ConnStatus.OK
        if not connection.is_seeded:
            connection.is_seeded = True
            connection.before = (f"set seed = {fraction(schedule.plan.seed, self.connections.index(connection))}",)
        connection.schedule, connection.process, connection.is_cut = schedule, process, False
        connection.lease += 1
        # Its last process may have died in the middle of a statement.
        connection.lock = asyncio.Lock()
        return connection

    def release(self, connection: SimulatedConnection) -> None:
        """Take back a connection from its process."""
        if connection not in self.free:
            if (
                connection.is_cut
                or (connection.process and connection.process.is_dead)
                or connection.pgconn.transaction_status
            ):
                connection.reset_session()
            schedule, connection.schedule = connection.schedule, None
            self.free.append(connection)
            if schedule is not None:
                schedule.locks.fail_waiter(connection)
                schedule.locks.resume_granted()

    def release_all(self, process: Process) -> None:
        """Take back all connections of a dead process."""
        for connection in self.connections:
            if connection.process is process and connection.schedule is not None:
                self.release(connection)

    def waits_for_a_lock(self, connection: SimulatedConnection) -> bool:
        """Whether a connection's backend waits for a lock."""
        pid = connection.pgconn.backend_pid
        return not (self.is_own_server and is_running(pid)) and bool(
            self.rows("select cardinality(pg_blocking_pids(%s)) > 0", pid)[0][0]
        )


class Pool:
    """A process's connections, with the interface that jobs.database uses."""

    def __init__(self, schedule: Schedule, process: Process) -> None:
        self._schedule = schedule
        self._process = process

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[SimulatedConnection]:
        """Lease a connection."""
        connection = self._schedule.database.lease(self._schedule, self._process)
        lease = connection.lease
        try:
            yield connection
        finally:
            # The connection of a process that died is released already, and may be leased to another process.
            if connection.lease == lease:
                self._schedule.database.release(connection)


def is_running(pid: int) -> bool:
    """Whether a process is running or runnable. False where the system doesn't show it."""
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
