"""`surety up`: everything that Surety is, on this machine, for everyday work; it supervises its processes.

What dies is started again after a pause that doubles while it keeps dying. One thread does it all: children that start
while other threads run could inherit a lock that nobody will ever release.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from app.local.processes import Process, ProcessError, is_listening, start_python
from db.embedded import EmbeddedServer, lock_folder
from db.errors import EmbeddedServerError, SuretyError

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 35.0
RESTART_PAUSE_SECONDS = 0.5
RESTART_PAUSE_SECONDS_MAX = 30.0
STABLE_SECONDS = 60.0
OUTPUT_WAIT_SECONDS = 0.1
READ_BYTES = 65_536

PrintLine = Callable[[str, str], None]
"""Shows a line of a process's."""


class AlreadyRunning(SuretyError):
    """Another `surety up` has the folder; the message says which process it is."""


@contextlib.contextmanager
def exclusive_folder(path: Path) -> Generator[Path]:
    """The folder of everything that is kept, for this process alone. Raises AlreadyRunning, ProcessError."""
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
    """A secret for webhooks, the same each time."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(f"whsec_{secrets.token_hex(16)}")
    return path.read_text().strip()


@dataclass
class SupervisedProcess:
    """One process: how it is started, and how it fares."""

    name: str
    arguments: tuple[str, ...]
    port: int | None = None
    process: Process | None = None
    started_at: float = 0.0
    starts_at: float = 0.0
    pause_seconds: float = RESTART_PAUSE_SECONDS
    rest: bytes = field(default=b"", repr=False)

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None


class ProcessSupervisor:
    """Starts processes, shows what they say, starts them again when they die, ends them."""

    def __init__(
        self, environment: Mapping[str, str], print_line: PrintLine, server: EmbeddedServer | None = None
    ) -> None:
        self.environment = dict(environment)
        self.members: list[SupervisedProcess] = []
        self._print_line = print_line
        self._server = server
        self._server_starts_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._pipes: dict[int, IO[bytes]] = {}

    def add(self, name: str, *arguments: str, port: int | None = None) -> None:
        """Start a process of Python's and wait until it listens, where it has a port. Raises ProcessError."""
        member = SupervisedProcess(name, arguments, port)
        self.members.append(member)
        self._start(member)
        deadline = time.monotonic() + START_SECONDS_MAX
        while port is not None and not is_listening(port):
            self._read_output(OUTPUT_WAIT_SECONDS)
            if not member.is_alive or time.monotonic() > deadline:
                self._read_output(0)
                raise ProcessError(f"{name} did not start")

    def watch(self) -> None:
        """Supervise, for ever."""
        while True:
            self.supervise_once()

    def supervise_once(self) -> None:
        """Hear what is said for a moment; start again what has died, when its pause is over."""
        self._read_output(OUTPUT_WAIT_SECONDS)
        now = time.monotonic()
        self._restart_server(now)
        for member in self.members:
            if member.process is not None and not member.is_alive:
                self._handle_exit(member, now)
            if member.process is None and now >= member.starts_at:
                self._start(member)

    def stop(self) -> None:
        """End all: politely, in reverse order, hearing them out; then not."""
        deadline = time.monotonic() + STOP_SECONDS_MAX
        for member in reversed(self.members):
            if member.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(signal.SIGTERM)
        while any(member.is_alive for member in self.members) and time.monotonic() < deadline:
            self._read_output(OUTPUT_WAIT_SECONDS)
        for member in self.members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()
        self._read_output(0)
        self._selector.close()

    def _start(self, member: SupervisedProcess) -> None:
        member.process = start_python(member.arguments, self.environment, subprocess.PIPE)
        member.started_at = time.monotonic()
        pipe = member.process.stdout
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self._pipes[pipe.fileno()] = pipe
        self._selector.register(pipe.fileno(), selectors.EVENT_READ, member)

    def _handle_exit(self, member: SupervisedProcess, now: float) -> None:
        assert member.process is not None
        if now - member.started_at > STABLE_SECONDS:
            member.pause_seconds = RESTART_PAUSE_SECONDS
        status = member.process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._print_line("up", f"{member.name} {how}; it is started again in {member.pause_seconds:g} s")
        member.process = None
        member.starts_at = now + member.pause_seconds
        member.pause_seconds = min(2 * member.pause_seconds, RESTART_PAUSE_SECONDS_MAX)

    def _restart_server(self, now: float) -> None:
        server = self._server
        if server is None or server.process is None or server.process.poll() is None:
            return
        if self._server_starts_at is None:
            self._print_line("up", f"postgresql ended; it is started again in {RESTART_PAUSE_SECONDS:g} s")
            self._server_starts_at = now + RESTART_PAUSE_SECONDS
        elif now >= self._server_starts_at:
            self._server_starts_at = None
            server.restart("immediate")

    def _read_output(self, seconds: float) -> None:
        """Show whole lines of what was said; a process's end closes its pipe."""
        for key, _ in self._selector.select(seconds):
            member: SupervisedProcess = key.data
            said = os.read(key.fd, READ_BYTES)
            *lines, member.rest = (member.rest + said).split(b"\n")
            if not said:
                self._selector.unregister(key.fd)
                self._pipes.pop(key.fd).close()
                lines, member.rest = [member.rest] if member.rest else [], b""
            for line in lines:
                self._print_line(member.name, line.decode(errors="replace"))
