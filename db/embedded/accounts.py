"""The system account that runs an embedded server."""

from __future__ import annotations

import contextlib
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from db.errors import EmbeddedServerError


@dataclass(frozen=True, slots=True)
class SystemAccount:
    """The user that runs a server; without ids, the calling user."""

    name: str = ""
    uid: int | None = None
    gid: int | None = None
    groups: list[int] | None = None

    @classmethod
    def for_servers(cls) -> SystemAccount:
        """The calling user, unless that is root."""
        if os.geteuid() != 0:
            return cls()
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return cls(name, entry.pw_uid, entry.pw_gid, groups=[])
        raise EmbeddedServerError(
            "PostgreSQL can't run as root, and neither `postgres` nor `nobody` exists on this machine"
        )

    def can_enter(self, path: Path) -> bool:
        """Whether it may enter this path and all folders above it, by their permission bits."""
        if self.uid is None:
            return True
        for place in (path.resolve(), *path.resolve().parents):
            status = place.stat()
            shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
            if not (status.st_mode >> shift) & 0o1:
                return False
        return True

    def own_folder(self, folder: Path) -> None:
        """Make the account the only owner of a folder."""
        folder.chmod(0o700)
        if self.uid is not None and self.gid is not None:
            os.chown(folder, self.uid, self.gid)
