"""The publication of the outbox, for change data capture (docs/change-data-capture.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
from psycopg import errors

CREATE_PUBLICATION: LiteralString = (
    "create publication surety_events for table outbox.events"
    " with (publish = 'insert', publish_via_partition_root = true)"
)
"""Through the root: a reader sees outbox.events whatever partition holds the row, also partitions that are attached
later. Inserts only: a partition that is dropped by retention deletes nothing elsewhere.
"""


def publish_events(conn: psycopg.Connection[Any], say: Callable[[str], None]) -> None:
    """Create the publication unless there is one of its name, whose settings are then the operator's.

    A login that may not create it gets the statement to run; everything else works without it.
    """
    is_due = (
        "select to_regclass('outbox.events') is not null"
        " and not exists (select from pg_publication where pubname = 'surety_events')"
    )
    if conn.execute(is_due).fetchone() != (True,):
        return
    try:
        with conn.transaction():
            conn.execute("set local client_min_messages = error")  # without wal_level = logical it is a warning
            conn.execute(CREATE_PUBLICATION)
    except errors.InsufficientPrivilege:
        say(f"this login may not publish events for change data capture; as one that may: {CREATE_PUBLICATION}")
