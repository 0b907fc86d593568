"""CPU time and memory of groups of processes, read from /proc. Linux only."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLOCK_HERTZ = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """A process as /proc/PID/stat shows it. `seconds`: user and system time, with that of children waited for."""

    parent: int
    seconds: float


def read_processes() -> dict[int, ProcessTimes]:
    """All processes by id."""
    found = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(folder.name)] = parse_stat((folder / "stat").read_text())
    return found


def parse_stat(line: str) -> ProcessTimes:
    """A line of /proc/PID/stat; the command's name, in parentheses, may contain anything."""
    words = line.rpartition(")")[2].split()
    return ProcessTimes(int(words[1]), sum(map(int, words[11:15])) / CLOCK_HERTZ)


def process_tree(processes: Mapping[int, ProcessTimes], root: int) -> list[int]:
    """A process and its living descendants."""
    children = defaultdict(list)
    for pid, process in processes.items():
        children[process.parent].append(pid)
    tree = [root] if root in processes else []
    for pid in tree:
        tree.extend(children[pid])
    return tree


def cpu_seconds(groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """CPU time by group. A group is given by its processes; their descendants are included, ended ones too.

    This process is counted alone, without children.
    """
    processes = read_processes()
    return {
        name: sum(
            time.process_time() if root == os.getpid() else processes[pid].seconds
            for root in roots
            for pid in ([root] if root == os.getpid() else process_tree(processes, root))
        )
        for name, roots in groups.items()
    }


def peak_rss_mb(roots: Sequence[int]) -> float:
    """The largest peak of resident memory among processes and their living descendants."""
    processes = read_processes()
    peaks = [0.0]
    for pid in (pid for root in roots for pid in process_tree(processes, root)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (PROC / str(pid) / "status").read_text()
            peaks += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return round(max(peaks), 1)


def parent_of(pid: int) -> int | None:
    """The parent of a process of this machine; None if there is no such process."""
    try:
        return parse_stat((PROC / str(pid) / "stat").read_text()).parent
    except FileNotFoundError:
        return None
