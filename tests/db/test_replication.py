"""Positions in the log, and the judgement about a replica."""

from __future__ import annotations

import pytest

from db.replication import GivenPosition, Position, judge_replica, parse_position

REQUIRED = Position(system=7, timeline=2, lsn=1000)


def test_position_is_the_same_after_a_journey_to_the_client() -> None:
    assert parse_position(REQUIRED.token) == GivenPosition(2, 1000)


@pytest.mark.parametrize(
    "text", [b"", b"-", b"1-", b"-1", b"1-g", b"1-A", b" 1-1", b"1-1\n", b"123456789-1", b"1-" + 17 * b"1", b"1-1-1"]
)
def test_text_that_no_answer_has_is_no_position(text: bytes) -> None:
    assert parse_position(text) is None


@pytest.mark.parametrize(
    ("row", "state"),
    [
        ((True, 7, 2, 1000), "ok"),
        ((True, 7, 2, 1001), "ok"),
        ((True, 7, 2, 999), "behind"),
        ((False, 7, 2, 1000), "promoted"),
        # It holds what a failover has lost, however far it is.
        ((True, 7, 1, 2000), "elsewhere"),
        ((True, 7, 3, 2000), "elsewhere"),
        ((True, 8, 2, 2000), "elsewhere"),
    ],
)
def test_replica_is_judged_by_cluster_timeline_and_position(row: tuple[bool, int, int, int], state: str) -> None:
    assert judge_replica(REQUIRED, row) == state
