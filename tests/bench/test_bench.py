"""The benchmarks at a tiny size: that they run, check what they did and tell it. How fast is not a test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.bench.ground import ROOT

SIZES = {
    "drain": [
        "--events=600",
        "--past=1000",
        "--backlog=600",
        "--jobs=40",
        "--concurrency=4",
        "--merchants=5",
        "--rounds=1",
    ],
    "trace": ["--entries=2000", "--traces=20", "--merchants=5", "--rounds=1"],
    "lifecycle": ["--payments=20", "--merchants=3", "--workers=1", "--idle-payments=4", "--rounds=1"],
    "overload": ["--seconds=1", "--connections=32", "--probes=4", "--merchants=3", "--rounds=1"],
    "accept": ["--seconds=1", "--connections=8", "--single-lanes=2", "--merchants=3", "--rounds=1", "--warm-mb=1"],
}
PROMISED = {
    "drain": {"ratio_to_procrastinate", "flatness", "blocked_ratio"},
    "trace": {"p99_ms"},
    "lifecycle": {"payments_per_second", "idle_p50_ms"},
    "overload": {"p99_ratio", "goodput_ratio", "refused_share"},
    "accept": {"ratio_to_noop", "ratio_to_single", "p99_ms"},
}


def measure(name: str, *options: str) -> dict[str, Any]:
    """A benchmark's figures: the last line of its output."""
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", name, *options, "--json"],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("name", SIZES)
def test_benchmark_tells_what_is_promised(name: str) -> None:
    figures = measure(name, *SIZES[name])
    assert figures["benchmark"] == name
    assert figures.keys() >= PROMISED[name]
    # Of so small a load nothing need be refused, and none of the few probes let in.
    assert all(figures[promised] > 0 for promised in PROMISED[name] - {"refused_share", "p99_ratio"})
    assert figures.get("lost", 0) == 0
