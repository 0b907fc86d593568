"""The output of a group's processes: a log file for each, or lines printed with the process's name."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

READ_BYTES = 65_536
TAIL_LINES = 15

PrintLine = Callable[[str, str], None]
"""Prints a line of a process, given the process's name and the line."""


class ProcessOutput(Protocol):
    """Receives what processes write to stdout and stderr."""

    def open(self, name: str) -> IO[Any] | int:
        """The stdout for a new process; a file is closed in this process after the start."""

    def follow(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Receive the output of a started process."""

    def read(self, seconds: float) -> None:
        """Wait at most so many seconds for output and handle it."""

    def tail(self, name: str) -> str:
        """The last lines of a process, if they are stored."""

    def close(self) -> None:
        """Handle the rest after all processes have ended."""


class LogFiles:
    """A log file for each process, `NAME.log` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str) -> IO[Any] | int:
        """The log file, opened for appending."""
        return (self.folder / f"{name}.log").open("ab")

    def follow(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Do nothing: the process writes to the log file itself."""

    def read(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def tail(self, name: str) -> str:
        """The last lines of the log."""
        log = self.folder / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.exists() else "(no log)"

    def close(self) -> None:
        """Do nothing: the files belong to the processes."""


class PrintedLines:
    """Prints each complete line with the name of its process."""

    def __init__(self, print_line: PrintLine) -> None:
        self._print_line = print_line
        self._selector = selectors.DefaultSelector()
        self._pipes: dict[int, IO[bytes]] = {}
        self._incomplete: dict[int, bytes] = {}

    def open(self, name: str) -> IO[Any] | int:
        """A pipe."""
        return subprocess.PIPE

    def follow(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Read the process's pipe from now on."""
        pipe = process.stdout
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self._pipes[pipe.fileno()] = pipe
        self._selector.register(pipe.fileno(), selectors.EVENT_READ, name)

    def read(self, seconds: float) -> None:
        """Print complete lines; a pipe whose process has ended is closed."""
        for key, _ in self._selector.select(seconds):
            received = os.read(key.fd, READ_BYTES)
            *lines, rest = (self._incomplete.pop(key.fd, b"") + received).split(b"\n")
            if received:
                self._incomplete[key.fd] = rest
            else:
                self._selector.unregister(key.fd)
                self._pipes.pop(key.fd).close()
                lines = [rest] if rest else []
            for line in lines:
                self._print_line(key.data, line.decode(errors="replace"))

    def tail(self, name: str) -> str:
        """Print pending output; no line is kept."""
        self.read(0)
        return ""

    def close(self) -> None:
        """Print the rest."""
        self.read(0)
        self._selector.close()
