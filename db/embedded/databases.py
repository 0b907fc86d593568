"""Temporary databases on any server, dropped by a later run if their owner was killed."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from db.embedded.processes import process_start_time

Connection = psycopg.Connection[Any]


def with_database(url: str, name: str) -> str:
    """The same server's address for another database."""
    if "://" not in url:
        return make_conninfo(url, dbname=name)
    return urlunsplit(urlsplit(url)._replace(path=f"/{quote(name)}"))


@contextlib.contextmanager
def temporary_database(url: str, prefix: str, *, template: str = "template0") -> Generator[str]:
    """The address of a database that exists for this block, on the server of `url`.

    The database that `url` names is never changed. `prefix` begins the new name (`surety_demo`); the login needs
    CREATEDB. Databases that killed runs on this machine left under the same prefix are dropped.
    """
    name = f"{prefix}_{os.urandom(6).hex()}"
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as conn:
        drop_stale_databases(conn, prefix)
        create_database(conn, name, template)
        own_database(conn, name)
    try:
        yield with_database(url, name)
    finally:
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as conn:
            drop_database(conn, name)


def create_database(conn: Connection, name: str, template: str = "template0") -> None:
    """Create a database. Copying files is fastest, but makes a checkpoint, so it is done only where fsync is off."""
    (fsync,) = conn.execute("select current_setting('fsync')").fetchone() or ("on",)
    strategy = "file_copy" if fsync == "off" else "wal_log"
    conn.execute(
        sql.SQL("create database {} template {} strategy {} encoding 'UTF8' locale 'C'").format(
            sql.Identifier(name), sql.Identifier(template), sql.SQL(strategy)
        )
    )


def own_database(conn: Connection, name: str) -> None:
    """Record this process as a database's owner, so that a later run drops the database if this process is killed."""
    owner = f"{socket.gethostname()} {os.getpid()} {process_start_time(os.getpid())}"
    conn.execute(sql.SQL("comment on database {} is {}").format(sql.Identifier(name), sql.Literal(owner)))


def drop_database(conn: Connection, name: str) -> None:
    """Drop a database and end its connections."""
    conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def drop_stale_databases(conn: Connection, prefix: str) -> None:
    """Drop the databases under a prefix whose owner, a process on this machine, is dead."""
    made_here = conn.execute(
        "select datname, shobj_description(oid, 'pg_database') from pg_database"
        " where starts_with(datname, %s) and pg_has_role(datdba, 'usage')",
        (f"{prefix}_",),
    )
    for name, owner in made_here.fetchall():
        match (owner or "").split():
            case [host, pid, started] if host == socket.gethostname() and process_start_time(int(pid)) != started:
                drop_database(conn, name)
