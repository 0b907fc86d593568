"""`surety up`: its folder, and the supervision of its processes and its PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from base64 import b64encode
from collections.abc import Callable, Generator
from pathlib import Path

from app.local.output import PrintLine
from app.local.processes import ProcessError, ProcessGroup
from db.embedded.folders import lock_folder
from db.embedded.server import EmbeddedServer
from db.errors import EmbeddedServerError, SuretyError

STOP_SECONDS_MAX = 35.0
RESTART_PAUSE_SECONDS = 0.5
OUTPUT_WAIT_SECONDS = 0.1
LOOPBACK = "127.0.0.0/8,::1"
"""Networks that merchants' webhooks may reach where the merchants are on this machine."""


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


def load_or_create_secret(path: Path, new_secret: Callable[[], str]) -> str:
    """The secret that a file of this folder keeps; a new one is whole or not there."""
    if not path.exists():
        part = path.with_suffix(".part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as new:
            new.write(new_secret())
        part.rename(path)
    return path.read_text().strip()


def new_provider_secret() -> str:
    """A secret for the sandbox's webhooks."""
    return f"whsec_{secrets.token_hex(16)}"


def new_webhook_key() -> str:
    """A key for the signing secrets of merchants' webhooks."""
    return b64encode(secrets.token_bytes(32)).decode()


def supervise(process_group: ProcessGroup, server: EmbeddedServer | None, print_line: PrintLine) -> None:
    """Print output and restart ended processes until an interrupt."""
    while True:
        process_group.output.read(OUTPUT_WAIT_SECONDS)
        if server is not None and server.process is not None and server.process.poll() is not None:
            print_line("up", f"postgresql ended; it is started again in {RESTART_PAUSE_SECONDS:g} s")
            time.sleep(RESTART_PAUSE_SECONDS)
            server.restart("immediate")
        process_group.revive(RESTART_PAUSE_SECONDS, lambda text: print_line("up", text))
