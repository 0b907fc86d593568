"""The sandbox's memory: one SQLite file that outlives its process.

`objects` holds every Stripe object and event as JSON, beside the columns that lists and sums use. A request changes
records in memory. One commit writes them together with the answer under the idempotency key and the scheduled actions,
so a killed process leaves all of it or nothing. Commits reach the file before the answer leaves. They are not synced
to the disk: a power failure may lose the last of them.
"""

import sqlite3
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

CACHED_RECORDS_MAX = 50_000

TABLES = """
create table if not exists objects (
    seq integer primary key,
    id text not null unique,
    kind text not null,
    account text not null,
    created integer not null,
    parent text not null, -- a charge's intent, a refund's or dispute's charge, a line's source, an event's payment
    label text not null, -- a charge's or payout's status, a balance transaction's or event's type
    currency text not null,
    net integer not null, -- what a balance transaction adds to the balance, a dispute's withheld money, minor units
    available_on integer not null,
    payout text not null,
    body text not null
);
create index if not exists objects_newest on objects (kind, account, created, seq);
create index if not exists objects_of_parent on objects (parent, kind) where parent <> '';
create index if not exists objects_not_paid_out on objects (account, currency, available_on)
    where kind = 'balance_transaction' and payout = '';
create index if not exists objects_of_payout on objects (payout) where payout <> '';

create table if not exists keys (
    account text not null,
    key text not null,
    fingerprint blob not null,
    status integer not null,
    body blob not null,
    request_id text not null,
    created real not null,
    primary key (account, key)
) without rowid;

create table if not exists scheduled_actions (
    seq integer primary key,
    due real not null,
    what text not null,
    subject text not null,
    attempt integer not null
);

create table if not exists tallies (name text primary key, count integer not null) without rowid;
create table if not exists numbers (name text primary key, value real not null) without rowid;
"""


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
    records: dict[str, StoredObject] = field(default_factory=dict)
    events: list[tuple[StoredObject, str]] = field(default_factory=list)
    event_ids: set[str] = field(default_factory=set)
    keys: list[tuple[Any, ...]] = field(default_factory=list)
    scheduled: list[ScheduledAction] = field(default_factory=list)
    done: list[tuple[int]] = field(default_factory=list)
    tallies: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.records or self.events or self.keys or self.scheduled or self.done or self.tallies)


COLUMNS = "seq, id, kind, account, created, parent, label, currency, net, available_on, payout, body"
SAVE = f"""
insert into objects ({COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
on conflict (id) do update set parent = excluded.parent, label = excluded.label, net = excluded.net,
    available_on = excluded.available_on, payout = excluded.payout, body = excluded.body
"""

encode = msgspec.json.encode
decode = msgspec.json.decode


