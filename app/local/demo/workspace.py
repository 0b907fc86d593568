"""The demo's folder and its database. The next run removes the folder of a killed one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from db.embedded.databases import temporary_database
from db.embedded.folders import lock_folder, remove_abandoned_folders, temporary_base_folder
from db.embedded.server import EmbeddedServer

FOLDER_PREFIX = "surety-"


@contextlib.contextmanager
def demo_folder() -> Generator[Path]:
    """A folder for logs and the sandbox's memory, removed at the end."""
    remove_abandoned_folders()
    path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=temporary_base_folder()))
    lock = lock_folder(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def demo_database(given: str | None) -> Generator[str]:
    """A new database on a given server, where nothing else is touched, or on an embedded one."""
    with contextlib.ExitStack() as stack:
        if given is None:
            given = stack.enter_context(EmbeddedServer(durable=True)).url
        yield stack.enter_context(temporary_database(given, "surety_demo"))
