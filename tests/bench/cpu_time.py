"""CPU time and memory of groups of processes, read from /proc. Linux only."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLOCK_HERTZ = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """A process as /proc/PID/stat shows it: seconds of user and system time, its own and that of ended children."""

    parent: int
    own: float
    ended: float


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
    own, ended = (sum(map(int, words[place : place + 2])) / CLOCK_HERTZ for place in (11, 13))
    return ProcessTimes(int(words[1]), own, ended)


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

    The group `client` has the processes of the benchmark, which are counted without children.
    """
    processes = read_processes()
    return {
        name: sum(
            processes[pid].own if name == "client" else processes[pid].own + processes[pid].ended
            for root in roots
            for pid in ([root] if name == "client" else process_tree(processes, root))
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


def command_of(pid: int) -> str:
    """A process's command with its arguments; empty if there is no such process."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except FileNotFoundError:
        return ""
