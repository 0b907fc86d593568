"""A connection under a schedule: it takes turns, can be cut, and its waits for locks are visible to the schedule."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction, waiting
from psycopg.pq import ExecStatus, TransactionStatus

from tests.simulation.loop import PROCESS, Process
from tests.simulation.outages import CIRCUIT_STATEMENTS, check_failures_uncounted, find_open_circuits

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

QUIET_MS = 1


class Cursor(AsyncCursor[Any]):
    """Reports each statement to its connection."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        connection = self._conn
        assert isinstance(connection, SimulatedConnection)
        connection.note_statement(query, params)
        return await super().execute(query, params, **options)


class SimulatedConnection(AsyncConnection[Any]):
    """A connection that a schedule owns: each statement waits for its turn and may be cut off at its boundaries.

    A statement outside of a transaction gets one of its own, whose commit is a turn again: so transactions of several
    processes are really open side by side, and one that waits for another's lock is noticed and left waiting.
    """

    schedule: Schedule | None = None
    process: Process | None = None
    is_cut = False
    is_suspended = False
    is_seeded = False
    lease = 0
    has_waited = False
    has_locked = False
    stays_open = False
    is_cut_before_commit = False
    doing = ""
    last_time_sent = ""
    before: tuple[str, ...] = ()

    def note_statement(self, query: Any, params: Any) -> None:
        """Note the next statement."""
        text = query.decode() if isinstance(query, bytes) else str(query)
        self.doing = text.split("(", 1)[0].split()[-1] if "(" in text else text.split()[0]
        self.has_locked |= self.doing == "surety.take_lock"
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
            # A rollback undoes the notes of its transaction.
            if self.doing != "commit":
                self.last_time_sent = ""

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
        if schedule.draw_fault("cut_before"):
            raise self.cut()
        is_alone = self.pgconn.transaction_status == TransactionStatus.IDLE and self.doing != "transaction"
        opens = is_alone and self.draw_open_transaction(schedule)
        self.send_time(schedule.loop.seconds, opens)
        try:
            result = await self.do(gen, opens)
        except psycopg.Error as error:
            self.last_time_sent = ""
            if not self.is_cut:
                schedule.on_error(self.doing, error)
                if opens:
                    self.run("rollback")
            raise
        finally:
            # Within a transaction no lock is released that others wait for.
            if self.pgconn.transaction_status != TransactionStatus.INTRANS:
                schedule.locks.resume_granted()
        if schedule.draw_fault("cut_after"):
            raise self.cut()
        return result

    def draw_open_transaction(self, schedule: Schedule) -> bool:
        """Whether an autocommit statement gets a transaction that stays open meanwhile, or is cut before its commit."""
        self.stays_open, self.is_cut_before_commit = schedule.keeps_transaction_open(), schedule.draw_fault("cut_open")
        return self.stays_open or self.is_cut_before_commit

    async def do(self, gen: Any, opens: bool) -> Any:
        """Run a statement, and its commit where that is a turn of its own."""
        schedule, process = self.schedule, self.process
        assert schedule is not None and process is not None
        found = (
            find_open_circuits(schedule.database) if self.doing in CIRCUIT_STATEMENTS and not schedule.is_calm else None
        )
        self.has_waited = False
        result = await self.drive(gen)
        if opens:
            await self.commit_in_turn(schedule, process)
        if found is not None and not self.has_waited:
            check_failures_uncounted(schedule, found)
        return result

    async def commit_in_turn(self, schedule: Schedule, process: Process) -> None:
        """Commit, possibly after other turns, unless the connection is cut first."""
        if self.stays_open:
            await schedule.turn(process, f"{self.doing}: commit")
            if self.is_cut:
                raise psycopg.OperationalError("the connection is closed")
        if self.is_cut_before_commit:
            raise self.cut()
        self.run("commit")

    def send_time(self, seconds: float, opens: bool) -> None:
        """Set the server's simulated time before the next statement."""
        if self.pgconn.transaction_status == TransactionStatus.INERROR:
            return
        output = f"set simulation.ahead = '{seconds:.6f} s'"
        commands = [*self.before, *([output] if output != self.last_time_sent else []), *(["begin"] if opens else [])]
        self.before = ()
        if commands:
            self.run("; ".join(commands))
        self.last_time_sent = output

    def run(self, command: str) -> None:
        """Run a short statement that waits for no lock."""
        result = self.pgconn.exec_(command.encode())
        if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
            raise psycopg.errors.error_from_result(result)

    def cut(self) -> psycopg.OperationalError:
        """Cut the connection: the server rolls back the open transaction."""
        self.is_cut = True
        self.reset_session()
        return psycopg.OperationalError("server closed the connection unexpectedly")

    async def drive(self, gen: Any) -> Any:
        """Run psycopg's own protocol. A wait for another transaction's lock is left to the schedule."""
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
        """True once the server has answered, False once it waits for a lock. One of both happens soon."""
        assert self.schedule is not None
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        quiet_ms = QUIET_MS
        while not poll.poll(quiet_ms):
            if self.schedule.database.waits_for_a_lock(self):
                return bool(poll.poll(0))
            # A long-running backend is polled less often.
            quiet_ms *= 2
        return True

    def suspend_backend(self, still: bool) -> None:
        """Suspend or resume the waiting backend, so that of several freed by one commit exactly one goes first."""
        assert self.schedule is not None
        if still != self.is_suspended and self.schedule.database.is_own_server:
            self.is_suspended = still
            os.kill(self.pgconn.backend_pid, signal.SIGSTOP if still else signal.SIGCONT)

    def reset_session(self) -> None:
        """Reset the session as after a client's death: no transaction, no lock."""
        if self.is_suspended:
            self.suspend_backend(False)
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            self.cancel()
            while self.pgconn.get_result() is not None:
                pass
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            self.run("rollback")
            self.last_time_sent = ""
        self._num_transactions = 0
        if self.has_locked:
            self.has_locked = False
            self.run("select pg_advisory_unlock_all(); reset idle_session_timeout")

    async def close(self) -> None:
        """Close the connection. A task that still waits for its turn on it fails; no other process uses it again."""
        if self.schedule is None:
            await super().close()
        elif self.process is PROCESS.get() and not self.is_cut:
            self.is_cut = True
            self.reset_session()
            self.schedule.locks.fail_waiter(self)
            self.schedule.locks.resume_granted()
