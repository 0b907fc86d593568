"""The files of a version: schema.sql and migrations/ (its state), db/*.sql (its behaviour), Procrastinate's own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import psycopg

from db import BEHAVIOUR_FILES, LOCK_ORDER
from db.deploy.statements import Statement, read_statements
from db.errors import DeployError

PACKAGE = Path(__file__).parent.parent
BOOKKEEPING = Path(__file__).parent / "bookkeeping.sql"


def state_folder() -> Path:
    """The folder of schema.sql and migrations/: in the package of a wheel, else the root of the checkout."""
    for folder in (PACKAGE / "_state", PACKAGE.parent):
        if (folder / "schema.sql").is_file():
            return folder
    raise DeployError(f"schema.sql is neither in {PACKAGE / '_state'} nor in {PACKAGE.parent}")


@dataclass(frozen=True)
class VersionFiles:
    """The files of a version. `state` holds schema.sql and migrations/; `behaviour` are the files of db/, in order."""

    state: Path
    behaviour: tuple[Path, ...]
    procrastinate: Path
    procrastinate_version: str
    version: str

    @classmethod
    def installed(cls, state: Path | None = None, behaviour: Sequence[Path] | None = None) -> VersionFiles:
        """The files of the installed version; state and behaviour can be taken from elsewhere."""
        package = importlib.util.find_spec("procrastinate")
        assert package, "Procrastinate is a dependency"
        if behaviour is None:
            behaviour = [PACKAGE / "sql" / f"{name}.sql" for name in BEHAVIOUR_FILES]
        return cls(
            state=state or state_folder(),
            behaviour=tuple(behaviour),
            procrastinate=Path(package.origin or "").parent / "sql",
            procrastinate_version=importlib.metadata.version("procrastinate"),
            version=importlib.metadata.version("surety"),
        )

    @cached_property
    def schema(self) -> list[Statement]:
        """The statements of schema.sql."""
        return read_statements(self.state / "schema.sql")

    @cached_property
    def schemas(self) -> list[str]:
        """Our schemas: those that schema.sql creates."""
        return [statement.name for statement in self.schema if statement.kind == "schema"]

    @cached_property
    def statements(self) -> list[Statement]:
        """The statements of db/*.sql. Raises DeployError for one that can't be repeated."""
        found = [statement for path in self.behaviour for statement in read_statements(path)]
        for statement in found:
            if statement.kind in ("function", "view") and not statement.replaces:
                raise DeployError(
                    f"{location_of(statement)}: write `create or replace`, so that it can be deployed again"
                )
            if statement.kind in ("function", "view", "trigger") and "." not in statement.identity:
                raise DeployError(f"{location_of(statement)}: name the schema, too")
        return found

    @cached_property
    def migrations(self) -> list[Migration]:
        """Our migrations in the order of their names, without baselines. Raises DeployError for behaviour in one."""
        paths = sorted((self.state / "migrations").glob("*.sql"))
        found = [Migration("surety", path) for path in paths if not path.name.endswith("baseline.sql")]
        for statement in (statement for migration in found for statement in migration.statements):
            if statement.kind in ("function", "view", "trigger"):
                raise DeployError(
                    f"{location_of(statement)}: a migration may drop a {statement.kind}, never create one"
                )
        return found

    @cached_property
    def procrastinate_migrations(self) -> list[Migration]:
        """The migrations of Procrastinate's package."""
        return [Migration("procrastinate", path) for path in sorted((self.procrastinate / "migrations").glob("*.sql"))]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of db/*.sql and of their order."""
        total = hashlib.sha256()
        for path in (BOOKKEEPING, *self.behaviour):
            total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return total.hexdigest()


@dataclass(frozen=True)
class Migration:
    """A migration of the state, ours or Procrastinate's."""

    origin: Literal["surety", "procrastinate"]
    path: Path

    @cached_property
    def statements(self) -> list[Statement]:
        """Its statements."""
        return read_statements(self.path)

    @property
    def key(self) -> tuple[str, str]:
        """Its key in deploy.migrations."""
        return self.origin, self.path.name

    @property
    def search_path(self) -> str:
        """Its search_path: Procrastinate's files name no schema, ours name all."""
        return "procrastinate" if self.origin == "procrastinate" else "pg_catalog"

    @property
    def is_concurrent(self) -> bool:
        """Whether it runs outside a transaction."""
        if self.origin == "surety":
            return self.path.name.endswith(".concurrent.sql")
        return any(re.search(r"\bconcurrently\b", statement.text, re.IGNORECASE) for statement in self.statements)

    @property
    def waits_for_new_code(self) -> bool:
        """Whether all workers of the previous version must have ended before it runs, by Procrastinate's rule."""
        return self.origin == "procrastinate" and "_post_" in self.path.name


def lock_rank(table: str) -> tuple[int, str]:
    """Sorts tables into the order in which to lock them."""
    return (LOCK_ORDER.index(table) if table in LOCK_ORDER else len(LOCK_ORDER)), table


def location_of(statement: Statement, error: psycopg.Error | None = None) -> str:
    """file:line of a statement, or of the error in it."""
    line = statement.line
    if error and error.diag.statement_position:
        line += statement.text.count("\n", 0, int(error.diag.statement_position) - 1)
    return f"{statement.file}:{line}"
