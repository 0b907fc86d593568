"""A server of uvicorn that a signal ends in good order at any time. The sandbox and the services share this module."""

from __future__ import annotations

import signal
from types import FrameType

import uvicorn


def stoppable_server(config: uvicorn.Config) -> uvicorn.Server:
    """A server that SIGINT and SIGTERM end in good order from here on: uvicorn hears of them only once its loop runs.

    It raises the signal that stopped it again at its end, when the flag changes nothing.
    """
    server = uvicorn.Server(config)

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return server
