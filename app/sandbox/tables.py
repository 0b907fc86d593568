"""The tables of the sandbox's memory in SQLite, and how commits are written to them."""

import sqlite3

from app.sandbox.commit_log import PendingCommits

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
    unique (account, key)
);

create table if not exists scheduled_actions (
    seq integer primary key,
    due real not null,
    what text not null,
    subject text not null,
    attempt integer not null
);

create table if not exists tallies (name text primary key, count integer not null) without rowid;
create table if not exists numbers (name text primary key, value real not null) without rowid;
create table if not exists identity (id text not null);
"""

COLUMNS = "seq, id, kind, account, created, parent, label, currency, net, available_on, payout, body"
SAVE = f"""
insert into objects ({COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
on conflict (id) do update set parent = excluded.parent, label = excluded.label, net = excluded.net,
    available_on = excluded.available_on, payout = excluded.payout, body = excluded.body
"""


def write_commits(file: sqlite3.Connection, pending: PendingCommits, number: int) -> None:
    """Write the rows of several commits, of which the last has this number. The caller's transaction holds them."""
    file.executemany(SAVE, pending.objects.values())
    file.executemany("replace into keys values (?, ?, ?, ?, ?, ?, ?)", pending.keys.values())
    file.executemany("insert into scheduled_actions values (?, ?, ?, ?, ?)", pending.scheduled.values())
    file.executemany("delete from scheduled_actions where seq = ?", [(seq,) for seq in pending.done])
    file.executemany(
        "insert into tallies values (?, ?) on conflict (name) do update set count = count + excluded.count",
        pending.tallies.items(),
    )
    file.execute("replace into numbers values ('commits', ?)", (number,))
