"""Bring a database to a version of Surety: safe to repeat, to race and to run beside traffic.

    a fresh database    schema.sql and Procrastinate's schema, then db/*.sql, in one transaction
    any other           the migrations that it lacks, then db/*.sql if they changed

One deploy runs at a time, by an advisory lock. Migrations run in the order of their names. Those named
`*.concurrent.sql` run outside a transaction, statement by statement, and from the start again after an interruption, so
each statement must bear being repeated; number them before the others of their release. The others share one short
transaction with db/*.sql. It waits for a lock no longer than LOCK_TIMEOUT, so that other sessions don't queue behind it
for longer; then it rolls back and tries again.

Functions are replaced in place, which blocks no caller. Replacing a view or a trigger blocks callers, so only changed
ones are written. Tables that a migration alters or that get a trigger are locked first of all, in
LOCK_ORDER: another order, or a view first, would deadlock with writers. Objects in our schemas that no file contains
any more are dropped. It is an error if other objects depend on them.

The login that deploys owns the database, may create roles, and is a member of the role that owns our schemas. It need
not be a superuser.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, LiteralString

import psycopg
from psycopg import errors, sql

from db.connect import harden
from db.deploy.inventory import Connection, DatabaseObject, DeployRecord, read_objects
from db.deploy.publication import publish_events
from db.deploy.source import BOOKKEEPING, Migration, VersionFiles, location_of, lock_rank
from db.deploy.statements import Statement, read_statements
from db.errors import DeployError, kind_of
from db.poolers import open_session

ShowProgress = Callable[[str], None]

ADVISORY_LOCK = 0x5375_7265_7479
LOCK_TIMEOUT = "300ms"  # below deadlock_timeout, so that in a deadlock the deploy gives way, not the traffic
OTHER_DEPLOY_SECONDS_MAX = 600.0


@dataclass(frozen=True)
class DeployResult:
    """The result of a deploy; `attempts` counts its transactions, including those given up for a lock."""

    outcome: Literal["created", "changed", "unchanged"]
    migrations: list[str]
    written: list[str]
    dropped: list[str]
    attempts: int
    seconds: float


def deploy(
    url: str,
    source: VersionFiles | None = None,
    *,
    force: bool = False,
    lock_seconds_max: float = 60.0,
    say: ShowProgress = lambda _: None,
) -> DeployResult:
    """Bring the database at `url` to a version, by default the installed one; `force` writes everything again.

    Tries for `lock_seconds_max` to get its locks. Raises DeployError, with file and line where a statement failed.
    """
    started = time.monotonic()
    source = source or VersionFiles.installed()
    with open_session(harden(url, "deploy")) as conn, one_deploy_at_a_time(conn, say):
        run = DeployRun(conn, source, lock_seconds_max, say)
        record = DeployRecord.read(conn)
        if record is None:
            run.create()
        elif (pending := record.pending_migrations(source)) or record.digest != source.digest or force:
            run.upgrade(pending)
        publish_events(conn, say)
    return DeployResult(
        outcome="created" if record is None else "changed" if run.attempts else "unchanged",
        migrations=run.migrated,
        written=run.written,
        dropped=run.dropped,
        attempts=run.attempts,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def one_deploy_at_a_time(conn: Connection, say: ShowProgress) -> Generator[None]:
    """Let one deploy run at a time.

    It polls for the lock instead of waiting in the server. A waiting statement holds a snapshot, and the other deploy's
    `create index concurrently` would wait for that snapshot's end.
    """
    deadline = time.monotonic() + OTHER_DEPLOY_SECONDS_MAX
    is_announced = False
    while conn.execute("select pg_try_advisory_lock(%s)", (ADVISORY_LOCK,)).fetchone() == (False,):
        holder = session_with_lock(conn)
        if time.monotonic() > deadline:
            raise DeployError(f"another deploy has been running for {OTHER_DEPLOY_SECONDS_MAX:.0f} s{holder}")
        if not is_announced:
            say(f"another deploy is running{holder}; waiting until it ends")
            is_announced = True
        time.sleep(random.uniform(0.05, 0.15))
    try:
        yield
    finally:
        if not conn.closed:
            conn.execute("select pg_advisory_unlock(%s)", (ADVISORY_LOCK,))


def session_with_lock(conn: Connection) -> str:
    """Who holds the lock, for a message: any login can take it. Empty if it is free again."""
    found = conn.execute(
        "select format(' (process %%s of login %%s)', a.pid, a.usename)"
        " from pg_locks as l join pg_stat_activity as a on a.pid = l.pid"
        " where l.locktype = 'advisory' and l.granted and l.classid = %s and l.objid = %s"
        " and a.datname = current_database()",
        (ADVISORY_LOCK >> 32, ADVISORY_LOCK & 0xFFFF_FFFF),
    ).fetchone()
    return str(found[0]) if found else ""


class DeployRun:
    """One deploy."""

    def __init__(self, conn: Connection, source: VersionFiles, lock_seconds_max: float, say: ShowProgress) -> None:
        self.conn = conn
        self.source = source
        self.lock_seconds_max = lock_seconds_max
        self.say = say
        self.current_step = ""
        self.attempts = 0
        self.migrated: list[str] = []
        self.written: list[str] = []
        self.dropped: list[str] = []

    def create(self) -> None:
        """Make everything in a fresh database."""
        if not self.source.schemas:
            raise DeployError("schema.sql creates no schema")
        there = self.conn.execute("select nspname from pg_namespace where nspname = any(%s)", (self.source.schemas,))
        if names := ", ".join(name for (name,) in there.fetchall()):
            raise DeployError(f"no deploy created the schemas {names} of this database: give Surety an empty one")
        self.in_short_transaction(self.create_everything)

    def create_everything(self) -> None:
        """Create our state, Procrastinate's state, the behaviour."""
        self.execute_all(self.source.schema)
        owner = self.owner()
        self.conn.execute("reset role")
        for schema in ("deploy", "procrastinate"):
            create = sql.SQL("create schema {} authorization {}")
            self.conn.execute(create.format(sql.Identifier(schema), sql.Identifier(owner)))
        self.set_local_role(owner)
        with self.search_path("procrastinate"):
            self.execute_all(read_statements(self.source.procrastinate / "schema.sql"))
        self.write_behaviour()
        self.record_migrations([*self.source.procrastinate_migrations, *self.source.migrations])

    def upgrade(self, pending: Sequence[Migration]) -> None:
        """Bring a database that has been deployed to before from its version to this one."""
        together: list[Migration] = []
        for migration in pending:
            if not migration.is_concurrent:
                together.append(migration)
                continue
            if together:
                self.in_short_transaction(partial(self.migrate, together))
            self.migrate_concurrently(migration)
            together = []
        self.in_short_transaction(partial(self.migrate, together, then=self.write_behaviour))

    def in_short_transaction(self, work: Callable[[], None]) -> None:
        """Do the work in one transaction with a short lock timeout; repeat it until it succeeds or the time is over."""
        deadline = time.monotonic() + self.lock_seconds_max
        migrated = list(self.migrated)
        while True:
            self.attempts += 1
            self.migrated, self.written, self.dropped = list(migrated), [], []
            try:
                with self.conn.transaction():
                    self.conn.execute(sql.SQL("set local lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                    self.conn.execute("set local search_path = pg_catalog")
                    self.conn.execute("set local client_min_messages = warning")
                    self.conn.execute("set local plpgsql.extra_errors = 'all'")
                    work()
            except psycopg.Error as error:
                if kind_of(error) != "conflict":
                    raise
                reason = f"{self.current_step}: {error.diag.message_primary or error}"
                if time.monotonic() > deadline:
                    raise DeployError(f"gave up after {self.attempts} attempts, at {reason}") from error
                self.say(f"attempt {self.attempts}, at {reason}; trying again")
            else:
                return
            time.sleep(random.uniform(0.5, 1.0) * min(0.05 * 2**self.attempts, 2.0))

    # --- state

    def migrate(self, migrations: Sequence[Migration], then: Callable[[], None] = lambda: None) -> None:
        """Run migrations that share this transaction."""
        self.set_local_role(self.owner())
        self.lock_tables(migrations)
        for migration in migrations:
            with self.search_path(migration.search_path):
                self.execute_all(migration.statements)
        self.record_migrations(migrations)
        self.migrated += [migration.path.name for migration in migrations]
        then()

    def migrate_concurrently(self, migration: Migration) -> None:
        """Run a migration outside a transaction."""
        self.attempts += 1
        self.say(f"{migration.path.name}, beside the traffic")
        self.conn.execute(sql.SQL("set role {}").format(sql.Identifier(self.owner())))
        self.conn.execute(sql.SQL("set search_path = {}").format(sql.Identifier(migration.search_path)))
        for statement in migration.statements:
            if statement.kind == "index":
                self.drop_unfinished_index(statement)
            self.execute(statement)
        self.record_migrations([migration])
        self.migrated.append(migration.path.name)
        self.conn.execute("reset search_path")
        self.conn.execute("reset role")

    def drop_unfinished_index(self, statement: Statement) -> None:
        """Drop the unusable index that an interrupted `create index concurrently` left."""
        schema = statement.table.rpartition(".")[0] or "procrastinate"
        unfinished = self.conn.execute(
            "select from pg_index join pg_class c on c.oid = indexrelid join pg_namespace n on n.oid = relnamespace"
            " where nspname = %s and relname = %s and relkind = 'i' and not indisvalid",
            (schema, statement.name),
        )
        if unfinished.fetchone() is not None:
            name = sql.Identifier(schema, statement.name)
            self.conn.execute(sql.SQL("drop index concurrently if exists {}").format(name))

    def lock_tables(self, migrations: Iterable[Migration]) -> None:
        """Lock the tables to be altered or to get a trigger, in LOCK_ORDER."""
        modes: dict[str, LiteralString] = {
            trigger.table: "share row exclusive"
            for trigger in self.changed_views_and_triggers()
            if trigger.kind == "trigger"
        }
        ours = (migration for migration in migrations if migration.origin == "surety")
        for statement in (statement for migration in ours for statement in migration.statements):
            if statement.kind == "alteration":
                modes[statement.table] = "access exclusive"
        for table in sorted(modes, key=lock_rank):
            if self.conn.execute("select to_regclass(%s)", (table,)).fetchone() != (None,):
                self.current_step = f"locking {table}"
                name = sql.Identifier(*table.split("."))
                self.conn.execute(sql.SQL("lock table {} in {} mode").format(name, sql.SQL(modes[table])))

    def record_migrations(self, migrations: Iterable[Migration]) -> None:
        """Note migrations as applied."""
        with self.conn.cursor() as cursor:
            cursor.executemany(
                "insert into deploy.migrations (origin, name) values (%s, %s)", [each.key for each in migrations]
            )

    # --- behaviour

    def write_behaviour(self) -> None:
        """Write db/*.sql and drop objects that no file contains."""
        self.execute_all(read_statements(BOOKKEEPING))
        stale = self.changed_views_and_triggers()
        for statement in self.source.statements:
            if statement.kind not in ("view", "trigger"):
                self.execute(statement)
            elif statement in stale:
                self.replace(statement)
        self.drop_removed_objects()
        self.refuse_overloads()
        self.record_deploy()

    def changed_views_and_triggers(self) -> list[Statement]:
        """The views and triggers to write: their text has changed, or the database differs from the last deploy."""
        remembered = {
            (kind, identity): (text, definition)
            for kind, identity, text, definition in self.conn.execute(
                "select kind, identity, statement, definition from deploy.objects"
            )
        }
        there: dict[tuple[str, str], str] = {(each.kind, each.identity): each.definition for each in self.objects()}

        def is_current(statement: Statement) -> bool:
            key = statement.kind, statement.identity
            return key in there and remembered.get(key) == (statement.text, there[key])

        return [each for each in self.source.statements if each.kind in ("view", "trigger") and not is_current(each)]

    def replace(self, statement: Statement) -> None:
        """Write a view or trigger; a constraint trigger can't be replaced in place."""
        if not statement.replaces:
            schema, table, name = map(sql.Identifier, statement.identity.split("."))
            self.conn.execute(sql.SQL("drop trigger if exists {} on {}.{}").format(name, schema, table))
        self.execute(statement)
        self.written.append(statement.identity)

    def drop_removed_objects(self) -> None:
        """Drop the objects that no file contains, each after its dependents."""
        wanted = {(each.kind, each.identity) for each in (*self.source.schema, *self.source.statements)}
        left = [each for each in self.objects() if (each.kind, each.identity) not in wanted]
        while left:
            needed, reason = [], ""
            for each in left:
                try:
                    with self.conn.transaction():
                        self.drop(each)
                    self.dropped.append(each.name)
                except errors.DependentObjectsStillExist as error:
                    needed.append(each)
                    reason = f"{error.diag.message_primary}: {error.diag.message_detail}"
            if len(needed) == len(left):
                raise DeployError(f"{reason}. No file of db/ has it any more, but other objects depend on it")
            left = needed

    def drop(self, leftover: DatabaseObject) -> None:
        """Drop a function, view or trigger."""
        kind = "routine" if leftover.kind == "function" else leftover.kind
        self.conn.execute(f"drop {kind} {leftover.name}".encode())

    def refuse_overloads(self) -> None:
        """Refuse a changed signature: it would create a second function beside the old one."""
        files = (*self.source.schema, *self.source.statements)
        wanted = Counter(each.identity for each in files if each.kind == "function")
        there = [each for each in self.objects() if each.kind == "function"]
        for identity in Counter(each.identity for each in there) - wanted:
            signatures = " and ".join(each.name for each in there if each.identity == identity)
            raise DeployError(f"a changed signature is a new name; there would be {signatures}")

    def record_deploy(self) -> None:
        """Record the deploy."""
        there: dict[tuple[str, str], str] = {(each.kind, each.identity): each.definition for each in self.objects()}
        self.conn.execute("delete from deploy.objects")
        with self.conn.cursor() as cursor:
            cursor.executemany(
                "insert into deploy.objects (kind, identity, statement, definition) values (%s, %s, %s, %s)",
                [
                    (each.kind, each.identity, each.text, there[each.kind, each.identity])
                    for each in self.source.statements
                    if each.kind in ("view", "trigger")
                ],
            )
        source = self.source
        self.conn.execute(
            "insert into deploy.deploys (version, procrastinate_version, digest, migrations, written, dropped)"
            " values (%s, %s, %s, %s, %s, %s)",
            (source.version, source.procrastinate_version, source.digest, self.migrated, self.written, self.dropped),
        )

    # --- the connection

    def objects(self) -> list[DatabaseObject]:
        """The functions, views and triggers in our schemas, the youngest first."""
        return read_objects(self.conn, self.source.schemas)

    def owner(self) -> str:
        """The role that owns our schemas."""
        owners = self.conn.execute(
            "select distinct pg_get_userbyid(nspowner) from pg_namespace where nspname = any(%s)",
            (self.source.schemas,),
        ).fetchall()
        if len(owners) != 1:
            raise DeployError(f"one role must own {', '.join(self.source.schemas)}; {len(owners)} do")
        return str(owners[0][0])

    def set_local_role(self, role: str) -> None:
        """Act as a role until the transaction ends."""
        self.conn.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))

    @contextlib.contextmanager
    def search_path(self, path: str) -> Generator[None]:
        """Set search_path for a block."""
        self.conn.execute(sql.SQL("set local search_path = {}").format(sql.Identifier(path)))
        yield
        self.conn.execute("set local search_path = pg_catalog")

    def execute_all(self, statements: Iterable[Statement]) -> None:
        """Execute statements in their order."""
        for statement in statements:
            self.execute(statement)

    def execute(self, statement: Statement) -> None:
        """Execute a statement. An error that is not retryable names the file and line."""
        self.current_step = location_of(statement)
        try:
            self.conn.execute(statement.text.encode())
        except psycopg.Error as error:
            if kind_of(error) == "conflict":
                raise
            raise DeployError(f"{location_of(statement, error)}: {error}") from error
