"""The benchmarks at a tiny size: they run, check their effects and report results. Speed is not tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.bench.databases import ROOT

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
    "lifecycle": ["--payments=20", "--merchants=3", "--workers=1", "--idle-payments=4", "--rounds=1", "--warm-mb=1"],
    "idle": ["--seconds=1", "--workers=1", "--poll-seconds=1", "--rounds=1", "--warm-mb=1"],
    "overload": ["--seconds=0.4", "--connections=32", "--probes=4", "--merchants=3", "--rounds=1"],
    "hostile": ["--seconds=0.3", "--oversized=5", "--rounds=1"],
    "accept": ["--seconds=0.3", "--connections=8", "--single-lanes=2", "--merchants=3", "--rounds=1", "--warm-mb=1"],
}
REQUIRED_RESULTS = {
    "drain": {"ratio_to_procrastinate", "flatness", "blocked_ratio"},
    "trace": {"p99_ms"},
    "lifecycle": {"payments_per_second", "wal_kb_per_payment", "commits_per_payment", "idle_p50_ms"},
    "idle": {"delay_after_pause_ms", "delay_after_second_ms", "pause_ratio"},
    "overload": {"p99_ratio", "goodput_ratio", "refused_share"},
    "hostile": {"p99_ratio", "memory_growth_mb", "refused"},
    "accept": {"ratio_to_noop", "ratio_to_single", "p99_ms"},
}


BASE = "62f8347"
"""A revision that reports no costs by itself."""


def measure(name: str, *options: str) -> dict[str, Any]:
    """A benchmark's results: the last line of its output."""
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", name, *options, "--json"],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def is_revision(name: str) -> bool:
    """Whether this repository has a commit."""
    asked = subprocess.run(["git", "cat-file", "-e", f"{name}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    return asked.returncode == 0


@pytest.mark.parametrize("name", SIZES)
def test_benchmark_reports_the_required_results(name: str) -> None:
    results = measure(name, *SIZES[name])
    assert results["benchmark"] == name
    assert results.keys() >= REQUIRED_RESULTS[name]
    # Under so small a load there may be no refusal, and no probe may be accepted.
    assert all(
        results[field] > 0 for field in REQUIRED_RESULTS[name] - {"refused_share", "p99_ratio", "memory_growth_mb"}
    )
    assert results.get("lost", 0) == 0
    if name == "idle":
        assert {"worker_cpu_percent", "postgres_cpu_percent", "commits_per_second"} <= results.keys()
    # The other groups may use less than 10 ms.
    cpu = results.get("cpu_ms_per_payment", {"workers": 1, "postgres": 1})
    assert min(cpu["workers"], cpu["postgres"], *results.get("peak_rss_mb", {}).values(), 1) > 0


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv installs the other revision")
@pytest.mark.skipif(not is_revision(BASE), reason="the history is not here")
def test_lifecycle_is_compared_with_another_revision_and_with_dbos() -> None:
    sizes = ["--payments=20", "--base-payments=10", "--merchants=3", "--workers=1", "--rounds=1", "--warm-mb=1"]
    results = measure("lifecycle", f"--against={BASE}", "--dbos", "--idle-payments=0", *sizes)
    for name in ("base", "dbos"):
        assert min(results[f"ratio_to_{name}"], results[f"cpu_ratio_to_{name}"], results[f"wal_ratio_to_{name}"]) > 0
    assert results["dbos"]["cpu_ms_per_payment"].keys() == results["cpu_ms_per_payment"].keys()
    assert results["base"]["cpu_ms_per_payment"].keys() == results["cpu_ms_per_payment"].keys() | {"waiting"}
    assert results["base"]["wal_kb_per_payment"] > 0
    assert results["base"]["peak_rss_mb"]["worker"] > 0
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "surety_bench" not in worktrees.stdout


def test_lifecycle_is_compared_with_a_large_database_and_more_workers() -> None:
    sizes = ["--payments=20", "--merchants=3", "--workers=1", "--rounds=1", "--warm-mb=1"]
    results = measure("lifecycle", "--past=50", "--backlog=5", *sizes)
    assert min(results[name] for name in ("ratio_to_fresh", "cpu_ratio_to_fresh", "more_workers_ratio")) > 0
    assert results["half_load_submit_p50_ms"] > 0
    assert results["aged"]["cpu_ms_per_payment"]["workers"] > 0
