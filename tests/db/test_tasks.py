"""The end of tasks, also of one whose cancellation was lost."""

from __future__ import annotations

import asyncio

from db.tasks import cancel_and_wait


async def wait_and_lose_cancellations(count: int) -> None:
    """A task that goes on after so many cancellations, as if each had come together with a result."""
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            count -= 1
            if count < 0:
                raise


async def test_task_ends_although_cancellations_are_lost() -> None:
    tasks = [asyncio.create_task(wait_and_lose_cancellations(count)) for count in (0, 1, 3)]
    await asyncio.sleep(0)
    await cancel_and_wait(*tasks, again_seconds=0.01)
    assert [task.cancelled() for task in tasks] == [True] * 3


async def test_errors_and_ended_tasks_are_no_obstacle() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    failing = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await cancel_and_wait(failing, again_seconds=0.01)
    await cancel_and_wait()
    assert failing.done()
