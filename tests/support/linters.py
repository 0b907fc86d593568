"""The linters of style and types, each a program that runs in the background."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent

LINTERS: dict[str, tuple[str, ...]] = {
    "ruff": ("ruff", "check", "--output-format", "concise"),
    "ruff's formatter": ("ruff", "format", "--check"),
    "mypy": ("mypy",),
    "ty": ("ty", "check", "--output-format", "concise"),
    "sqlfluff": ("sqlfluff", "lint", "--disable-progress-bar", "schema.sql", "db", "migrations"),
}


class Linters:
    """All linters, started together."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for name, (program, *arguments) in LINTERS.items():
            output = tempfile.TemporaryFile()  # noqa: SIM115  open until it was read
            command = [str(BIN / program), *arguments]
            self.running[name] = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output), output

    def result(self, name: str) -> tuple[int, str]:
        """A linter's exit status and output, once it has ended."""
        process, output = self.running[name]
        status = process.wait(400)
        output.seek(0)
        return status, output.read().decode(errors="replace")

    def stop(self) -> None:
        """Stop the linters that still run."""
        for process, output in self.running.values():
            process.terminate()
            process.wait()
            output.close()
