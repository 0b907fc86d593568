"""The sandbox's memory: one SQLite file that outlives its process.

`objects` holds every Stripe object and event as JSON, beside the columns that lists and sums use. A request changes
records in memory. One commit writes them together with the answer under the idempotency key and the scheduled actions,
so a killed process leaves all of it or nothing. A commit is in the log (commit_log.py) before the answer leaves, and in
SQLite before the next query that reads more than one row. Neither is synced to the disk: a power failure may lose the
last commits.
"""

import os
import sqlite3
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from app.sandbox.commit_log import ActionRow, Commit, CommitLog, KeyRow, LoggedCommit, ObjectRow, PendingCommits
from app.sandbox.tables import COLUMNS, TABLES, write_commits

CACHED_RECORDS_MAX = 50_000
PENDING_OBJECTS_MAX = 1_000


@dataclass(slots=True)
class StoredObject:
    """One Stripe object with its searchable columns."""

    id: str
    kind: str
    account: str
    created: int
    body: dict[str, Any]
    parent: str = ""
    label: str = ""
    currency: str = ""
    net: int = 0
    available_on: int = 0
    payout: str = ""
    seq: int = 0


@dataclass(slots=True, frozen=True, order=True)
class ScheduledAction:
    """The action `what` on the object `subject` at a time, Unix seconds."""

    due: float
    seq: int
    what: str
    subject: str
    attempt: int = 1


@dataclass(slots=True, frozen=True)
class StoredResponse:
    fingerprint: bytes
    status: int
    body: bytes
    request_id: str
    created: float


@dataclass(slots=True)
class Bounds:
    """A range of creation times, Unix seconds, both ends included."""

    first: int = 0
    last: int = 2**62


@dataclass(slots=True)
class _Changes:
    """The changes since the last commit."""

    records: dict[str, StoredObject] = field(default_factory=dict)
    events: dict[str, ObjectRow] = field(default_factory=dict)
    keys: list[KeyRow] = field(default_factory=list)
    scheduled: list[ActionRow] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    tallies: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.records or self.events or self.keys or self.scheduled or self.done or self.tallies)

    def rows(self) -> Commit:
        """The changes as rows."""
        objects = [_row(record, encode(record.body).decode()) for record in self.records.values()]
        objects += self.events.values()
        return Commit(objects, self.keys, self.scheduled, self.done, self.tallies)


encode = msgspec.json.encode
decode = msgspec.json.decode


