"""Whole lives of payments at random with every kind of fault; see tests/simulation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.process_pool import process_pool, run_all, run_here
from tests.simulation.schedule import RATES, Outcome, SchedulePlan

# Smaller schedules than the command's; each recovers in full.
SCHEDULES = 126
STEPS = 60
PAYMENTS = 2
PROCESSES = 2
PLANS = [SchedulePlan(seed=seed, steps=STEPS, payments=PAYMENTS) for seed in (*range(1, SCHEDULES), 142)]
PLANS_OF_MONTHS = [SchedulePlan(seed=seed, steps=STEPS, payments=PAYMENTS, days=400) for seed in (3, 136, 191)]


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessPoolExecutor]:
    """Processes with a database each."""
    with process_pool(PROCESSES) as executor:
        yield executor


@pytest.fixture(scope="module")
def outcomes(executor: ProcessPoolExecutor) -> dict[int, Outcome]:
    """The outcome of each seed."""
    found: dict[int, Outcome] = {}

    def collect(outcome: Outcome) -> bool:
        found[outcome.plan.seed] = outcome
        return True

    run_all(executor, PLANS, PROCESSES, collect)
    return found


def test_no_schedule_violates_an_invariant(outcomes: dict[int, Outcome]) -> None:
    assert len(outcomes) == len(PLANS)
    assert not {one.plan.command(): one.violations for one in outcomes.values() if one.violations}


def test_every_fault_kind_occurs(outcomes: dict[int, Outcome]) -> None:
    came = {fault.split()[0] for outcome in outcomes.values() for fault in outcome.faults}
    assert came == set(RATES)


def test_same_seed_gives_the_same_schedule(executor: ProcessPoolExecutor, outcomes: dict[int, Outcome]) -> None:
    again = [executor.submit(run_here, outcomes[seed].plan).result() for seed in (50, 7, 91, 7)]
    assert [one.digest for one in again] == [outcomes[one.plan.seed].digest for one in again]
    assert len({one.digest for one in outcomes.values()}) == len(PLANS)


def test_four_hundred_days_violate_no_invariant(executor: ProcessPoolExecutor) -> None:
    outcomes = list(executor.map(run_here, PLANS_OF_MONTHS))
    assert not {one.plan.command(): one.violations for one in outcomes if one.violations}
    again = executor.submit(run_here, PLANS_OF_MONTHS[0]).result()
    assert again.digest == outcomes[0].digest


def test_refusal_during_an_outage_of_500s_is_an_answer(executor: ProcessPoolExecutor) -> None:
    plan = SchedulePlan(seed=4775, steps=54, batching_connections=1)
    assert not executor.submit(run_here, plan).result().violations
