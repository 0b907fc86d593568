"""`surety up`: its folder, and the supervision of its processes and its PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Generator
from pathlib import Path

from app.local.output import PrintLine
from app.local.processes import ProcessError, ProcessGroup
from db.embedded.folders import lock_folder
from db.embedded.server import EmbeddedServer
from db.errors import EmbeddedServerError, SuretyError

STOP_SECONDS_MAX = 35.0
RESTART_PAUSE_SECONDS = 0.5
OUTPUT_WAIT_SECONDS = 0.1


class AlreadyRunning(SuretyError):
    """Another `surety up` uses the folder; the message names its process."""


@contextlib.contextmanager
def exclusive_folder(path: Path) -> Generator[Path]:
    """The folder of all kept data, locked for this process. Raises AlreadyRunning, ProcessError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProcessError(f"{path} can't be made: {error.strerror}") from None
    (path / ".gitignore").write_text("*\n")
    pid = path / "pid"
    try:
        mark = lock_folder(path)
    except EmbeddedServerError:
        by = f" (process {pid.read_text().strip()})" if pid.exists() else ""
        raise AlreadyRunning(f"surety up has {path} already{by}: end it first, or name another --folder") from None
    try:
        pid.write_text(f"{os.getpid()}\n")
        yield path
    finally:
        pid.unlink(missing_ok=True)
        os.close(mark)


def load_or_create_secret(path: Path) -> str:
    """The webhook secret of this folder."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(f"whsec_{secrets.token_hex(16)}")
    return path.read_text().strip()


def supervise(process_group: ProcessGroup, server: EmbeddedServer | None, print_line: PrintLine) -> None:
    """Print output and restart ended processes until an interrupt."""
    while True:
        process_group.output.read(OUTPUT_WAIT_SECONDS)
        if server is not None and server.process is not None and server.process.poll() is not None:
            print_line("up", f"postgresql ended; it is started again in {RESTART_PAUSE_SECONDS:g} s")
            time.sleep(RESTART_PAUSE_SECONDS)
            server.restart("immediate")
        process_group.revive(RESTART_PAUSE_SECONDS, lambda text: print_line("up", text))
