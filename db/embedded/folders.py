"""Folders of embedded servers: each is locked by its process, and removed by a later run if that process was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from pathlib import Path

from db.embedded.processes import server_pid, wait_until
from db.errors import EmbeddedServerError

MEMORY_FREE_BYTES_MIN = 512 * 1024 * 1024
STOP_SECONDS_MAX = 30.0
FOLDER_PREFIX = "surety-"
OWNER_FILE = "owner"
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  our folders in it are made by mkdtemp


def lock_folder(folder: Path) -> int:
    """Lock a folder for as long as this process lives; returns the file descriptor that holds the lock.

    The lock ends with its process, and is held before its file becomes visible. Raises EmbeddedServerError if another
    process holds it.
    """
    mark = folder / OWNER_FILE
    if mark.exists():
        descriptor = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise EmbeddedServerError(f"{folder} is in use by another process") from None
        return descriptor
    unseen = folder / f"{OWNER_FILE}.{os.getpid()}"
    descriptor = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unseen.rename(mark)
    return descriptor


def remove_abandoned_folders() -> list[Path]:
    """Stop the servers and remove the folders that killed runs of this user left; returns the folders."""
    removed = []
    for base in {temporary_base_folder(), Path(tempfile.gettempdir())}:
        for mark in base.glob(f"{FOLDER_PREFIX}*/{OWNER_FILE}"):
            with contextlib.suppress(OSError, EmbeddedServerError):
                if mark.lstat().st_uid != os.geteuid():
                    continue
                descriptor = lock_folder(mark.parent)
                try:
                    stop_abandoned_server(mark.parent / "data")
                    shutil.rmtree(mark.parent)
                    removed.append(mark.parent)
                finally:
                    os.close(descriptor)
    return removed


def stop_abandoned_server(data: Path) -> None:
    """Stop the server that still runs on a data folder whose owner is dead, if there is one."""
    pid = server_pid(data)
    if pid is None:
        return
    os.kill(pid, signal.SIGQUIT)
    wait_until(lambda: server_pid(data) is None, STOP_SECONDS_MAX)


def temporary_base_folder() -> Path:
    """The folder of temporary folders: in memory if there is room."""
    if (
        MEMORY_FOLDER.is_dir()
        and os.access(MEMORY_FOLDER, os.W_OK)
        and shutil.disk_usage(MEMORY_FOLDER).free >= MEMORY_FREE_BYTES_MIN
    ):
        return MEMORY_FOLDER
    return Path(tempfile.gettempdir())
