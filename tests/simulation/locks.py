"""Who waits for whose lock: who waits is held still, and one at a time is let go on, in the order of their coming."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule
    from tests.simulation.wires import Wire


class Locks:
    """The connections of a schedule that stand in line for a lock, each with what wakes it."""

    def __init__(self, schedule: Schedule) -> None:
        self.waiting: dict[Wire, asyncio.Future[None]] = {}
        self._schedule = schedule

    async def blocked(self, wire: Wire) -> None:
        """Wait, beside the others, until the lock that a connection stands in line for is granted."""
        self._schedule.note("blocked", wire.process.name if wire.process else "", wire.doing)
        freed = self.waiting[wire] = self._schedule.loop.create_future()
        if len(self.waiting) > 1 and not self._break_circle(wire):
            wire.hold_still(True)
        try:
            await freed
        finally:
            if self.waiting.get(wire) is freed:
                del self.waiting[wire]

    def give_up(self, wire: Wire) -> None:
        """Nobody waits for a lock any more on this connection: whoever did is dead, and what he did is rolled back."""
        freed = self.waiting.pop(wire, None)
        if freed is not None and not freed.done():
            freed.set_exception(Killed())

    def settle(self) -> None:
        """Let go on who has got his lock by now."""
        if not self.waiting:
            return
        for wire, future in list(self.waiting.items()):
            if future.done() or (wire.is_still and self._schedule.ground.waits_for_a_lock(wire)):
                continue
            wire.hold_still(False)
            if wire.has_answered():
                future.set_result(None)
            elif wire is not next(iter(self.waiting)):
                wire.hold_still(True)
        waiting = [wire for wire, future in self.waiting.items() if not future.done()]
        if len(waiting) > 1:
            self._break_circle(waiting[-1])

    def _break_circle(self, wire: Wire) -> bool:
        """Whether those who wait wait for each other; then this one gives up."""
        if not self._is_deadlocked():
            return False
        self._schedule.violate("nobody waits in a circle", ", ".join(other.doing for other in self.waiting))
        wire.hold_still(False)
        wire.cancel()
        self.waiting[wire].set_result(None)
        return True

    def _is_deadlocked(self) -> bool:
        """Whether those who wait wait for each other."""
        pids = [wire.pgconn.backend_pid for wire in self.waiting]
        waits = dict(
            self._schedule.ground.rows("select pid, pg_blocking_pids(pid) from unnest(%s::integer[]) as p (pid)", pids)
        )

        def leads_back(start: int, at: int, seen: set[int]) -> bool:
            for following in waits.get(at, []):
                if following == start or (following not in seen and leads_back(start, following, seen | {following})):
                    return True
            return False

        return any(leads_back(pid, pid, {pid}) for pid in pids)
