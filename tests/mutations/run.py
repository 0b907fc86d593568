"""Runs the simulation on one mutant: a copy of the code with one guard taken away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from msgspec import Struct

from db.embedded.processes import die_with_parent
from tests.mutations.mutants import Mutant, apply
from tests.simulation.process_pool import process_pool, run_here
from tests.simulation.schedule import SchedulePlan

ROOT = Path(__file__).parent.parent.parent
COPIED = ("app", "db", "jobs", "migrations", "tests", "schema.sql", "pyproject.toml")
SECONDS_MAX = 600.0


class Verdict(Struct, frozen=True):
    """What the simulation said of a mutant: which invariants broke with which seeds, none for a survivor."""

    guard: str
    broken: dict[int, list[str]]
    seconds: float


def judge(mutant: Mutant, *, seconds: float = SECONDS_MAX, seed: int = 1, processes: int | None = None) -> Verdict:
    """Run the simulation on a mutant until it breaks an invariant or time is over."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="surety-mutant-") as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        apply(mutant, folder)
        command = [
            sys.executable, "-m", "tests.simulation", "--until-broken", f"--seed={seed}", "--schedules=1000000",
            f"--seconds={seconds}", f"--processes={processes or os.cpu_count() or 1}",
        ]  # fmt: skip
        ran = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=die_with_parent()
        )
    output = re.findall(r"^seed (\d+) broke: (.*)$", ran.stdout, re.MULTILINE)
    if ran.returncode not in (0, 1) or (ran.returncode == 1 and not output):
        raise RuntimeError(f"{mutant.guard}: the simulation did not run:\n{ran.stderr[-4000:]}")
    broken: dict[int, list[str]] = {}
    for number, invariant in output:
        broken.setdefault(int(number), []).append(invariant)
    return Verdict(mutant.guard, broken, round(time.monotonic() - began, 1))


def seeds_that_pass_unmutated(seeds: Collection[int]) -> set[int]:
    """The seeds with which the code as it is keeps its invariants."""
    if not seeds:
        return set()
    with process_pool(min(len(seeds), os.cpu_count() or 1)) as executor:
        outcomes = list(executor.map(run_here, [SchedulePlan(seed=seed) for seed in sorted(seeds)]))
    return {outcome.plan.seed for outcome in outcomes if not outcome.violations}
