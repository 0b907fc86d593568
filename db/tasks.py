"""The end of asyncio tasks.

One cancellation is not enough. The pools of connections wait by asyncio.wait_for, and that of Python 3.11 discards a
cancellation that comes together with its result: the task goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
from typing import Any

# Above the 5 s that psycopg waits for the end of a canceled statement, so that this is not interrupted.
CANCEL_AGAIN_SECONDS = 6.0


async def cancel_and_wait(*tasks: asyncio.Task[Any], again_seconds: float = CANCEL_AGAIN_SECONDS) -> None:
    """Cancel tasks, repeatedly, and wait for their end. Their results and errors are dropped."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again_seconds)
    await asyncio.gather(*tasks, return_exceptions=True)
