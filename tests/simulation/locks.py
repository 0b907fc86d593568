"""Waits for locks: waiting backends are suspended, and resumed one at a time in the order of their arrival."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.simulation.connections import SimulatedConnection
    from tests.simulation.schedule import Schedule


class Locks:
    """The connections of a schedule that wait for a lock, each with the future that ends its wait."""

    def __init__(self, schedule: Schedule) -> None:
        self.waiting: dict[SimulatedConnection, asyncio.Future[None]] = {}
        self._schedule = schedule

    async def blocked(self, connection: SimulatedConnection) -> None:
        """Wait until the lock that a connection waits for is granted."""
        self._schedule.note("blocked", connection.process.name if connection.process else "", connection.doing)
        freed = self.waiting[connection] = self._schedule.loop.create_future()
        if len(self.waiting) > 1 and not self._break_deadlock(connection):
            connection.suspend_backend(True)
        try:
            await freed
        finally:
            if self.waiting.get(connection) is freed:
                del self.waiting[connection]

    def fail_waiter(self, connection: SimulatedConnection) -> None:
        """End a connection's wait: its process is dead and its transaction rolled back."""
        freed = self.waiting.pop(connection, None)
        if freed is not None and not freed.done():
            freed.set_exception(Killed())

    def resume_granted(self) -> None:
        """Resume the connections whose lock was granted."""
        if not self.waiting:
            return
        for connection, future in list(self.waiting.items()):
            if future.done() or (connection.is_suspended and self._schedule.database.waits_for_a_lock(connection)):
                continue
            connection.suspend_backend(False)
            if connection.has_answered():
                future.set_result(None)
            elif connection is not next(iter(self.waiting)):
                connection.suspend_backend(True)
        waiting = [connection for connection, future in self.waiting.items() if not future.done()]
        if len(waiting) > 1:
            self._break_deadlock(waiting[-1])

    def _break_deadlock(self, connection: SimulatedConnection) -> bool:
        """Whether there is a deadlock. If so, this connection's statement is canceled."""
        if not self._is_deadlocked():
            return False
        self._schedule.report_violation("there is no deadlock", ", ".join(other.doing for other in self.waiting))
        connection.suspend_backend(False)
        connection.cancel()
        self.waiting[connection].set_result(None)
        return True

    def _is_deadlocked(self) -> bool:
        """Whether the waiting connections wait for each other."""
        pids = [connection.pgconn.backend_pid for connection in self.waiting]
        waits = dict(
            self._schedule.database.rows(
                "select pid, pg_blocking_pids(pid) from unnest(%s::integer[]) as p (pid)", pids
            )
        )

        def leads_back(start: int, at: int, seen: set[int]) -> bool:
            for following in waits.get(at, []):
                if following == start or (following not in seen and leads_back(start, following, seen | {following})):
                    return True
            return False

        return any(leads_back(pid, pid, {pid}) for pid in pids)
