"""How things stand: what a person should see in what surety.read_status tells, and what to do about it.

`surety status` and GET /v1/operator/status tell the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

BACKLOG_SECONDS_MAX = 300
TRANSACTION_SECONDS_MAX = 600
PARTITIONS_DAYS_MIN = 21
VERDICTS = ("GOOD", "LOOK", "ACT")


class Finding(NamedTuple):
    """Something that a person should see: how urgent (1 look, 2 act), what, and the next command or place to look."""

    urgency: int
    what: str
    next: str


def judge(state: dict[str, Any]) -> list[Finding]:
    """What is not as it should be, the most urgent first."""
    found = []
    if state["is_restored_elsewhere"]:
        found.append(Finding(2, "restored from a dump: nothing is accepted", 'surety restored --reason "…"'))
    waiting = [handler for handler in state["handlers"] if handler["backlog"]]
    if not state["workers"]["alive"]:
        urgency = 2 if waiting else 1
        found.append(Finding(urgency, "no worker is alive", "procrastinate --app jobs.app worker"))
    for handler in waiting:
        if (handler["oldest_seconds"] or 0) > BACKLOG_SECONDS_MAX:
            what = f"{handler['handler']} is {age(handler['oldest_seconds'])} behind"
            found.append(Finding(2, what, "more workers, or their logs"))
    if critical := state["discrepancies"]["critical"]:
        what = (
            f"{counted(critical, 'critical discrepancy', 'critical discrepancies')}: {state['discrepancies']['first']}"
        )
        found.append(Finding(2, what, "report.discrepancies"))
    elif opened := state["discrepancies"]["open"]:
        what = f"{counted(opened, 'discrepancy', 'discrepancies')}, the first {state['discrepancies']['first']}"
        found.append(Finding(1, what, "report.discrepancies"))
    letters = state["dead_letters"]
    if letters["open"]:
        what = f"{counted(letters['open'], 'dead letter')}; the oldest has waited {age(letters['oldest_seconds'])}"
        found.append(Finding(1, what, f"surety dead-letters show {letters['first']}"))
    transaction = state["transaction"]
    if transaction and transaction["seconds"] > TRANSACTION_SECONDS_MAX:
        what = f"a transaction is open for {age(transaction['seconds'])} in {transaction['database']}"
        found.append(Finding(1, what, f"select pg_terminate_backend({transaction['pid']})"))
    if days_ahead(state) < PARTITIONS_DAYS_MIN:
        found.append(Finding(2, "partitions run out", "select surety.maintain_partitions()"))
    return sorted(found, key=lambda finding: -finding.urgency)


def days_ahead(state: dict[str, Any]) -> float:
    """For how long there are partitions; their bounds are ids, which begin with hexadecimal milliseconds."""
    until = int(state["partitions_until"], 16) / 1000
    now = datetime.fromisoformat(state["at"]).astimezone(UTC).timestamp()
    return (until - now) / 86_400


def verdict_of(findings: Sequence[Finding]) -> int:
    """0 good, 1 look, 2 act: as the exit status."""
    return max((finding.urgency for finding in findings), default=0)


def age(seconds: float) -> str:
    """A time for people: 40 ms, 12 s, 3 min, 5 h, 2 d."""
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 dead letter, 2 dead letters."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
