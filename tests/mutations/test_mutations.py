"""Each mutant applies, and the simulation catches a quick one. All mutants: python -m tests.mutations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutations.mutants import MUTANTS, Mutant, apply
from tests.mutations.run import ROOT, judge, seeds_that_pass_unmutated

QUICKLY_CAUGHT = ("the trail is append-only",)


def named(guard: str) -> Mutant:
    [found] = [mutant for mutant in MUTANTS if mutant.guard == guard]
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_each_mutant_applies(mutant: Mutant, tmp_path: Path) -> None:
    for path in {patch.path for patch in mutant.patches}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    apply(mutant, tmp_path)
    assert any((tmp_path / patch.path).read_text() != (ROOT / patch.path).read_text() for patch in mutant.patches)


@pytest.mark.parametrize("guard", QUICKLY_CAUGHT)
def test_mutant_is_caught(guard: str) -> None:
    broken = judge(named(guard), seconds=120, processes=1).broken
    assert broken and seeds_that_pass_unmutated(broken.keys()) == broken.keys()
