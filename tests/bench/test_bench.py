"""The benchmarks at a tiny size: they run, check their effects and report results. Speed is not tested."""

from __future__ import annotations

import pytest

from tests.bench.command import run_benchmark

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
    "fairness": ["--seconds=0.5", "--probes=2", "--connections=8", "--rate=20", "--rounds=1"],
    "hostile": ["--seconds=0.3", "--oversized=5", "--rounds=1"],
    "nacha": ["--entries=2000"],
    "reconcile": ["--payments=600", "--small=300", "--planted=60", "--probes=5"],
    "accept": ["--seconds=0.3", "--connections=8", "--single-lanes=2", "--merchants=3", "--rounds=1"],
}
SIZES["accept"] += ["--warm-mb=1", "--limits"]
REQUIRED_RESULTS = {
    "drain": {"ratio_to_procrastinate", "flatness", "blocked_ratio"},
    "trace": {"p99_ms"},
    "lifecycle": {"payments_per_second", "wal_kb_per_payment", "commits_per_payment", "idle_p50_ms"},
    "idle": {"delay_after_pause_ms", "delay_after_second_ms", "pause_ratio"},
    "overload": {"p99_ratio", "goodput_ratio", "refused_share"},
    "fairness": {"p99_ratio", "at_limit_ratio", "flood_ratio", "quiet_p99_ms", "refused"},
    "hostile": {"p99_ratio", "memory_growth_mb", "refused"},
    "reconcile": {"rows_per_second", "flag_delay_p99_ms", "flatness", "planted"},
    "nacha": {"read_per_second", "written_per_second", "peak_mb", "same_bytes"},
    "accept": {"ratio_to_noop", "ratio_to_single", "ratio_with_limits", "p99_ms"},
}


@pytest.mark.parametrize("name", SIZES)
def test_benchmark_reports_the_required_results(name: str) -> None:
    results = run_benchmark(name, *SIZES[name])
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


def test_reconciliation_misses_and_invents_nothing() -> None:
    results = run_benchmark("reconcile", "--payments=600", "--small=300", "--planted=60", "--probes=5")
    assert results.keys() >= REQUIRED_RESULTS["reconcile"]
    assert (results["missed"], results["invented"], results["planted"]) == (0, 0, 60)
