"""`lifecycle` beside others, at a tiny size."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.bench.command import run_benchmark
from tests.bench.databases import ROOT

BASE = "62f8347"
"""A revision that reports no costs by itself."""


def is_revision(name: str) -> bool:
    """Whether this repository has a commit."""
    asked = subprocess.run(["git", "cat-file", "-e", f"{name}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    return asked.returncode == 0


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv installs the other revision")
@pytest.mark.skipif(not is_revision(BASE), reason="the history is not here")
def test_lifecycle_is_compared_with_another_revision_and_with_dbos() -> None:
    sizes = ["--payments=20", "--base-payments=10", "--merchants=3", "--workers=1", "--rounds=1", "--warm-mb=1"]
    results = run_benchmark("lifecycle", f"--against={BASE}", "--dbos", "--idle-payments=0", *sizes)
    for name in ("base", "dbos"):
        assert min(results[f"ratio_to_{name}"], results[f"wal_ratio_to_{name}"]) > 0
        # So few payments cost less than the clock's resolution, and the benchmark's own part is subtracted.
        assert isinstance(results[f"cpu_ratio_to_{name}"], float)
    assert results["dbos"]["cpu_ms_per_payment"].keys() == results["cpu_ms_per_payment"].keys()
    assert results["base"]["cpu_ms_per_payment"].keys() == results["cpu_ms_per_payment"].keys() | {"waiting"}
    assert results["base"]["wal_kb_per_payment"] > 0
    assert results["base"]["peak_rss_mb"]["worker"] > 0
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "surety_bench" not in worktrees.stdout


def test_lifecycle_is_compared_with_a_large_database_and_more_workers() -> None:
    sizes = ["--payments=20", "--merchants=3", "--workers=1", "--rounds=1", "--warm-mb=1"]
    results = run_benchmark("lifecycle", "--past=50", "--backlog=5", *sizes)
    assert min(results[name] for name in ("ratio_to_fresh", "cpu_ratio_to_fresh", "more_workers_ratio")) > 0
    assert results["half_load_submit_p50_ms"] > 0
    assert results["aged"]["cpu_ms_per_payment"]["workers"] > 0
