"""The pace of requests to an account, which all workers share. A request waits for its slot before it is sent."""

from __future__ import annotations

import asyncio

from db.tasks import cancel_and_wait
from jobs.database import WorkerDatabase

YIELD_SECONDS = 0.25
RESERVE = "select surety.reserve_request_slots('stripe', %s, %s, %s, %s)"


class Reservation:
    """Slots that some requests reserve together, in one statement."""

    def __init__(self) -> None:
        self.count = 0
        self.statement: asyncio.Task[list[float]]
        """Its result has the seconds that each of the requests has to wait."""


class RequestSlots:
    """Reserves slots. Urgent requests join a reservation until the statement of the one before it has ended."""

    def __init__(self, database: WorkerDatabase, per_second: float) -> None:
        self._database = database
        self._per_second = per_second
        self._open: dict[str, Reservation] = {}
        """By account, the reservation that requests can join."""
        self._last: dict[str, asyncio.Task[list[float]]] = {}

    async def wait(self, account: str, *, urgent: bool) -> None:
        """Wait until a request to the account may be sent; urgent requests go first. Raises database errors."""
        if not self._per_second:
            return
        if urgent:
            reservation = self._open.get(account) or self._begin_reservation(account)
            place = reservation.count
            reservation.count += 1
            # A request that is canceled leaves its slot unused, as a worker does that dies.
            seconds = await asyncio.shield(reservation.statement)
            await asyncio.sleep(seconds[place])
            return
        while True:
            found = await self._reserve(account, 1, urgent=False)
            await asyncio.sleep(found[0] if found else YIELD_SECONDS)
            if found:
                return

    async def close(self) -> None:
        """End the reservations under way."""
        await cancel_and_wait(*self._last.values(), *(one.statement for one in self._open.values()))

    def _begin_reservation(self, account: str) -> Reservation:
        reservation = self._open[account] = Reservation()
        reservation.statement = asyncio.create_task(self._reserve_together(account, self._last.get(account)))
        return reservation

    async def _reserve_together(self, account: str, before: asyncio.Task[list[float]] | None) -> list[float]:
        if before is not None:
            await asyncio.wait([before])
        reservation = self._open.pop(account)
        self._last[account] = reservation.statement
        return await self._reserve(account, reservation.count, urgent=True) or []

    async def _reserve(self, account: str, count: int, *, urgent: bool) -> list[float] | None:
        seconds: list[float] | None = await self._database.value(RESERVE, account, self._per_second, urgent, count)
        return seconds
