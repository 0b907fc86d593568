"""Files that are imported: their digest, and how they are copied into staging tables."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO

import click

from db.formats.bank_statements import FileRefused

CHUNK_BYTES = 1 << 20


def open_file(path: Path) -> IO[bytes]:
    """The file, opened. Raises FileRefused."""
    try:
        return path.open("rb")
    except OSError as error:
        raise FileRefused(f"{path}: {error.strerror}") from None


def file_digest(file: IO[bytes]) -> str:
    """The SHA-256 of a file's content; the file is at its start again."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()


file_argument = click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
