"""One clone of the template for many tests, emptied after each.

A clone for each test costs twice as much: 47 instead of 25 CPU seconds for the 153 tests of test_states, test_grants,
test_commands and test_disputes, because every session in a new database reads its catalog and plans its statements
again. The rows that a test leaves are deleted, and the rows of the schema that it changed are restored. A test that
changed the schema, a setting or a statistic, or left much behind, costs its database: the next test gets a new clone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import psycopg

from db.connect import harden

Connection = psycopg.Connection[tuple[Any, ...]]

GROWTH_BYTES_MAX = 4_000_000
# Where DDL, ANALYZE and ALTER DATABASE leave traces.
CATALOGS = (
    "pg_attrdef",
    "pg_attribute",
    "pg_class",
    "pg_constraint",
    "pg_db_role_setting",
    "pg_description",
    "pg_event_trigger",
    "pg_extension",
    "pg_index",
    "pg_proc",
    "pg_publication",
    "pg_rewrite",
    "pg_statistic",
    "pg_trigger",
    "pg_type",
)
# Every write gives a row another xmin: two signatures are equal only if nothing was written.
SIGNATURE = "(select (count(*), sum(xmin::text::bigint))::text from {})"
CATALOG = "select " + ", ".join(SIGNATURE.format(f"pg_catalog.{name}") for name in CATALOGS)
SETUP = f"""
create temp table tables (name text, columns text, saved text, signature text);
create temp table sequences (name text, last_value bigint);

insert into tables (name, columns)
select format('%I.%I', n.nspname, c.relname), (
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) from pg_attribute as a
    where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
)
from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
where c.relkind = 'r' and n.nspname !~ '^(pg_|information_schema)';
insert into sequences select format('%I.%I', schemaname, sequencename), last_value from pg_sequences;

create function pg_temp.signature(p_name text) returns text language plpgsql as $$
declare
    v_signature text;
begin
    execute format('select {SIGNATURE.format("%s")}', p_name) into v_signature;
    return v_signature;
end;
$$;

create function pg_temp.save() returns void language plpgsql as $$
declare
    v_table record;
begin
    update tables set signature = pg_temp.signature(name);
    for v_table in select name from tables where signature <> '(0,)' loop
        execute format('create temp table %I as table %s', v_table.name, v_table.name);
        update tables set saved = format('pg_temp.%I', name) where name = v_table.name;
    end loop;
end;
$$;

create function pg_temp.restore() returns void language plpgsql as $$
declare
    v_table record;
begin
    for v_table in select * from tables where pg_temp.signature(name) <> signature loop
        execute format('delete from %s', v_table.name);
        if v_table.saved is not null then
            execute format(
                'insert into %s (%s) overriding system value select %s from %s',
                v_table.name, v_table.columns, v_table.columns, v_table.saved);
            update tables set signature = pg_temp.signature(name) where name = v_table.name;
        end if;
    end loop;
    perform setval(s.name, coalesce(s.last_value, 1), s.last_value is not null)
    from sequences as s join pg_sequences as p on format('%I.%I', p.schemaname, p.sequencename) = s.name
    where p.last_value is distinct from s.last_value;
end;
$$;

select pg_temp.save();
set session_replication_role = replica;
"""
END_OTHERS = """
select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
where datname = current_database() and pid <> all(%s) and backend_type = 'client backend'
"""
# `discard all` without `discard plans`.
RESET_SESSION = (
    "reset session authorization; reset all; close all; unlisten *; select pg_advisory_unlock_all(); discard temp;"
    " discard sequences"
)


class ReusableDatabase:
    """Gives a database to one test at a time. `clone` creates a database and drops it after use."""

    def __init__(self, clone: Callable[[], AbstractContextManager[str]]) -> None:
        self._clone = clone
        self._stack = ExitStack()
        self._reset_connection: Connection | None = None
        self._owner: Connection | None = None
        self._url = ""

    def acquire(self) -> str:
        """The address of a database equal to the template."""
        if self._reset_connection is None:
            self._url = self._stack.enter_context(self._clone())
            self._reset_connection = self._stack.enter_context(psycopg.connect(self._url, autocommit=True))
            # Only superusers can disable triggers. Other logins get a new clone for each test.
            if self._ask("select rolsuper from pg_roles where rolname = current_user")[0]:
                self._reset_connection.execute(SETUP.encode())
                self._catalog, self._bytes = self._ask(CATALOG), self._size()
            else:
                self._catalog, self._bytes = (), 0
        return self._url

    def owner_connection(self) -> Connection:
        """A connection with all rights, in autocommit mode. Its plans last from test to test."""
        if self._owner is None or self._owner.closed:
            self._owner = psycopg.connect(harden(self._url, "deploy"), autocommit=True)
        return self._owner

    def release(self) -> None:
        """End all sessions and restore the template's rows. Drops the database where that is not possible."""
        try:
            if not self._restore():
                self.drop()
        except psycopg.Error:
            # The test has ended these sessions as well.
            self.drop()

    def drop(self) -> None:
        """Drop the database. The next test gets another."""
        if self._owner is not None:
            self._owner.close()
        self._owner = self._reset_connection = None
        self._stack.close()

    def _restore(self) -> bool:
        assert self._reset_connection is not None
        sessions = [self._reset_connection.info.backend_pid]
        if self._owner is not None and not self._owner.closed:
            self._owner.rollback()
            self._owner.autocommit = True
            self._owner.execute(RESET_SESSION)
            sessions.append(self._owner.info.backend_pid)
        self._reset_connection.execute(END_OTHERS, (sessions,))
        if self._ask(CATALOG) != self._catalog:
            return False
        self._reset_connection.execute("select pg_temp.restore()")
        return self._size() < self._bytes + GROWTH_BYTES_MAX

    def _size(self) -> int:
        return int(self._ask("select pg_database_size(current_database())")[0])

    def _ask(self, query: str) -> tuple[Any, ...]:
        assert self._reset_connection is not None
        row = self._reset_connection.execute(query.encode()).fetchone()
        assert row is not None
        return row
