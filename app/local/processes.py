"""Groups of child processes. None is left behind, however the parent ends.

Ctrl-C, a closed terminal and `kill` end the parent in the same way: the first signal raises Interrupted, later ones are
ignored. A killed parent takes its children with it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from app.local.output import ProcessOutput
from db.embedded.processes import die_with_parent
from db.errors import SuretyError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 10.0
POLL_SECONDS = 0.02
RESTART_PAUSE_SECONDS_MAX = 30.0
STABLE_SECONDS = 60.0
"""After a run of this length, a process is restarted with the shortest pause again."""

Process = subprocess.Popen[bytes]


class ProcessError(SuretyError):
    """A process did not start, or there is no port for it; the message says which and why."""


class Interrupted(BaseException):
    """A signal asks this process to end; the text is its name."""


@contextlib.contextmanager
def interruptible() -> Generator[None]:
    """The first INT, TERM or HUP raises Interrupted; later ones are ignored, so that the cleanup ends."""

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
    """`wanted` if that port is free, else one that the system chooses. Raises ProcessError."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise ProcessError("no port of 127.0.0.1 is free")


def start_python(arguments: Sequence[str], environment: Mapping[str, str], output: IO[Any] | int) -> Process:
    """Python with arguments, in a session of its own, killed when the thread that started it ends."""
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
    """Whether a process listens on a port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@dataclass(slots=True)
class GroupMember:
    """A process of a group. Times are those of time.monotonic()."""

    arguments: tuple[str, ...]
    process: Process | None = None
    started_at: float = 0.0
    restarts_at: float = 0.0
    pause_seconds: float = 0.0
    """Before its next restart."""


class ProcessGroup:
    """Processes of Python that are started, watched, restarted and ended together. Not thread-safe."""

    def __init__(
        self, environment: Mapping[str, str], output: ProcessOutput, stop_seconds_max: float = STOP_SECONDS_MAX
    ) -> None:
        self.environment = dict(environment)
        self.output = output
        self.stop_seconds_max = stop_seconds_max
        self.members: dict[str, GroupMember] = {}

    @property
    def processes(self) -> dict[str, Process]:
        """The processes that were started and not killed, by name."""
        return {name: member.process for name, member in self.members.items() if member.process is not None}

    def start(self, name: str, *arguments: str) -> None:
        """Start Python with arguments."""
        self.members[name] = GroupMember(arguments)
        self._start(name)

    def _start(self, name: str) -> None:
        member, stdout = self.members[name], self.output.open(name)
        try:
            member.process = start_python(member.arguments, self.environment, stdout)
        finally:
            if not isinstance(stdout, int):
                stdout.close()
        member.started_at = time.monotonic()
        self.output.follow(name, member.process)

    def wait_for_port(self, name: str, port: int) -> None:
        """Wait until a process listens. Raises ProcessError with the end of its log."""
        self.wait_for(name, lambda: is_listening(port))

    def wait_for(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a process is ready. Raises ProcessError with the end of its log if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while not is_ready():
            if name not in self.processes or name in self.ended_processes() or time.monotonic() > deadline:
                raise ProcessError(f"{name} did not start\n{self.output.tail(name)}".rstrip())
            self.output.read(POLL_SECONDS)

    def ended_processes(self) -> dict[str, int]:
        """Exit statuses of the processes that ended by themselves."""
        return {name: code for name, process in self.processes.items() if (code := process.poll()) is not None}

    def kill(self, name: str) -> None:
        """SIGKILL a process, as a crash would."""
        process = self.members[name].process
        assert process is not None
        process.kill()
        process.wait()
        self.members[name].process = None

    def revive(self, pause_seconds: float = 0.0, report: Callable[[str], None] | None = None) -> list[str]:
        """Restart processes that ended or were killed; returns the names of those started.

        The pause before a restart doubles while a process keeps ending; `report` gets a sentence about each end.
        """
        now = time.monotonic()
        for name, status in self.ended_processes().items():
            member = self.members[name]
            if member.pause_seconds == 0 or now - member.started_at > STABLE_SECONDS:
                member.pause_seconds = pause_seconds
            if report is not None:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                report(f"{name} {how}; it is started again in {member.pause_seconds:g} s")
            member.process = None
            member.restarts_at = now + member.pause_seconds
            member.pause_seconds = min(2 * member.pause_seconds, RESTART_PAUSE_SECONDS_MAX)
        due = [name for name, member in self.members.items() if member.process is None and now >= member.restarts_at]
        for name in due:
            self._start(name)
        return due

    def stop(self, *names: str) -> None:
        """End processes, all of them by default: SIGTERM in reverse order, SIGKILL after `stop_seconds_max`."""
        deadline = time.monotonic() + self.stop_seconds_max
        ending = [self.members.pop(name).process for name in reversed(names or tuple(self.members))]
        processes = [process for process in ending if process is not None]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            self.output.read(POLL_SECONDS)
        for process in processes:
            process.kill()
            process.wait()
        if not self.members:
            self.output.close()
