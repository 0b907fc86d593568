"""Processes of this machine: a child ends with its parent, a process id is checked for its process."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def die_with_parent(number: signal.Signals = signal.SIGINT) -> Callable[[], None] | None:
    """A `preexec_fn` after which the child gets a signal when the thread that started it ends; None outside Linux."""
    if platform.system() != "Linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal, parent = 1, os.getpid()

    def prepare() -> None:
        prctl(set_parent_death_signal, number)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def wait_until(condition: Callable[[], bool], seconds_max: float) -> bool:
    """Poll until a condition holds; False if it doesn't in time."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def process_start_time(pid: int) -> str:
    """The start time of a process, which differs from that of a later one with the same id; `-` if it is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "_".join(read_ps_column(pid, "lstart").split()) or "-"


def server_pid(data: Path) -> int | None:
    """The process that serves a data folder: the one in its lock file, if that process runs on this folder."""
    try:
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, IndexError, ValueError):
        return None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        command = read_ps_column(pid, "command").split()
    return pid if str(data) in command else None


def read_ps_column(pid: int, column: str) -> str:
    """A column of `ps` where there is no /proc; empty if the process is dead."""
    if Path("/proc/self").exists():
        return ""
    listing = subprocess.run(["ps", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout
