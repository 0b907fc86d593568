"""Runs schedules in parallel, in processes with a database each."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

from psycopg.conninfo import conninfo_to_dict

from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.simulation.database import PREFIX, SERVER, SimulatedDatabase, prepare_template
from tests.simulation.schedule import Outcome, Schedule, SchedulePlan

Kind = tuple[bool, int]
"""Whether months pass, and for how many months a partition is."""
KINDS: tuple[Kind, ...] = ((False, 1), (True, 1), (True, 3))
Assignment = tuple[dict[Kind, str], int | None]
_databases: dict[Kind, SimulatedDatabase] = {}
"""A database for each kind of schedule, because many partitions make plans slower."""


def initialize_process(assignments: SimpleQueue[Assignment], is_own_server: bool) -> None:
    """Give this process databases of its own, and a processor where affinity can be set."""
    logging.disable(logging.CRITICAL)
    urls, processor = assignments.get()
    for kind, url in urls.items():
        _databases[kind] = SimulatedDatabase(
            url, is_own_server=is_own_server, partition_months=kind[1], processor=processor
        )
    # Present objects stay. Most garbage of a schedule is freed by reference counts.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def run_here(plan: SchedulePlan, *, verbose: bool = False) -> Outcome:
    """Run one schedule in one of this process's databases."""
    return Schedule(plan, _databases[kind_of(plan)], verbose=verbose).run()


def kind_of(plan: SchedulePlan) -> Kind:
    """The kind of a schedule. In one of eight that let months pass, each month has a partition, as in production."""
    return plan.days > 0, 3 if plan.days and plan.seed % 8 else 1


@contextmanager
def process_pool(count: int) -> Generator[ProcessPoolExecutor]:
    """Processes that run schedules."""
    context = get_context("spawn")
    with ExitStack() as stack:
        given = os.environ.get("DATABASE_URL")
        server = given or stack.enter_context(EmbeddedServer(settings=SERVER)).url
        templates = {}
        for months in sorted({months for _, months in KINDS}):
            prepared = stack.enter_context(temporary_database(server, PREFIX))
            prepare_template(prepared, months)
            templates[months] = str(conninfo_to_dict(prepared)["dbname"])
        assignments: SimpleQueue[Assignment] = context.SimpleQueue()
        for _, processor in zip(range(count), cycle(list_processors()), strict=False):
            urls = {
                kind: stack.enter_context(temporary_database(server, PREFIX, template=templates[kind[1]]))
                for kind in KINDS
            }
            assignments.put((urls, processor))
        yield stack.enter_context(ProcessPoolExecutor(count, context, initialize_process, (assignments, not given)))


def list_processors() -> list[int] | list[None]:
    """The processors that this process may use, where the system shows them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]


def run_all(
    executor: ProcessPoolExecutor, plans: Iterable[SchedulePlan], at_once: int, goes_on: Callable[[Outcome], bool]
) -> None:
    """Run plans, submitted a few ahead, until there are no more or `goes_on` returns False."""
    coming = iter(plans)
    running: set[Future[Outcome]] = {executor.submit(run_here, plan) for plan in islice(coming, 2 * at_once)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        # Outcomes are reported in the order of their seeds.
        answers = [goes_on(outcome) for outcome in sorted((one.result() for one in done), key=lambda o: o.plan.seed)]
        if not all(answers):
            for one in running:
                one.cancel()
            return
        running |= {executor.submit(run_here, plan) for plan in islice(coming, len(done))}
