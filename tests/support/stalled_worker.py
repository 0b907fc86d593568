"""The workers' app as tests need it to see it ail: short of patience, with a task that stops the event loop."""

from __future__ import annotations

import time

from db import connect

connect.ANSWER_SECONDS_MAX["worker"] = 1.5

from jobs import app  # noqa: E402  its pool is made with that patience

__all__ = ["app"]


@app.task(name="block", queue="outbox")
async def block() -> None:
    """Let nothing else happen in this process."""
    time.sleep(600)  # noqa: ASYNC251  that is the point
