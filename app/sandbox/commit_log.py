"""The commits that SQLite does not hold yet, in a file beside it.

A commit is one append, which costs far less than an SQLite transaction. Many commits become one transaction. It writes
only the latest state of each object, and leaves out scheduled actions that are already done. A killed process leaves
its appended commits to the next process. Commits are numbered, so none is written twice, which would add to tallies.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

ObjectRow = tuple[int, str, str, str, int, str, str, str, int, int, str, str]
KeyRow = tuple[str, str, bytes, int, bytes, str, float]
ActionRow = tuple[int, float, str, str, int]

LENGTH_BYTES = 4


class Commit(Struct, array_like=True):
    """The rows that one commit writes, in the order of their tables' columns."""

    objects: list[ObjectRow]
    keys: list[KeyRow]
    scheduled: list[ActionRow]
    done: list[int]
    """Numbers of scheduled actions that need not run any more."""
    tallies: dict[str, int]
    """The amount to add to each."""


class PendingCommits:
    """Commits that SQLite does not hold yet, merged."""

    def __init__(self) -> None:
        self.objects: dict[str, ObjectRow] = {}
        self.keys: dict[tuple[str, str], KeyRow] = {}
        self.scheduled: dict[int, ActionRow] = {}
        self.done: list[int] = []
        self.tallies: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.objects or self.keys or self.scheduled or self.done or self.tallies)

    def add(self, commit: Commit) -> None:
        """Merge one more commit into these."""
        for row in commit.objects:
            self.objects[row[1]] = row
        for key in commit.keys:
            self.keys[key[:2]] = key
        for action in commit.scheduled:
            self.scheduled[action[0]] = action
        for seq in commit.done:
            if self.scheduled.pop(seq, None) is None:
                self.done.append(seq)
        for name, by in commit.tallies.items():
            self.tallies[name] = self.tallies.get(name, 0) + by


class LoggedCommit(Struct, array_like=True):
    memory: str
    """The id of the memory that this is a commit of; a log may be left over from another one."""
    number: int
    """Within the memory, from 1."""
    commit: Commit


encode = msgspec.msgpack.encode
decode = msgspec.msgpack.Decoder(LoggedCommit).decode


class CommitLog:
    """The file; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600) if path else None

    def append(self, logged: LoggedCommit) -> None:
        """Add a commit. A kill of this process does not lose it; a power failure may."""
        if self._file is None:
            return
        content = encode(logged)
        entry = len(content).to_bytes(LENGTH_BYTES) + content
        written = os.write(self._file, entry)
        if written != len(entry):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(f"a commit of {len(entry)} bytes was not written as a whole")

    def commits(self) -> Iterator[LoggedCommit]:
        """All of them, oldest first. One that was cut off by a kill was not answered and is left out."""
        if self._file is None:
            return
        content, at = os.pread(self._file, os.fstat(self._file).st_size, 0), 0
        while at + LENGTH_BYTES <= len(content):
            start = at + LENGTH_BYTES
            at = start + int.from_bytes(content[start - LENGTH_BYTES : start])
            if at <= len(content):
                yield decode(content[start:at])

    def clear(self) -> None:
        """Empty it, because SQLite holds all of it."""
        if self._file is not None:
            os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
