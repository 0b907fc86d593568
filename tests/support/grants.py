"""What each role may do in our schemas, as the database sees it: `python -m tests.support.grants` writes it down.

The list stands in tests/support/grants.txt, so that a right that appears or disappears is a line in a change.
"""

from __future__ import annotations

from pathlib import Path

import psycopg

from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer

WRITTEN = Path(__file__).with_suffix(".txt")


def read_grants(conn: psycopg.Connection[tuple[object, ...]]) -> str:
    """A line per right: role, right, object; partitions stand for their parents."""
    rows = conn.execute(
        """
        with ours as (
            select oid, nspname from pg_namespace
            where nspname in (
                'surety', 'ledger', 'outbox', 'audit', 'api', 'report', 'invariant', 'deploy', 'procrastinate'
            )
        ),
        roles as (
            select rolname from pg_roles
            where rolname in ('surety_api', 'surety_webhook', 'surety_worker', 'surety_analyst', 'surety_auditor')
        ),
        rights (role, granted, object) as (
            select r.rolname, 'usage', 'schema ' || o.nspname
            from ours as o cross join roles as r where has_schema_privilege(r.rolname, o.oid, 'usage')
            union all
            select r.rolname, 'create', 'schema ' || o.nspname
            from ours as o cross join roles as r where has_schema_privilege(r.rolname, o.oid, 'create')
            union all
            select r.rolname, 'execute', o.nspname || '.' || p.proname
            from ours as o join pg_proc as p on p.pronamespace = o.oid cross join roles as r
            where o.nspname <> 'procrastinate' and has_function_privilege(r.rolname, p.oid, 'execute')
                and has_schema_privilege(r.rolname, o.oid, 'usage')
            union all
            select r.rolname, k.kind, o.nspname || '.' || c.relname
            from ours as o join pg_class as c on c.relnamespace = o.oid cross join roles as r
            cross join unnest(array['select', 'insert', 'update', 'delete', 'truncate']) as k (kind)
            where c.relkind in ('r', 'p', 'v', 'm') and not c.relispartition
                and has_table_privilege(r.rolname, c.oid, k.kind)
        )
        select role || ' ' || granted || ' ' || object from rights order by 1
        """
    )
    return "\n".join(str(row[0]) for row in rows) + "\n"


if __name__ == "__main__":
    with EmbeddedServer() as server, temporary_database(server.url, "surety_grants") as url:
        deploy(url)
        with psycopg.connect(url) as connection:
            WRITTEN.write_text(read_grants(connection))
