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

Assignment = tuple[str, str, int | None]
_databases: dict[bool, SimulatedDatabase] = {}
"""The database for schedules of minutes, and the one for months: many partitions make plans slower."""


def initialize_process(assignments: SimpleQueue[Assignment], is_own_server: bool) -> None:
    """Give this process databases of its own, and a processor where affinity can be set."""
    logging.disable(logging.CRITICAL)
    *urls, processor = assignments.get()
    for has_months, url in zip((False, True), urls, strict=True):
        _databases[has_months] = SimulatedDatabase(url, is_own_server=is_own_server, processor=processor)
    # Present objects stay. Most garbage of a schedule is freed by reference counts.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def run_here(plan: SchedulePlan, *, verbose: bool = False) -> Outcome:
    """Run one schedule in one of this process's databases."""
    return Schedule(plan, _databases[plan.days > 0], verbose=verbose).run()


@contextmanager
def process_pool(count: int) -> Generator[ProcessPoolExecutor]:
    """Processes that run schedules."""
    context = get_context("spawn")
    with ExitStack() as stack:
        given = os.environ.get("DATABASE_URL")
        server = given or stack.enter_context(EmbeddedServer(settings=SERVER)).url
        prepared = stack.enter_context(temporary_database(server, PREFIX))
        prepare_template(prepared)
        template = str(conninfo_to_dict(prepared)["dbname"])
        assignments: SimpleQueue[Assignment] = context.SimpleQueue()
        for _, processor in zip(range(count), cycle(list_processors()), strict=False):
            first, second = (
                stack.enter_context(temporary_database(server, PREFIX, template=template)) for _ in range(2)
            )
            assignments.put((first, second, processor))
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
