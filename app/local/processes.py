"""Processes of ours that belong to another one: they leave nothing behind, however that ends.

Ctrl-C, a closed terminal and `kill` all end it the same way: the first signal silences the others and raises. If it is
killed itself, its children die with it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from db.embedded import die_with_parent
from db.errors import SuretyError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 10.0

Process = subprocess.Popen[bytes]


class ProcessError(SuretyError):
    """A process did not start, or there is no port for it; the message says which and why."""


class Interrupted(BaseException):
    """Somebody wants all to end now."""


@contextlib.contextmanager
def interruptible() -> Generator[None]:
    """The first INT, TERM or HUP raises Interrupted, and no further one disturbs the clearing up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else one that the system chooses."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise ProcessError("no port of 127.0.0.1 is free")


def start_python(arguments: Sequence[str], environment: Mapping[str, str], output: IO[Any] | int) -> Process:
    """Python with its arguments, in a session of its own, killed when the thread that started it ends."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  it calls nothing that another thread could have locked
    )


def is_listening(port: int) -> bool:
    """Whether somebody listens on a port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class ProcessGroup:
    """Processes whose output goes to a log each."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self.processes: dict[str, Process] = {}

    def start(self, name: str, *arguments: str) -> None:
        """Start Python with its arguments."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = start_python(arguments, self.environment, log)

    def wait_for_port(self, name: str, port: int) -> None:
        """Wait until a process listens. Raises ProcessError with the end of its log."""
        self.wait_for(name, lambda: is_listening(port))

    def wait_for(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a process is ready. Raises ProcessError with the end of its log if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while not is_ready():
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise ProcessError(f"{name} did not start:\n{self.log_tail(name)}")
            time.sleep(0.02)

    def log_tail(self, name: str, lines: int = 15) -> str:
        """The end of a process's log."""
        log = self.folder / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"

    def ended_processes(self) -> dict[str, int]:
        """Processes that ended although nobody ended them, with their exit status."""
        return {name: code for name, process in self.processes.items() if (code := process.poll()) is not None}

    def kill(self, name: str) -> None:
        """As a crash would: SIGKILL, no farewell."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End all: politely, in reverse order, then not."""
        for process in reversed(self.processes.values()):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS_MAX
        for process in reversed(self.processes.values()):
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
