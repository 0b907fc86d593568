"""Positions in the primary's log, and whether a replica has replayed one.

A replica that has replayed a position shows every transaction whose commit was reported before the position was read.
A transaction that does not wait for its commit to reach the disk (synchronous_commit = off) may be later.

A position is compared within one timeline only: a server of an older timeline may hold what a failover has lost. The
timeline of a replica in pg_control_checkpoint() and pg_control_recovery() may be older than the one it replays, never
newer, so a replica that has followed a failover counts as `elsewhere` until it has written one of them.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

ReplicaState = Literal["ok", "behind", "away", "promoted", "elsewhere"]
"""ok         it has replayed the primary's position
behind     it has not, in time
away       it can't be reached or used
promoted   it is no standby
elsewhere  it follows another primary, or the primary before a failover
"""

REPLICA_PROBLEMS: dict[ReplicaState, str] = {
    "behind": "is behind",
    "away": "can't be used",
    "promoted": "is no standby",
    "elsewhere": "follows another primary, or the primary before a failover",
}

# pg_walfile_name begins with the timeline, in hexadecimal digits.
PRIMARY_POSITION = """
select
    cluster.system_identifier,
    ('x' || substr(pg_walfile_name(written.lsn), 1, 8))::bit(32)::bigint,
    (written.lsn - '0/0')::bigint
from pg_control_system() as cluster cross join pg_current_wal_flush_lsn() as written (lsn)
"""
REPLICA_POSITION = """
select
    pg_is_in_recovery(),
    cluster.system_identifier,
    greatest(restart.timeline_id, recovery.min_recovery_end_timeline)::bigint,
    coalesce((pg_last_wal_replay_lsn() - '0/0')::bigint, 0)
from pg_control_system() as cluster
cross join pg_control_checkpoint() as restart
cross join pg_control_recovery() as recovery
"""
TOKEN = re.compile(rb"[0-9a-f]{1,8}-[0-9a-f]{1,16}")


class Position(NamedTuple):
    """A position of the primary's log, `lsn` in bytes; `system` names the cluster."""

    system: int
    timeline: int
    lsn: int

    @property
    def token(self) -> bytes:
        """The position as clients keep it."""
        return b"%x-%x" % (self.timeline, self.lsn)


class GivenPosition(NamedTuple):
    """A position that a client sends."""

    timeline: int
    lsn: int


def parse_position(token: bytes) -> GivenPosition | None:
    """The position of a token; None for another text."""
    if not TOKEN.fullmatch(token):
        return None
    timeline, lsn = token.split(b"-")
    return GivenPosition(int(timeline, 16), int(lsn, 16))


def judge_replica(required: Position, row: tuple[Any, ...]) -> ReplicaState:
    """The state of a replica with this row of REPLICA_POSITION, which should have replayed a position."""
    is_standby, system, timeline, lsn = row
    if not is_standby:
        return "promoted"
    if (system, timeline) != (required.system, required.timeline):
        return "elsewhere"
    return "ok" if lsn >= required.lsn else "behind"
