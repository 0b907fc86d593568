"""Run schedules: `python -m tests.simulation --schedules 300 --seed 1 --json`.

Seeds follow each other from --seed on, in as many processes as there are cores. For a seed that fails, the output names
the violated invariant, the command that repeats the schedule exactly, and the command of a smaller schedule that fails
as well. With --json the last line is JSON: schedules, steps, faults, violations, seconds. Exit 1: a violation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from itertools import takewhile

from app.local.processes import Interrupted, interruptible
from tests.simulation.process_pool import process_pool, run_all, run_here
from tests.simulation.schedule import RATES, SIZE_OPTIONS, Outcome, SchedulePlan, days_of
from tests.simulation.shrinking import shrink

SHRUNK_MAX = 3


def print_failure(outcome: Outcome) -> None:
    """Print the violated invariants and the command that repeats the schedule."""
    for invariant, example in outcome.violations.items():
        print(f"seed {outcome.plan.seed} broke: {invariant}\n    {example}")
    print(f"    {outcome.plan.command()} --tell", flush=True)


def read_arguments() -> argparse.Namespace:
    """The command line's options."""
    usual = SchedulePlan(seed=1)
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description="Whole lives of payments at random."
    )
    parser.add_argument("--schedules", type=int, default=300, help="how many, one per seed")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--steps", type=int, default=usual.steps, help="decisions until recovery begins")
    parser.add_argument("--payments", type=int, default=usual.payments)
    parser.add_argument("--workers", type=int, default=usual.workers)
    parser.add_argument("--lanes", dest="batching_connections", type=int, default=usual.batching_connections)
    parser.add_argument("--days", type=int, help="let so many days pass; without it, 400 in every third schedule")
    parser.add_argument("--without", default="", help=f"kinds of faults to leave out: {', '.join(RATES)}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more schedules after this time")
    parser.add_argument("--until-broken", action="store_true", help="stop at the first broken invariant, don't shrink")
    # A schedule and its server process take turns, so two schedules share a processor unless affinity can be set.
    takes_turns = "DATABASE_URL" not in os.environ and hasattr(os, "sched_setaffinity")
    usual_processes = (1 if takes_turns else 2) * (os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=usual_processes)
    parser.add_argument("--tell", dest="verbose", action="store_true", help="print every decision")
    parser.add_argument("--json", action="store_true", help="print the totals as JSON in the last line")
    return parser.parse_args()


def main() -> int:
    """Run the schedules."""
    asked = read_arguments()
    without = frozenset(filter(None, asked.without.split(",")))
    sizes = {name: getattr(asked, name) for name in SIZE_OPTIONS if name != "days"}
    began = time.monotonic()
    seeds = range(asked.seed, asked.seed + asked.schedules)
    in_time = takewhile(lambda _: time.monotonic() - began < asked.seconds, seeds)
    plans = (
        SchedulePlan(seed=seed, days=days_of(seed) if asked.days is None else asked.days, without=without, **sizes)
        for seed in in_time
    )
    processes = min(asked.processes, asked.schedules)
    schedules, steps, faults = 0, 0, Counter[str]()
    failed: list[Outcome] = []

    def count(outcome: Outcome) -> bool:
        nonlocal schedules, steps
        schedules += 1
        steps += outcome.steps
        faults.update(outcome.faults)
        if outcome.violations:
            failed.append(outcome)
            print_failure(outcome)
        elif asked.verbose or asked.schedules == 1:
            print(f"seed {outcome.plan.seed} kept every invariant, digest {outcome.digest}")
        return not (failed and asked.until_broken)

    with interruptible(), process_pool(processes) as executor:
        began = time.monotonic()
        if asked.verbose:
            for plan in plans:
                count(executor.submit(run_here, plan, verbose=True).result())
        else:
            run_all(executor, plans, processes, count)
        seconds = time.monotonic() - began
        if not asked.until_broken and not asked.verbose:
            for outcome in failed[:SHRUNK_MAX]:
                shrunk = shrink(outcome, lambda plan: executor.submit(run_here, plan).result())
                print("    shrunk: ", end="")
                print_failure(shrunk)
    result_fields = {
        "schedules": schedules,
        "steps": steps,
        "faults": faults.total(),
        "violations": sum(len(outcome.violations) for outcome in failed),
        "seconds": round(seconds, 1),
    }
    print("faults:", ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items())) or "none")
    print(
        json.dumps(result_fields)
        if asked.json
        else ", ".join(f"{value} {name}" for name, value in result_fields.items())
    )
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Interrupted:
        sys.exit(130)
