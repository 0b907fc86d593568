"""Numbers, times and modes as people read them."""

from __future__ import annotations


def format_age(seconds: float) -> str:
    """A duration: 40 ms, 12 s, 3 min, 5 h, 2 d."""
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def describe_mode(livemode: bool) -> str:
    """live: real money moves; test: no real money moves."""
    return "live: real money moves" if livemode else "test: no real money moves"


def count_noun(number: int, noun: str, plural: str | None = None) -> str:
    """1 dead letter, 2 dead letters."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