class Memory:
    """Everything the sandbox stores. Not thread-safe."""

    def __init__(self, path: Path, seed: int) -> None:
        self.seed = seed
        self._file = sqlite3.connect(path, isolation_level=None)
        self._file.executescript(
            "pragma journal_mode = wal; pragma synchronous = off; pragma cache_size = -65536;"
            "pragma wal_autocheckpoint = 8000;" + TABLES
        )
        self._cache: dict[str, StoredObject] = {}
        self._changes = _Changes()
        self._object_seq = self._number("select coalesce(max(seq), 0) from objects")
        self._action_seq = self._number("select coalesce(max(seq), 0) from scheduled_actions")
        row = self._file.execute("select value from numbers where name = 'clock_offset'").fetchone()
        self._clock_offset: float = row[0] if row else 0.0

    def close(self) -> None:
        self.commit()
        self._file.close()

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
            if id not in self._changes.event_ids and self.find(id) is None:
                return id
        raise AssertionError("a million ids of one identity")

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
        self._changes.events.append((record, text))
        self._changes.event_ids.add(record.id)

    def find(self, id: str) -> StoredObject | None:
        record = self._cache.get(id)
        if record is None:
            row = self._file.execute(f"select {COLUMNS} from objects where id = ?", (id,)).fetchone()
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
        seq, parent, text = self._file.execute("select seq, parent, body from objects where id = ?", (id,)).fetchone()
        return seq, parent, text.encode()

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
        rows = self._file.execute(
            f"select {COLUMNS} from objects where {' and '.join(where)}"
            f" order by created {direction}, seq {direction} limit ?",
            (*values, limit + 1),
        ).fetchall()
        page = [self._current(row) for row in rows[:limit]]
        if direction == "asc":
            page.reverse()
        return page, len(rows) > limit

    def children(self, parent: str, kind: str) -> list[StoredObject]:
        """Objects of a kind with this parent, oldest first, uncommitted changes included."""
        rows = self._file.execute(
            f"select {COLUMNS} from objects where parent = ? and kind = ? order by seq", (parent, kind)
        ).fetchall()
        records = {row[1]: self._current(row) for row in rows}
        for record in self._changes.records.values():
            if record.parent == parent and record.kind == kind:
                records[record.id] = record
        return list(records.values())

    def all_of_kind(self, kind: str) -> Iterator[StoredObject]:
        """All objects of a kind in all accounts, oldest first."""
        for row in self._file.execute(f"select {COLUMNS} from objects where kind = ? order by seq", (kind,)):
            yield self._current(row)

    def balance(self, account: str, now: float) -> Iterable[tuple[str, int, int]]:
        """Currency, available and pending amount, minor units."""
        return self._file.execute(
            "select currency, coalesce(sum(net) filter (where available_on <= :now), 0),"
            " coalesce(sum(net) filter (where available_on > :now), 0) from objects"
            " where kind = 'balance_transaction' and account = :account group by currency order by currency",
            {"account": account, "now": now},
        ).fetchall()

    def payable(self, now: float) -> list[tuple[str, str, int]]:
        """Account, currency and sum of the available lines without a payout, minor units."""
        return self._file.execute(
            "select account, currency, sum(net) from objects where kind = 'balance_transaction' and payout = ''"
            " and available_on <= ? and label <> 'payout' group by account, currency having sum(net) > 0",
            (now,),
        ).fetchall()

    def assign_to_payout(self, account: str, currency: str, payout: str, now: float) -> None:
        """Assign the lines that `payable` summed to a payout, as part of the next commit."""
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
        self._changes.scheduled.append(action)
        return action

    def finish(self, action: ScheduledAction) -> None:
        self._changes.done.append((action.seq,))

    def scheduled_actions(self) -> list[ScheduledAction]:
        return [
            ScheduledAction(*row)
            for row in self._file.execute("select due, seq, what, subject, attempt from scheduled_actions")
        ]

    # Tallies

    def tally(self, name: str, by: int = 1) -> None:
        self._changes.tallies[name] = self._changes.tallies.get(name, 0) + by

    def tallies(self, prefix: str) -> dict[str, int]:
        """Counts by name, without the prefix."""
        self.commit()
        rows = self._file.execute("select name, count from tallies where name >= ? order by name", (prefix,))
        return {name[len(prefix) :]: count for name, count in rows if name.startswith(prefix)}

    # Transactions

    def commit(self) -> None:
        """Write all changes since the last commit in one transaction."""
        changes = self._changes
        if not changes and not self._file.in_transaction:
            return
        self._begin()
        if changes.records:
            self._file.executemany(SAVE, [_row(record, _text(record)) for record in changes.records.values()])
        if changes.events:
            self._file.executemany(SAVE, [_row(record, text) for record, text in changes.events])
        if changes.keys:
            self._file.executemany("replace into keys values (?, ?, ?, ?, ?, ?, ?)", changes.keys)
        if changes.scheduled:
            self._file.executemany(
                "insert into scheduled_actions values (?, ?, ?, ?, ?)",
                [(action.seq, action.due, action.what, action.subject, action.attempt) for action in changes.scheduled],
            )
        if changes.done:
            self._file.executemany("delete from scheduled_actions where seq = ?", changes.done)
        if changes.tallies:
            self._file.executemany(
                "insert into tallies values (?, ?) on conflict (name) do update set count = count + excluded.count",
                changes.tallies.items(),
            )
        self._file.execute("commit")
        self._changes = _Changes()
        if len(self._cache) > CACHED_RECORDS_MAX:
            for id in list(self._cache)[: CACHED_RECORDS_MAX // 2]:
                del self._cache[id]

    def rollback(self) -> None:
        """Discard all changes since the last commit, except tallies and the completion of scheduled actions."""
        for id in self._changes.records:
            self._cache.pop(id, None)
        if self._file.in_transaction:
            self._file.execute("rollback")
        self._changes = _Changes(done=self._changes.done, tallies=self._changes.tallies)

    def _begin(self) -> None:
        if not self._file.in_transaction:
            self._file.execute("begin immediate")

    def _current(self, row: tuple[Any, ...]) -> StoredObject:
        return self._cache.get(row[1]) or _record(row)

    def _number(self, query: str) -> int:
        (number,) = self._file.execute(query).fetchone()
        assert isinstance(number, int)
        return number


def _text(record: StoredObject) -> str:
    return encode(record.body).decode()


def _row(record: StoredObject, text: str) -> tuple[Any, ...]:
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


def _record(row: tuple[Any, ...]) -> StoredObject:
    seq, id, kind, account, created, parent, label, currency, net, available_on, payout, body = row
    return StoredObject(
        id, kind, account, created, decode(body), parent, label, currency, net, available_on, payout, seq=seq
    )
