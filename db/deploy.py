"""Bring a database to what this version of Surety needs: safe to repeat, to race and to run beside traffic.

    a fresh database    schema.sql, Procrastinate's schema, then db/*.sql, in one transaction
    any other           the migrations that it lacks, then db/*.sql if they changed

One deploy runs at a time, by an advisory lock. Migrations run in the order of their names. Those named `*.concurrent.sql` run
outside a transaction, statement by statement, and again from the start after an interruption, so each statement must bear being
repeated; number them before the others of their release. The rest shares one short transaction with db/*.sql. It never waits
for a lock longer than LOCK_TIMEOUT, so that those who queue behind it don't either: it gives everything back and tries again.

Functions are replaced in place, which takes no lock that a call could meet. Views and triggers, whose replacement does, are
written only where they changed: the triggers at the end, their tables locked in the order in which schema.sql has them. What stands in our
schemas and in no file any more is dropped, but never together with what others built on it.

The login that deploys owns the database, has CREATEROLE and is a member of the role that owns the schemas; superuser isn't needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import errors, sql

from db import CAPABILITIES
from db.connect import harden
from db.statements import Statement, read_statements

Connection = psycopg.Connection[tuple[Any, ...]]
Outcome = Literal["created", "changed", "unchanged"]

ADVISORY_LOCK = 0x5375_7265_7479
LOCK_TIMEOUT = "300ms"
LOCK_RETRY_SECONDS_MAX = 60.0
OTHER_DEPLOY_SECONDS_MAX = 600.0
HERE = Path(__file__).parent


class DeployError(Exception):
    """The database could not be brought to this version; what was applied before stays, the rest is as it was."""


# --- what is to be there ---------------------------------------------------------------------------------------------


def state_folder() -> Path:
    """The folder of schema.sql and migrations/: inside the package where it was installed from a wheel, else the checkout."""
    for folder in (HERE / "_state", HERE.parent):
        if (folder / "schema.sql").is_file():
            return folder
    raise DeployError(f"schema.sql is neither in {HERE / '_state'} nor in {HERE.parent}")


@dataclass(frozen=True)
class Source:
    """The files of a version. `behaviour` are the files of db/ in the order of CAPABILITIES."""

    state: Path
    behaviour: tuple[Path, ...]
    procrastinate: Path
    procrastinate_version: str
    version: str

    @classmethod
    def installed(cls, state: Path | None = None, behaviour: Sequence[Path] | None = None) -> Source:
        """The files of the installed version; both parts can be given instead."""
        package = importlib.util.find_spec("procrastinate")
        assert package and package.origin
        return cls(
            state=state or state_folder(),
            behaviour=tuple(HERE / f"{name}.sql" for name in CAPABILITIES) if behaviour is None else tuple(behaviour),
            procrastinate=Path(package.origin).parent / "sql",
            procrastinate_version=importlib.metadata.version("procrastinate"),
            version=importlib.metadata.version("surety"),
        )

    @cached_property
    def schema(self) -> list[Statement]:
        """The statements of schema.sql."""
        return read_statements(self.state / "schema.sql")

    @cached_property
    def statements(self) -> list[Statement]:
        """The statements of db/*.sql."""
        found = [statement for path in self.behaviour for statement in read_statements(path)]
        for statement in found:
            if statement.kind in ("function", "view") and not re.match(r"create\s+or\s+replace\b", statement.text, re.I):
                raise DeployError(f"{place(statement)}: write `create or replace`, so that it can be deployed again")
            if statement.kind in ("function", "view") and "." not in statement.name:
                raise DeployError(f"{place(statement)}: name the schema of {statement.name}")
        return found

    @cached_property
    def migrations(self) -> list[Migration]:
        """Our deltas, in the order of their names. The baseline of a release is no delta."""
        paths = sorted((self.state / "migrations").glob("*.sql"))
        found = [Migration("surety", path) for path in paths if not path.name.endswith("baseline.sql")]
        for statement in (statement for migration in found for statement in migration.statements):
            if statement.kind in ("function", "view", "trigger"):
                raise DeployError(f"{place(statement)}: a migration may drop a {statement.kind}, db/ creates it")
        return found

    @cached_property
    def procrastinate_migrations(self) -> list[Migration]:
        """The deltas of Procrastinate's package."""
        return [Migration("procrastinate", path) for path in sorted((self.procrastinate / "migrations").glob("*.sql"))]

    @cached_property
    def schemas(self) -> list[str]:
        """The schemas that are ours."""
        return [statement.name for statement in self.schema if statement.kind == "schema"]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of db/*.sql and of their order."""
        total = hashlib.sha256()
        for path in (HERE / "deploy.sql", *self.behaviour):
            total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return total.hexdigest()


@dataclass(frozen=True)
class Migration:
    """A delta to the state."""

    origin: Literal["surety", "procrastinate"]
    path: Path

    @property
    def key(self) -> tuple[str, str]:
        return self.origin, self.path.name

    @cached_property
    def statements(self) -> list[Statement]:
        return read_statements(self.path)

    @property
    def is_concurrent(self) -> bool:
        """Whether it runs outside a transaction."""
        if self.origin == "surety":
            return self.path.name.endswith(".concurrent.sql")
        return any(re.search(r"\bconcurrently\b", statement.text, re.I) for statement in self.statements)

    @property
    def waits_for_new_code(self) -> bool:
        """Procrastinate's word for it: it may run only once no worker of the version before runs any more."""
        return self.origin == "procrastinate" and "_post_" in self.path.name


# --- what is there ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What deploys before this one have left in the database."""

    applied: frozenset[tuple[str, str]]
    digest: str
    procrastinate_version: str

    @classmethod
    def read(cls, conn: Connection) -> Record | None:
        """None: nothing was ever deployed here."""
        if conn.execute("select to_regclass('deploy.deploys')").fetchone() == (None,):
            return None
        applied = conn.execute("select origin, name from deploy.migrations").fetchall()
        latest = conn.execute("select digest, procrastinate_version from deploy.deploys order by id desc limit 1").fetchone()
        digest, version = latest or ("", "")
        return cls(frozenset((origin, name) for origin, name in applied), digest, version)

    def lacks(self, source: Source) -> list[Migration]:
        """The migrations to run now. Raises DeployError if the database has some that this version doesn't know."""
        unknown = self.applied - {migration.key for migration in (*source.migrations, *source.procrastinate_migrations)}
        if unknown:
            names = ", ".join(sorted(name for _, name in unknown))
            raise DeployError(f"the database is ahead of this version, it has {names}: deploy the version that brought them")
        same_procrastinate = self.procrastinate_version == source.procrastinate_version
        return [
            migration
            for migration in (*source.procrastinate_migrations, *source.migrations)
            if migration.key not in self.applied and (same_procrastinate or not migration.waits_for_new_code)
        ]


OBJECTS = """
select 'function' as kind, nspname || '.' || proname as identity, p.oid::regprocedure::text as name, '' as definition, p.oid
from pg_proc p
join pg_namespace n on n.oid = pronamespace
where nspname = any(%(schemas)s) and not exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e')
union all
select 'view', nspname || '.' || relname, c.oid::regclass::text, pg_get_viewdef(c.oid), c.oid
from pg_class c
join pg_namespace n on n.oid = relnamespace
where nspname = any(%(schemas)s) and relkind = 'v'
union all
select 'trigger', concat_ws('.', nspname, relname, tgname), concat_ws('.', nspname, relname, tgname),
    concat_ws(' ', tgenabled, pg_get_triggerdef(t.oid)), t.oid
from pg_trigger t
join pg_class c on c.oid = tgrelid
join pg_namespace n on n.oid = relnamespace
where nspname = any(%(schemas)s) and not tgisinternal and not relispartition
order by oid desc
"""


@dataclass(frozen=True)
class Object:
    """A function, view or trigger in our schemas: schema.name (schema.table.name for a trigger), the name as `drop` wants it, and
    how PostgreSQL tells it, but for functions, which are always written anew."""

    kind: Literal["function", "view", "trigger"]
    identity: str
    name: str
    definition: str
    oid: int


@dataclass(frozen=True)
class Deployed:
    """What a deploy did."""

    outcome: Outcome
    migrations: list[str]
    written: list[str]
    dropped: list[str]
    attempts: int
    seconds: float


# --- deploying -------------------------------------------------------------------------------------------------------


def deploy(
    url: str, source: Source | None = None, *, force: bool = False, say: Callable[[str], None] = lambda _: None
) -> Deployed:
    """Bring the database at `url` to a version, by default the installed one; `force` repeats what is there already.

    Raises DeployError, naming file and line where a statement failed.
    """
    started = time.monotonic()
    source = source or Source.installed()
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn, alone(conn, say):
        run = Run(conn, source, say)
        record = Record.read(conn)
        if record is None:
            run.create()
        elif (pending := record.lacks(source)) or record.digest != source.digest or force:
            run.upgrade(pending)
        outcome: Outcome = "created" if record is None else "changed" if run.attempts else "unchanged"
    seconds = time.monotonic() - started
    return Deployed(outcome, run.migrated, run.written, run.dropped, run.attempts, seconds)


@contextlib.contextmanager
def alone(conn: Connection, say: Callable[[str], None]) -> Iterator[None]:
    """Let one deploy run at a time. Asks again and again instead of waiting inside the server, for there it would hold a
    snapshot, and the other deploy's `create index concurrently` would wait for that."""
    deadline = time.monotonic() + OTHER_DEPLOY_SECONDS_MAX
    told = False
    while conn.execute("select pg_try_advisory_lock(%s)", (ADVISORY_LOCK,)).fetchone() == (False,):
        if time.monotonic() > deadline:
            raise DeployError(f"another deploy has run for {OTHER_DEPLOY_SECONDS_MAX:.0f} s")
        if not told:
            say("another deploy is running; waiting for its end")
            told = True
        time.sleep(random.uniform(0.05, 0.15))
    try:
        yield
    finally:
        if not conn.closed:
            conn.execute("select pg_advisory_unlock(%s)", (ADVISORY_LOCK,))


class Run:
    """One deploy."""

    def __init__(self, conn: Connection, source: Source, say: Callable[[str], None]) -> None:
        self.conn = conn
        self.source = source
        self.say = say
        self.attempts = 0
        self.migrated: list[str] = []
        self.written: list[str] = []
        self.dropped: list[str] = []

    def create(self) -> None:
        """A fresh database."""
        if not self.source.schemas:
            raise DeployError("schema.sql creates no schema")
        existing = self.conn.execute("select nspname from pg_namespace where nspname = any(%s)", (self.source.schemas,))
        if names := ", ".join(name for (name,) in existing.fetchall()):
            raise DeployError(f"the database has {names}, but not by a deploy: give Surety a database of its own")

        def work() -> None:
            self.execute_all(self.source.schema)
            owner = self.owner()
            self.conn.execute("reset role")
            for schema in ("deploy", "procrastinate"):
                self.conn.execute(
                    sql.SQL("create schema {} authorization {}").format(sql.Identifier(schema), sql.Identifier(owner))
                )
            self.become(owner)
            self.execute_all(read_statements(HERE / "deploy.sql"))
            with self.search_path("procrastinate"):
                self.execute_all(read_statements(self.source.procrastinate / "schema.sql"))
            self.record([*self.source.procrastinate_migrations, *self.source.migrations])
            self.behave()

        self.briefly(work)

    def upgrade(self, pending: Sequence[Migration]) -> None:
        """A database that has been deployed to before."""
        together: list[Migration] = []
        for migration in pending:
            if migration.is_concurrent:
                if together:
                    self.briefly(lambda: self.migrate(together))
                self.migrate_concurrently(migration)
                together = []
            else:
                together.append(migration)

        def work() -> None:
            self.migrate(together)
            self.behave()

        self.briefly(work)

    def briefly(self, work: Callable[[], None]) -> None:
        """Do the work in one transaction that gives up rather than make others queue, again until it succeeds."""
        deadline = time.monotonic() + LOCK_RETRY_SECONDS_MAX
        before = list(self.migrated)
        while True:
            self.attempts += 1
            self.migrated, self.written, self.dropped = list(before), [], []
            try:
                with self.conn.transaction():
                    self.conn.execute(sql.SQL("set local lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                    self.conn.execute("set local search_path = pg_catalog")
                    self.conn.execute("set local client_min_messages = warning")
                    self.conn.execute("set local plpgsql.extra_errors = 'all'")
                    work()
                return
            except psycopg.Error as error:
                if not passes(error):
                    raise
                if time.monotonic() > deadline:
                    raise DeployError(f"gave up after {self.attempts} attempts: {error}") from error
                self.say(f"attempt {self.attempts}: {error.diag.message_primary or error}; trying again")
            time.sleep(random.uniform(0.5, 1.0) * min(0.05 * 2**self.attempts, 2.0))

    def migrate(self, migrations: Sequence[Migration]) -> None:
        """Migrations that share this transaction."""
        self.become(self.owner())
        for migration in migrations:
            with self.search_path("procrastinate" if migration.origin == "procrastinate" else "pg_catalog"):
                self.execute_all(migration.statements)
        self.record(migrations)
        self.migrated += [migration.path.name for migration in migrations]

    def migrate_concurrently(self, migration: Migration) -> None:
        """A migration that must not or need not be in a transaction."""
        self.attempts += 1
        self.say(f"{migration.path.name}, beside the traffic")
        path = "procrastinate" if migration.origin == "procrastinate" else "pg_catalog"
        self.conn.execute(sql.SQL("set role {}").format(sql.Identifier(self.owner())))
        self.conn.execute(sql.SQL("set search_path = {}").format(sql.Identifier(path)))
        try:
            for statement in migration.statements:
                if statement.kind == "index":
                    self.drop_unfinished_index(statement)
                self.execute(statement)
            self.record([migration])
            self.migrated.append(migration.path.name)
        finally:
            if not self.conn.closed:
                self.conn.execute("reset search_path")
                self.conn.execute("reset role")

    def drop_unfinished_index(self, statement: Statement) -> None:
        """What an interrupted `create index concurrently` leaves: it is kept up, never used, and in the way of the next try."""
        schema = statement.table.rpartition(".")[0]
        unfinished = self.conn.execute(
            "select 1 from pg_index join pg_class on pg_class.oid = indexrelid"
            " where relname = %s and relnamespace::regnamespace::text = coalesce(nullif(%s, ''), current_schema())"
            " and relkind = 'i' and not indisvalid",
            (statement.name, schema),
        ).fetchone()
        if unfinished:
            name = sql.Identifier(*filter(None, (schema, statement.name)))
            self.conn.execute(sql.SQL("drop index concurrently if exists {}").format(name))

    def behave(self) -> None:
        """Write db/*.sql and drop what is in none of them."""
        self.become(self.owner())
        remembered = {
            (kind, identity): (statement, definition)
            for kind, identity, statement, definition in self.conn.execute(
                "select kind, identity, statement, definition from deploy.objects"
            )
        }
        present = self.definitions()

        def unchanged(statement: Statement) -> bool:
            key = statement.kind, identity(statement)
            return key in present and remembered.get(key) == (statement.text, present[key])

        statements = [statement for statement in self.source.statements if statement.kind != "trigger"]
        triggers = [s for s in self.source.statements if s.kind == "trigger" and not unchanged(s)]
        for statement in statements:
            if statement.kind == "view":
                if unchanged(statement):
                    continue
                self.written.append(statement.name)
            self.execute(statement)
        self.lock_tables({trigger.table for trigger in triggers})
        for trigger in triggers:
            if ("trigger", identity(trigger)) in present and not re.match(r"create\s+or\s+replace\b", trigger.text, re.I):
                self.drop_trigger(identity(trigger))
            self.execute(trigger)
            self.written.append(identity(trigger))
        self.drop_leftovers()
        self.refuse_overloads()
        self.remember()

    def lock_tables(self, tables: set[str]) -> None:
        """In the order in which schema.sql creates them, which is the order in which everybody locks."""
        creates = "\n".join(statement.text.lower() for statement in self.source.schema)
        for table in sorted(tables, key=lambda name: (creates.find(f"create table {name} "), name)):
            name = sql.Identifier(*table.split("."))
            self.conn.execute(sql.SQL("lock table {} in share row exclusive mode").format(name))

    def drop_leftovers(self) -> None:
        """Drop what an earlier deploy wrote and this one doesn't know, each after what depends on it."""
        wanted = {(s.kind, identity(s)) for s in (*self.source.schema, *self.source.statements)}
        left = [there for there in self.objects() if (there.kind, there.identity) not in wanted]
        while left:
            needed, reason = [], ""
            for there in left:
                try:
                    with self.conn.transaction():
                        self.drop(there)
                    self.dropped.append(there.name)
                except errors.DependentObjectsStillExist as error:
                    needed.append(there)
                    reason = f"{error.diag.message_primary}: {error.diag.message_detail}"
            if len(needed) == len(left):
                raise DeployError(f"{reason}. It is in no file of db/ any more, but somebody built on it")
            left = needed

    def drop(self, there: Object) -> None:
        """Drop a function, view or trigger."""
        if there.kind == "trigger":
            self.drop_trigger(there.identity)
        else:
            self.conn.execute(f"drop {'view' if there.kind == 'view' else 'routine'} {there.name}".encode())

    def refuse_overloads(self) -> None:
        """A changed signature makes a second function beside the first one, which would live on unseen."""
        wanted = Counter(identity(s) for s in (*self.source.schema, *self.source.statements) if s.kind == "function")
        functions = [there for there in self.objects() if there.kind == "function"]
        for name in Counter(there.identity for there in functions) - wanted:
            signatures = ", ".join(there.name for there in functions if there.identity == name)
            raise DeployError(f"{name} would have two signatures: {signatures}. A changed signature is a new name")

    def drop_trigger(self, trigger: str) -> None:
        """Drop a trigger by its identity, schema.table.trigger."""
        schema, table, name = map(sql.Identifier, trigger.split("."))
        self.conn.execute(sql.SQL("drop trigger {} on {}.{}").format(name, schema, table))

    def objects(self) -> list[Object]:
        """The functions, views and triggers in our schemas, the youngest first."""
        return [Object(*row) for row in self.conn.execute(OBJECTS, {"schemas": self.source.schemas})]

    def definitions(self) -> dict[tuple[str, str], str]:
        """How PostgreSQL tells the views and triggers in our schemas, by kind and identity."""
        return {(there.kind, there.identity): there.definition for there in self.objects() if there.kind != "function"}

    def remember(self) -> None:
        """Leave the next deploy a record."""
        present = self.definitions()
        rows = [
            (statement.kind, identity(statement), statement.text, present[statement.kind, identity(statement)])
            for statement in self.source.statements
            if statement.kind in ("view", "trigger")
        ]
        self.conn.execute("delete from deploy.objects")
        with self.conn.cursor() as cursor:
            cursor.executemany(
                "insert into deploy.objects (kind, identity, statement, definition) values (%s, %s, %s, %s)", rows
            )
        self.conn.execute(
            "insert into deploy.deploys (version, procrastinate_version, digest, migrations, written, dropped)"
            " values (%s, %s, %s, %s, %s, %s)",
            (
                self.source.version,
                self.source.procrastinate_version,
                self.source.digest,
                self.migrated,
                self.written,
                self.dropped,
            ),
        )

    def record(self, migrations: Sequence[Migration]) -> None:
        """Note migrations as applied."""
        with self.conn.cursor() as cursor:
            cursor.executemany(
                "insert into deploy.migrations (origin, name) values (%s, %s)", [migration.key for migration in migrations]
            )

    def owner(self) -> str:
        """The role that owns our schemas."""
        owners = self.conn.execute(
            "select distinct pg_get_userbyid(nspowner) from pg_namespace where nspname = any(%s)", (self.source.schemas,)
        ).fetchall()
        if len(owners) != 1:
            raise DeployError(f"one role must own {', '.join(self.source.schemas)}, not {len(owners)}")
        return str(owners[0][0])

    def become(self, role: str) -> None:
        """Act as a role until the transaction ends."""
        self.conn.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))

    @contextlib.contextmanager
    def search_path(self, path: str) -> Iterator[None]:
        """Look names up elsewhere for a while. Our own files are run with an empty path: they name every schema."""
        self.conn.execute(sql.SQL("set local search_path = {}").format(sql.Identifier(path)))
        yield
        self.conn.execute("set local search_path = pg_catalog")

    def execute_all(self, statements: Sequence[Statement]) -> None:
        """Execute statements in their order."""
        for statement in statements:
            self.execute(statement)

    def execute(self, statement: Statement) -> None:
        """Execute a statement; an error that won't pass tells its place."""
        try:
            self.conn.execute(statement.text.encode())
        except psycopg.Error as error:
            if passes(error):
                raise
            raise DeployError(f"{place(statement, error)}: {error}") from error


def identity(statement: Statement) -> str:
    """schema.name of a function or view, schema.table.name of a trigger."""
    return f"{statement.table}.{statement.name}" if statement.kind == "trigger" else statement.name


def place(statement: Statement, error: psycopg.Error | None = None) -> str:
    """file:line of a statement, or of the error in it."""
    line = statement.line
    if error and error.diag.statement_position:
        line += statement.text.count("\n", 0, int(error.diag.statement_position) - 1)
    return f"{statement.file}:{line}"


def passes(error: psycopg.Error) -> bool:
    """Whether trying again can help: a lock not got in time, or another database of the cluster changing the same roles."""
    if isinstance(error, errors.LockNotAvailable | errors.DeadlockDetected | errors.SerializationFailure):
        return True
    if isinstance(error, errors.InternalError_):
        return "concurrently" in str(error)
    return isinstance(error, errors.UniqueViolation) and (error.diag.schema_name or "") == "pg_catalog"
