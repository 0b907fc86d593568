"""A benchmark's command, run by a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.bench.databases import ROOT


def run_benchmark(name: str, *options: str) -> dict[str, Any]:
    """A benchmark's results: the last line of its output."""
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", name, *options, "--json"],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results
