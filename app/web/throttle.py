"""A bound in time, so that a flood of what must be written down can do no harm."""

from __future__ import annotations

import time


class PerSecondThrottle:
    """Lets so many through in a second, and counts the rest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._second = 0
        self._allowed = 0
        self.suppressed = 0

    def allows(self) -> bool:
        """Whether one more may pass."""
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._allowed = now, 0
        if self._allowed >= self._most:
            self.suppressed += 1
            return False
        self._allowed += 1
        return True
