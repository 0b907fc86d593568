"""Take one guard away at a time and see whether the simulation notices: `python -m tests.mutations --json`.

Each mutant is a copy of the code with one thing less. The simulation runs on it until an invariant breaks, for ten
minutes at most. A seed that also breaks an invariant of the unchanged code catches no mutant. A survivor is a guard
that nothing would miss: a test, an invariant or a kind of fault is missing. The last line is JSON if asked for:
mutants, caught, survivors.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain

from tests.mutations.mutants import MUTANTS
from tests.mutations.run import SECONDS_MAX, judge, seeds_that_pass_unmutated


def main() -> int:
    """Judge all mutants, or those whose guard contains a text."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Guards taken away, one at a time.")
    parser.add_argument("--only", default="", help="those whose guard contains this")
    parser.add_argument("--seconds", type=float, default=SECONDS_MAX, help="for each, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    verdicts = []
    for one in MUTANTS:
        if asked.only in one.guard:
            verdict = judge(one, seconds=asked.seconds, seed=asked.seed, processes=asked.processes)
            verdicts.append(verdict)
            violated = "; ".join(dict.fromkeys(chain.from_iterable(verdict.broken.values())))
            print(f"{verdict.seconds:6.1f} s  {one.guard}: {violated or 'SURVIVED'}", flush=True)
    catching = seeds_that_pass_unmutated({seed for verdict in verdicts for seed in verdict.broken})
    survivors = [verdict.guard for verdict in verdicts if not catching & verdict.broken.keys()]
    for verdict in verdicts:
        if verdict.broken and verdict.guard in survivors:
            print(f"not caught: {verdict.guard}: these seeds break the code as it is: {[*verdict.broken]}")
    output = {"mutants": len(verdicts), "caught": len(verdicts) - len(survivors), "survivors": survivors}
    print(json.dumps(output) if asked.json else f"{output['caught']} of {output['mutants']} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
