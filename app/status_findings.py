"""How things stand: what a person should see in what surety.read_status tells, and what to do about it.

`surety status` and GET /v1/operator/status tell the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

BACKLOG_SECONDS_MAX = 300
TRANSACTION_SECONDS_MAX = 600
UNKNOWN_SECONDS_MAX = 300
VACUUM_BLOCKER_XIDS_MAX = 100_000_000
SLOT_BYTES_MAX = 1_000_000_000
PARTITIONS_DAYS_MIN = 21
VERDICTS = ("GOOD", "LOOK", "ACT")


RUNBOOK = "docs/operations.md"

FindingId = Literal[
    "no-worker",
    "handler-behind",
    "handler-paused",
    "dead-letters",
    "critical-discrepancies",
    "discrepancies",
    "unknown-outcomes",
    "circuit-open",
    "old-transaction",
    "prepared-transaction",
    "replication-slot",
    "standby-behind",
    "restored-elsewhere",
    "partitions-run-out",
    "database-unreachable",
    "not-deployed",
    "status-unreadable",
    "settings-invalid",
    "invariant-violated",
]
"""What can be found; each is a heading of the runbook, which a test compares."""


class Finding(NamedTuple):
    """Something that a person should see: its heading in the runbook, how urgent it is (1 look, 2 act), a sentence, and
    the next command or place to look.
    """

    id: FindingId
    urgency: int
    what: str
    next: str


def find_problems(state: dict[str, Any]) -> list[Finding]:
    """What is not as it should be, the most urgent first."""
    found = [
        *find_work_problems(state),
        *find_money_problems(state),
        *(finding for holder in state["holders"] if (finding := find_vacuum_blocker(holder))),
        *(finding for provider in state["providers"] if (finding := find_provider_problem(provider))),
    ]
    if state["is_restored_elsewhere"]:
        found.append(
            Finding(
                "restored-elsewhere", 2, "restored from a dump: nothing is accepted", 'surety restored --reason "…"'
            )
        )
    if days_ahead(state) < PARTITIONS_DAYS_MIN:
        found.append(Finding("partitions-run-out", 2, "partitions run out", "select surety.maintain_partitions()"))
    return sorted(found, key=lambda finding: -finding.urgency)


def find_work_problems(state: dict[str, Any]) -> Iterator[Finding]:
    """Workers, what waits for them, what they gave up on."""
    waiting = [handler for handler in state["handlers"] if handler["backlog"]]
    if not state["workers"]["alive"]:
        yield Finding("no-worker", 2 if waiting else 1, "no worker is alive", "procrastinate --app jobs.app worker")
    for handler in waiting:
        if (handler["oldest_seconds"] or 0) > BACKLOG_SECONDS_MAX:
            what = f"{handler['handler']} is {format_age(handler['oldest_seconds'])} behind"
            yield Finding("handler-behind", 2, what, "more workers, or their logs")
    for handler in state["handlers"]:
        if handler["is_paused"]:
            resume = f'surety handlers resume {handler["handler"]} --reason "…"'
            yield Finding("handler-paused", 1, f"{handler['handler']} is paused", resume)
    letters = state["dead_letters"]
    if letters["open"]:
        oldest = format_age(letters["oldest_seconds"])
        what = f"{count_noun(letters['open'], 'dead letter')}; the oldest has waited {oldest}"
        yield Finding("dead-letters", 1, what, f"surety dead-letters show {letters['first']}")


def find_money_problems(state: dict[str, Any]) -> Iterator[Finding]:
    """Where our records and the provider's differ, and what nobody knows yet."""
    differing = state["discrepancies"]
    if critical := differing["critical"]:
        what = f"{count_noun(critical, 'critical discrepancy', 'critical discrepancies')}: {differing['first']}"
        yield Finding("critical-discrepancies", 2, what, f"surety discrepancies show {differing['first_id']}")
    elif opened := differing["open"]:
        what = f"{count_noun(opened, 'discrepancy', 'discrepancies')}, the first {differing['first']}"
        yield Finding("discrepancies", 1, what, f"surety discrepancies show {differing['first_id']}")
    unknown = state["unknown"]
    if unknown["count"] and unknown["oldest_seconds"] > UNKNOWN_SECONDS_MAX:
        what = (
            f"{count_noun(unknown['count'], 'unknown outcome')}, the oldest for {format_age(unknown['oldest_seconds'])}"
        )
        yield Finding("unknown-outcomes", 1, what, f"surety trace {unknown['first']}")


def find_provider_problem(provider: dict[str, Any]) -> Finding | None:
    """An outage is waited out; one that lasts is looked at."""
    if not provider["open"]:
        return None
    what = f"{provider['provider']} is out for {format_age(provider['open_seconds'])}: {provider['reason']}"
    if provider["accounts"] > 1:
        what += f" ({provider['open']} of {provider['accounts']} accounts)"
    return Finding("circuit-open", 1, what, f"{provider['provider']}'s status page; what waits goes on by itself")


def find_vacuum_blocker(holder: dict[str, Any]) -> Finding | None:
    """What keeps rows from being vacuumed: for long, or for so many transactions that the server may stop."""
    kind, name, seconds = holder["kind"], holder["name"], holder["seconds"] or 0
    is_grave = (holder["xids"] or 0) > VACUUM_BLOCKER_XIDS_MAX
    is_idle_slot = (
        kind == "replication slot" and not holder["is_active"] and ((holder["wal_bytes"] or 0) > SLOT_BYTES_MAX)
    )
    if not (is_grave or seconds > TRANSACTION_SECONDS_MAX or is_idle_slot):
        return None
    where = f" in {holder['database']}" if holder["database"] else ""
    finding_id: FindingId
    match kind:
        case "transaction":
            finding_id = "old-transaction"
            what = f"a transaction of {name} is open for {format_age(seconds)}{where}"
            mend = f"select pg_terminate_backend({holder['pid']})"
        case "prepared transaction":
            finding_id = "prepared-transaction"
            what = f"the prepared transaction {name} has waited {format_age(seconds)}{where}"
            mend = f"rollback prepared '{name}', or commit it{where}"
        case "replication slot":
            finding_id = "replication-slot"
            what = f"nobody reads the replication slot {name}" if is_idle_slot else f"the slot {name} is far behind"
            what += f": it keeps {(holder['wal_bytes'] or 0) / 1e9:.1f} GB"
            mend = f"its reader; or select pg_drop_replication_slot('{name}')"
        case _:
            finding_id = "standby-behind"
            what, mend = f"the standby {name} holds back {holder['xids']} transactions", f"long queries on {name}"
    return Finding(finding_id, 2 if is_grave else 1, what, mend)


def days_ahead(state: dict[str, Any]) -> float:
    """For how long there are partitions; their bounds are ids, which begin with hexadecimal milliseconds."""
    until = int(state["partitions_until"], 16) / 1000
    now = datetime.fromisoformat(state["at"]).astimezone(UTC).timestamp()
    return (until - now) / 86_400


def verdict_of(findings: Sequence[Finding]) -> int:
    """0 good, 1 look, 2 act: as the exit status."""
    return max((finding.urgency for finding in findings), default=0)


def format_age(seconds: float) -> str:
    """A time for people: 40 ms, 12 s, 3 min, 5 h, 2 d."""
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def count_noun(number: int, noun: str, plural: str | None = None) -> str:
    """1 dead letter, 2 dead letters."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