class Memory:
    """Everything the sandbox stores. Not thread-safe."""

    def __init__(self, path: Path, seed: int) -> None:
        self.seed = seed
        self._file = sqlite3.connect(path, isolation_level=None)
        self._file.executescript(
            "pragma locking_mode = exclusive; pragma journal_mode = wal; pragma synchronous = off;"
            "pragma cache_size = -65536; pragma wal_autocheckpoint = 8000;" + TABLES
        )
        self._cache: dict[str, StoredObject] = {}
        self._changes = _Changes()
        self._pending = PendingCommits()
        self._log = CommitLog(None if str(path) == ":memory:" else path.with_name(f"{path.name}-commits"))
        self._id = self._identity()
        self._commits = self._number("select coalesce(max(value), 0) from numbers where name = 'commits'")
        self._restore()
        self._object_seq = self._number("select coalesce(max(seq), 0) from objects")
        self._action_seq = self._number("select coalesce(max(seq), 0) from scheduled_actions")
        row = self._file.execute("select value from numbers where name = 'clock_offset'").fetchone()
        self._clock_offset: float = row[0] if row else 0.0

    def close(self) -> None:
        self.commit()
        self._write_pending()
        self._file.close()
        self._log.close()

    def has_mode(self, *, livemode: bool) -> bool:
        """Whether this memory is of a mode; a new memory takes it."""
        self._file.execute("insert or ignore into numbers values ('livemode', ?)", (livemode,))
        row = self._file.execute("select value from numbers where name = 'livemode'").fetchone()
        return bool(row[0]) is livemode

    # Time

    def now(self) -> float:
        """The sandbox's time, Unix seconds: the real time plus the advances of its clock."""
        return time.time() + self._clock_offset

    def advance(self, seconds: float) -> None:
        self._clock_offset += seconds
        self._file.execute("replace into numbers values ('clock_offset', ?)", (self._clock_offset,))

    # Objects

    def unused_id(self, prefix: str, *identity: object) -> str:
        """An id derived from the seed and the identity, so that the same run gives the same ids."""
        for turn in range(1_000_000):
            text = ":".join(map(str, (self.seed, prefix, *identity, turn)))
            digest = b64encode(blake2b(text.encode(), digest_size=18).digest(), b"xy").decode()
            id = f"{prefix}_{digest}"
            if not self._is_used(id):
                return id
        raise AssertionError("a million ids of one identity")

    def _is_used(self, id: str) -> bool:
        if id in self._cache or id in self._changes.events or id in self._pending.objects:
            return True
        return self._file.execute("select 1 from objects where id = ?", (id,)).fetchone() is not None

    def next_seq(self) -> int:
        self._object_seq += 1
        return self._object_seq

    def save(self, record: StoredObject) -> StoredObject:
        """Write the record's content at the next commit."""
        if not record.seq:
            record.seq = self.next_seq()
        self._cache[record.id] = record
        self._changes.records[record.id] = record
        return record

    def save_event(self, record: StoredObject, text: str) -> None:
        """Write an event at the next commit; its JSON is not kept decoded."""
        record.seq = self.next_seq()
        self._changes.events[record.id] = _row(record, text)

    def find(self, id: str) -> StoredObject | None:
        record = self._cache.get(id)
        if record is None:
            row = self._committed_row(id)
            if row is None:
                return None
            record = _record(row)
            if record.kind != "event":
                self._cache[id] = record
        return record

    def get(self, id: str) -> StoredObject:
        record = self.find(id)
        assert record is not None, id
        return record

    def event(self, id: str) -> tuple[int, str, bytes]:
        """An event's sequence number, its payment (or other object), and its JSON."""
        row = self._committed_row(id)
        assert row is not None, id
        return row[0], row[5], row[11].encode()

    def _committed_row(self, id: str) -> ObjectRow | None:
        row: ObjectRow | None = (
            self._pending.objects.get(id)
            or self._file.execute(f"select {COLUMNS} from objects where id = ?", (id,)).fetchone()
        )
        return row

    def list_newest(
        self,
        kind: str,
        account: str,
        *,
        created: Bounds,
        limit: int,
        after: StoredObject | None = None,
        before: StoredObject | None = None,
        **equal: str | list[str] | None,
    ) -> tuple[list[StoredObject], bool]:
        """A page of objects, newest first, and whether there are more in its direction.

        `after` and `before` are the cursors of `starting_after` and `ending_before`; `equal` narrows columns.
        """
        where = ["kind = ?", "account = ?", "created >= ?", "created <= ?"]
        values: list[Any] = [kind, account, created.first, created.last]
        for column, wanted in equal.items():
            if wanted is not None:
                several = wanted if isinstance(wanted, list) else [wanted]
                where.append(f"{column} in ({', '.join('?' * len(several))})")
                values.extend(several)
        for cursor, sign in ((after, "<"), (before, ">")):
            if cursor is not None:
                where.append(f"(created, seq) {sign} (?, ?)")
                values.extend((cursor.created, cursor.seq))
        direction = "asc" if before is not None and after is None else "desc"
        rows = self._query(
            f"select {COLUMNS} from objects where {' and '.join(where)}"
            f" order by created {direction}, seq {direction} limit ?",
            (*values, limit + 1),
        )
        page = [self._current(row) for row in rows[:limit]]
        if direction == "asc":
            page.reverse()
        return page, len(rows) > limit

    def children(self, parent: str, kind: str) -> list[StoredObject]:
        """Objects of a kind with this parent, oldest first, uncommitted changes included."""
        rows = self._query(f"select {COLUMNS} from objects where parent = ? and kind = ? order by seq", (parent, kind))
        records = {row[1]: self._current(row) for row in rows}
        for record in self._changes.records.values():
            if record.parent == parent and record.kind == kind:
                records[record.id] = record
        return list(records.values())

    def all_of_kind(self, kind: str) -> Iterator[StoredObject]:
        """All objects of a kind in all accounts, oldest first."""
        self._write_pending()
        for row in self._file.execute(f"select {COLUMNS} from objects where kind = ? order by seq", (kind,)):
            yield self._current(row)

    def balance(self, account: str, now: float) -> Iterable[tuple[str, int, int]]:
        """Currency, available and pending amount, minor units."""
        return self._query(
            "select currency, coalesce(sum(net) filter (where available_on <= :now), 0),"
            " coalesce(sum(net) filter (where available_on > :now), 0) from objects"
            " where kind = 'balance_transaction' and account = :account group by currency order by currency",
            {"account": account, "now": now},
        )

    def payable(self, now: float) -> list[tuple[str, str, int]]:
        """Account, currency and sum of the available lines without a payout, minor units."""
        return self._query(
            "select account, currency, sum(net) from objects where kind = 'balance_transaction' and payout = ''"
            " and available_on <= ? and label <> 'payout' group by account, currency having sum(net) > 0",
            (now,),
        )

    def assign_to_payout(self, account: str, currency: str, payout: str, now: float) -> None:
        """Assign the lines that `payable` summed to a payout, as part of the next commit."""
        if not self._file.in_transaction:
            self._write_pending()
            self._begin()
        self._file.execute(
            "update objects set payout = ? where kind = 'balance_transaction' and payout = '' and account = ?"
            " and currency = ? and available_on <= ? and label <> 'payout'",
            (payout, account, currency, now),
        )
        for (id,) in self._file.execute("select id from objects where payout = ?", (payout,)).fetchall():
            if id in self._cache:
                self._cache[id].payout = payout

    # Idempotency keys

    def stored_response(self, account: str, key: str) -> StoredResponse | None:
        pending = self._pending.keys.get((account, key))
        if pending is not None:
            return StoredResponse(*pending[2:])
        row = self._file.execute(
            "select fingerprint, status, body, request_id, created from keys where account = ? and key = ?",
            (account, key),
        ).fetchone()
        return StoredResponse(*row) if row else None

    def store_response(self, account: str, key: str, answer: StoredResponse) -> None:
        self._changes.keys.append(
            (account, key, answer.fingerprint, answer.status, answer.body, answer.request_id, answer.created)
        )

    # Scheduled actions

    def schedule(self, due: float, what: str, subject: str, attempt: int = 1) -> ScheduledAction:
        self._action_seq += 1
        action = ScheduledAction(due, self._action_seq, what, subject, attempt)
        self._changes.scheduled.append((action.seq, due, what, subject, attempt))
        return action

    def finish(self, action: ScheduledAction) -> None:
        self._changes.done.append(action.seq)

    def scheduled_actions(self) -> list[ScheduledAction]:
        return [
            ScheduledAction(*row)
            for row in self._query("select due, seq, what, subject, attempt from scheduled_actions")
        ]

    # Tallies

    def tally(self, name: str, by: int = 1) -> None:
        self._changes.tallies[name] = self._changes.tallies.get(name, 0) + by

    def tallies(self, prefix: str) -> dict[str, int]:
        """Counts by name, without the prefix."""
        self.commit()
        rows = self._query("select name, count from tallies where name >= ? order by name", (prefix,))
        return {name[len(prefix) :]: count for name, count in rows if name.startswith(prefix)}

    # Transactions

    def commit(self) -> None:
        """Make all changes since the last commit outlive this process, together."""
        if not self._changes:
            return
        commit = self._changes.rows()
        if not self._file.in_transaction:
            self._log.append(LoggedCommit(self._id, self._commits + 1, commit))
        self._commits += 1
        self._pending.add(commit)
        self._changes = _Changes()
        if self._file.in_transaction or len(self._pending.objects) >= PENDING_OBJECTS_MAX:
            self._write_pending()
        if len(self._cache) > CACHED_RECORDS_MAX:
            for id in list(self._cache)[: CACHED_RECORDS_MAX // 2]:
                del self._cache[id]

    def _write_pending(self) -> None:
        """Write all commits to SQLite, in one transaction, and empty the log."""
        if self._pending or self._file.in_transaction:
            self._begin()
            write_commits(self._file, self._pending, self._commits)
            self._file.execute("commit")
            self._log.clear()
            self._pending = PendingCommits()

    def rollback(self) -> None:
        """Discard all changes since the last commit, except tallies and the completion of scheduled actions."""
        for id in self._changes.records:
            self._cache.pop(id, None)
        if self._file.in_transaction:
            self._file.execute("rollback")
        self._changes = _Changes(done=self._changes.done, tallies=self._changes.tallies)

    def _restore(self) -> None:
        """Write the commits that a killed process left in the log."""
        for logged in self._log.commits():
            if logged.memory == self._id and logged.number > self._commits:
                self._pending.add(logged.commit)
                self._commits = logged.number
        self._write_pending()
        # Its last commit may be cut off, and the next one must not follow that.
        self._log.clear()

    def _identity(self) -> str:
        row = self._file.execute("select id from identity").fetchone()
        if row is None:
            row = (os.urandom(8).hex(),)
            self._file.execute("insert into identity values (?)", row)
        id: str = row[0]
        return id

    def _query(self, query: str, values: Any = ()) -> list[Any]:
        """All rows of a query that sees every commit."""
        if not self._file.in_transaction:
            self._write_pending()
        return self._file.execute(query, values).fetchall()

    def _begin(self) -> None:
        if not self._file.in_transaction:
            self._file.execute("begin immediate")

    def _current(self, row: ObjectRow) -> StoredObject:
        return self._cache.get(row[1]) or _record(row)

    def _number(self, query: str) -> int:
        (number,) = self._file.execute(query).fetchone()
        return int(number)


def _row(record: StoredObject, text: str) -> ObjectRow:
    return (
        record.seq,
        record.id,
        record.kind,
        record.account,
        record.created,
        record.parent,
        record.label,
        record.currency,
        record.net,
        record.available_on,
        record.payout,
        text,
    )


def _record(row: ObjectRow) -> StoredObject:
    seq, id, kind, account, created, parent, label, currency, net, available_on, payout, body = row
    return StoredObject(
        id, kind, account, created, decode(body), parent, label, currency, net, available_on, payout, seq=seq
    )
