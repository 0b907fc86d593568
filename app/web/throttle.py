"""A bound in time, so that a flood of what must be written down can do no harm."""

from __future__ import annotations

import time


class PerSecond:
    """Lets so many through in a second, and counts the rest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._second = 0
        self._let = 0
        self.left_out = 0

    def lets_through(self) -> bool:
        """Whether one more may pass."""
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._let = now, 0
        if self._let >= self._most:
            self.left_out += 1
            return False
        self._let += 1
        return True
