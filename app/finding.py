"""A finding: a problem that a status report shows."""

from __future__ import annotations

from typing import Literal, NamedTuple

FindingId = Literal[
    "no-primary",
    "commits-wait-for-standby",
    "no-worker",
    "handler-behind",
    "handler-paused",
    "dead-letters",
    "critical-discrepancies",
    "discrepancies",
    "unknown-outcomes",
    "access-refused",
    "key-permissions",
    "key-of-another-account",
    "merchant-on-own-account",
    "refused-payments",
    "held-payments",
    "waiting-events",
    "unfinished-objects",
    "periodic-job-failing",
    "periodic-job-late",
    "list-unreadable",
    "webhooks-missing",
    "circuit-open",
    "old-transaction",
    "prepared-transaction",
    "replication-slot",
    "lost-slot",
    "event-publication",
    "standby-behind",
    "replica-unusable",
    "unlisted-standby",
    "restored-elsewhere",
    "drill-copy",
    "expiring-keys",
    "partitions-run-out",
    "database-unreachable",
    "not-deployed",
    "status-unreadable",
    "settings-invalid",
    "invariant-violated",
]
"""Each is a heading of the runbook, which a test compares."""


class Finding(NamedTuple):
    """A problem: its heading in the runbook, its urgency (1 look, 2 act), a description, and the next step."""

    id: FindingId
    urgency: int
    what: str
    next: str
