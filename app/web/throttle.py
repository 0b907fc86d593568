"""A limit by second, so that a flood of requests can't fill a table or a log."""

from __future__ import annotations

import time


class PerSecondThrottle:
    """Allows a number of actions per second."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._second = 0
        self._allowed = 0

    def allows(self) -> bool:
        """Whether one more action is allowed now."""
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._allowed = now, 0
        if self._allowed >= self._most:
            return False
        self._allowed += 1
        return True
