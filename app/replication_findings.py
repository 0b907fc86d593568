"""Findings about replication: standbys, change data capture, restored databases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from app.finding import Finding
from app.wording import count_noun, format_age

STANDBY_WAIT_SECONDS_MAX = 5

CLOSED_DATABASES = {
    "cluster": "restored from a dump: nothing is accepted or handled",
    "timeline": "restored from a backup, or a standby took over: nothing is accepted or handled",
    "server": "this server is none of the servers of business: nothing is accepted or handled",
}


def find_restore(state: dict[str, Any]) -> Iterator[Finding]:
    """A database that was restored and is closed, or a copy that was opened for a drill."""
    if state["is_restored"]:
        what = CLOSED_DATABASES.get(state["closed_because"], "restored to an earlier time: nothing is handled")
        yield Finding("restored-elsewhere", 2, what, 'surety restored --reason "…", in a copy surety drill')
    if state["is_drill"]:
        yield Finding("drill-copy", 1, "a copy, opened for a drill: workers call no provider", "surety sandbox")


def are_commits_waiting(state: dict[str, Any]) -> bool:
    """Whether commits wait for a synchronous standby that is missing or does not keep up."""
    replication = state["replication"]
    is_missing = state["sees_all"] and replication["present"] < replication["needed"]
    return is_missing or (replication["waiting_seconds"] or 0) > STANDBY_WAIT_SECONDS_MAX


def find_replication_problems(state: dict[str, Any]) -> Iterator[Finding]:
    """Commits that wait for a synchronous standby, and standbys that would not do business after a takeover.

    A session that is ended meanwhile leaves an unreplicated commit.
    """
    replication = state["replication"]
    if replication["unlisted_standbys"]:
        what = "a standby that takes over does no business until surety restored: no servers are listed"
        yield Finding("unlisted-standby", 1, what, "surety servers ADDRESS…, of the primary and its standbys")
    if not are_commits_waiting(state):
        return
    what = f"commits wait for the standby: {replication['present']} of {replication['needed']} present"
    if replication["waiting"]:
        waiting = count_noun(replication["waiting"], "commit")
        what += f", {waiting} for {format_age(replication['waiting_seconds'])}"
    next_step = f"bring back the standby ({replication['names']}), or change synchronous_standby_names and reload"
    yield Finding("commits-wait-for-standby", 2, what, next_step)


def find_publication_problems(publication: dict[str, Any]) -> Iterator[Finding]:
    """Events that readers of change data capture miss, without an error anywhere."""
    for slot in publication["lost_slots"]:
        what = f"the log for the replication slot {slot} is gone: its reader has missed events"
        yield Finding("lost-slot", 2, what, f"select pg_drop_replication_slot('{slot}'), then a new snapshot")
    for slot in publication["lost_standby_slots"]:
        what = f"the log for the standby of the replication slot {slot} is gone: it can't catch up"
        yield Finding("lost-slot", 2, what, f"select pg_drop_replication_slot('{slot}'), then make the standby anew")
    if publication["exists"] and not publication["is_whole"]:
        what = "the publication surety_events leaves events out, or names their partitions"
        yield Finding("event-publication", 2, what, "drop publication surety_events, then surety deploy")
