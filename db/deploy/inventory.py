"""The inventory of a database: the objects in our schemas, and the record of earlier deploys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from db.deploy.source import Migration, VersionFiles
from db.errors import DeployError

Connection = psycopg.Connection[tuple[Any, ...]]

OBJECTS = """
select 'function', concat_ws('.', nspname, proname), p.oid::regprocedure::text, '', p.oid
from pg_proc p
join pg_namespace n on n.oid = pronamespace
where nspname = any(%(schemas)s) and not exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e')
union all
select 'view', concat_ws('.', nspname, relname), c.oid::regclass::text, pg_get_viewdef(c.oid), c.oid
from pg_class c
join pg_namespace n on n.oid = relnamespace
where nspname = any(%(schemas)s) and relkind = 'v'
union all
select
    'trigger',
    concat_ws('.', nspname, relname, tgname),
    format('%%I on %%I.%%I', tgname, nspname, relname),
    concat_ws(' ', tgenabled, pg_get_triggerdef(t.oid)),
    t.oid
from pg_trigger t
join pg_class c on c.oid = tgrelid
join pg_namespace n on n.oid = relnamespace
where nspname = any(%(schemas)s) and not tgisinternal and not relispartition
order by 5 desc
"""


@dataclass(frozen=True)
class DatabaseObject:
    """A function, view or trigger in our schemas.

    `identity` is that of a Statement, `name` is as `drop` wants it, `definition` as PostgreSQL prints it (empty for
    functions).
    """

    kind: Literal["function", "view", "trigger"]
    identity: str
    name: str
    definition: str
    oid: int


@dataclass(frozen=True)
class DeployRecord:
    """The record that earlier deploys have left in the database."""

    applied: frozenset[tuple[str, str]]
    digest: str
    procrastinate_version: str

    @classmethod
    def read(cls, conn: Connection) -> DeployRecord | None:
        """The record; None if nothing was ever deployed here."""
        if conn.execute("select to_regclass('deploy.deploys')").fetchone() == (None,):
            return None
        applied = conn.execute("select origin, name from deploy.migrations").fetchall()
        latest = conn.execute("select digest, procrastinate_version from deploy.deploys order by id desc limit 1")
        digest, version = latest.fetchone() or ("", "")
        return cls(frozenset((origin, name) for origin, name in applied), digest, version)

    def pending_migrations(self, source: VersionFiles) -> list[Migration]:
        """The migrations to run now. Raises DeployError if the database has some that this version doesn't know."""
        known = [*source.procrastinate_migrations, *source.migrations]
        if unknown := self.applied - {migration.key for migration in known}:
            names = ", ".join(sorted(name for _, name in unknown))
            raise DeployError(f"the database is ahead of this version: it has {names}")
        old_workers = self.procrastinate_version != source.procrastinate_version
        return [
            migration
            for migration in known
            if migration.key not in self.applied and not (old_workers and migration.waits_for_new_code)
        ]


def read_objects(conn: Connection, schemas: Sequence[str]) -> list[DatabaseObject]:
    """The functions, views and triggers in schemas, the youngest first."""
    return [DatabaseObject(*row) for row in conn.execute(OBJECTS, {"schemas": list(schemas)})]
