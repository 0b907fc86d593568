"""Secrets in files: `NAME_FILE` names a file with the value of `NAME`, as secret stores and supervisors mount them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from db.errors import SettingsError

SECRET_BYTES_MAX = 65_536
# Reading by the group is allowed: stores mount a file for the group of a process that does not own it.
PERMISSIONS_TOO_OPEN = stat.S_IWGRP | stat.S_IRWXO


def read_secret_files(names: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The values of those variables whose `NAME_FILE` is set. Raises SettingsError that names the variable and file."""
    values = {}
    for name in names:
        variable = f"{name}_FILE"
        if not environment.get(variable):
            continue
        if environment.get(name):
            raise SettingsError(f"{name} and {variable} are both set: set one of them")
        try:
            values[name] = read_secret(Path(environment[variable]))
        except OSError as error:
            raise SettingsError(
                f"{variable}: {environment[variable]} can't be read: {error.strerror} (as user {os.geteuid()})"
            ) from None
        except ValueError as error:
            raise SettingsError(f"{variable}: {environment[variable]} {error}") from None
    return values


def read_secret(path: Path) -> str:
    """The one line of a file, without white space around it. Raises OSError, and ValueError with the broken rule."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & PERMISSIONS_TOO_OPEN:
            raise ValueError(
                f"has mode {mode:04o}: only its user may write it, and others may not read it; chmod 0400, or 0440 for"
                " a group"
            )
        content = file.read(SECRET_BYTES_MAX + 1)
    if len(content) > SECRET_BYTES_MAX:
        raise ValueError(f"is larger than {SECRET_BYTES_MAX} bytes: it holds no secret")
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    if not text:
        raise ValueError("is empty")
    if not text.isprintable():
        raise ValueError("holds more than one line, or characters that can't be printed")
    return text
