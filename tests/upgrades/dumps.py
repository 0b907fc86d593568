"""Dumps of populated databases as plain SQL, which any driver can load: of structure and rows, without owners' logins.

A dump creates the roles that its database has, if the server lacks them: they belong to the server.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psycopg

from db.embedded.binaries import find_binaries

FOLDER = Path(__file__).parent
RELEASES = sorted(path.parent for path in FOLDER.glob("*/dump.sql"))
OPTIONS = ("--rows-per-insert=200", "--restrict-key=x")
# Commands of psql, and a setting that older servers than the dump's lack.
NOT_SQL = re.compile(r"^(\\(un)?restrict .*|SET transaction_timeout = 0;)\n", re.MULTILINE)
ROLES = """
select format(
    'do $$ begin if to_regrole(%1$L) is null then create role %1$I nologin%2$s; end if; end $$;',
    r.rolname, case when r.rolinherit then '' else ' noinherit' end
)
from pg_roles as r where r.rolname like 'surety\\_%' and not r.rolcanlogin order by r.rolname
"""
MEMBERS = """
select format('grant %I to %I;', g.rolname, m.rolname)
from pg_auth_members as a join pg_roles as g on g.oid = a.roleid join pg_roles as m on m.oid = a.member
where g.rolname like 'surety\\_%' and m.rolname like 'surety\\_%' order by 1
"""


def write_dump(url: str, path: Path) -> None:
    """Write a database to a file."""
    with psycopg.connect(url) as conn:
        roles = [statement for query in (ROLES, MEMBERS) for (statement,) in conn.execute(query.encode())]
    command = [find_binaries()["pg_dump"], *OPTIONS, url]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    path.write_text("\n".join([*roles, NOT_SQL.sub("", dumped)]), encoding="utf-8")


def load_dump(url: str, path: Path) -> None:
    """Load a dump into an empty database. Needs a superuser, as restoring does."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(path.read_bytes())


def restart_business(url: str) -> None:
    """What follows a restore: the cluster is another one, and time has passed."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("select surety.maintain_partitions()")
        conn.execute("select outbox.begin_restore_generation('a dump was loaded')")
