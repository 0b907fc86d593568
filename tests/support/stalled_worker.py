"""The workers' app for watchdog tests: a short database timeout, and a task that blocks the event loop."""

from __future__ import annotations

import time

from db import connect

connect.ANSWER_SECONDS_MAX["worker"] = 1.5

from jobs import app  # noqa: E402  its pool is created with that timeout

__all__ = ["app"]


@app.task(name="block", queue="outbox")
async def block() -> None:
    """Let nothing else happen in this process."""
    time.sleep(600)  # noqa: ASYNC251  that is the point
