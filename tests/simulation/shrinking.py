"""Reduces a failing schedule: fewer steps, fault kinds, payments and processes while it still fails."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from tests.simulation.schedule import RATES, Outcome, SchedulePlan

Run = Callable[[SchedulePlan], Outcome]


def shrink(failed: Outcome, run: Run) -> Outcome:
    """The smallest schedule found that violates one of the same invariants."""
    invariants = failed.violations.keys()

    def still(plan: SchedulePlan) -> Outcome | None:
        outcome = run(plan)
        return outcome if invariants & outcome.violations.keys() else None

    smallest = fewer_steps(failed, still)
    for kind in RATES:
        if any(fault.split()[0] == kind for fault in smallest.faults):
            without = replace(smallest.plan, without=smallest.plan.without | {kind})
            smallest = still(without) or smallest
    for name in ("workers", "batching_connections", "payments"):
        while (count := getattr(smallest.plan, name)) > 1 and (
            less := still(replace(smallest.plan, **{name: count - 1}))
        ):
            smallest = less
    return fewer_steps(smallest, still)


def fewer_steps(failed: Outcome, still: Callable[[SchedulePlan], Outcome | None]) -> Outcome:
    """The fewest steps that fail, found by bisection."""
    smallest, low = failed, 0
    while low < smallest.plan.steps:
        middle = (low + smallest.plan.steps) // 2
        if outcome := still(replace(smallest.plan, steps=middle)):
            smallest = outcome
        else:
            low = middle + 1
    return smallest
