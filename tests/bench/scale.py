"""`lifecycle --past N --backlog M`: whether costs grow with the database or with more workers, and half the load.

fresh         a round in a new database
more_workers  the same with twice the workers
aged          a round in a database with N settled payments, while M accepted ones wait; until all are settled
half_load     a new database, payments posted at half the rate of `fresh`

ratio_to_fresh           payments per second in the aged database, compared with the new one
cpu_ratio_to_fresh       the same for the CPU time of workers and PostgreSQL for a payment
more_workers_ratio       payments per second with twice the workers, compared with the usual number
half_load_submit_p50_ms  from a payment's acceptance until it is recorded as submitted to the provider
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from app.local.demo.merchants import create_merchants
from app.local.demo.sandbox_record import CHARGES_SUMMARY, read_sandbox
from app.local.processes import interruptible
from tests.bench import history
from tests.bench.costs import median_costs
from tests.bench.databases import (
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    median_ratio,
    round_all,
    warm_server,
)
from tests.bench.lifecycle import Round, measure_round
from tests.bench.payment_client import create_orders, post_orders, wait_until_settled
from tests.bench.services import Services, running_services, running_workers
from tests.support.payments import violations

COPIES_BETWEEN_CHECKPOINTS = 50_000
DAYS_AGO = 20
WARM_UP_PAYMENTS = 100
HALF_LOAD_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """A database with its processes, except workers."""

    conn: Connection
    services: Services
    keys: list[str]

    def measure(self, payments: int, workers: int, name: str) -> Round:
        """A round after a warm-up."""
        with running_workers(self.services.process_group, workers, self.services.sandbox_url):
            warm_up = create_orders(self.keys, min(WARM_UP_PAYMENTS, payments), f"warm-up-{name}")
            measure_round(self.conn, self.services, warm_up)
            self.conn.execute("vacuum (analyze)")
            return measure_round(self.conn, self.services, create_orders(self.keys, payments, name))

    def measure_with_backlog(self, payments: int, workers: int, backlog: int, name: str) -> Round:
        """A round whose workers start when so many payments wait already."""
        orders = create_orders(self.keys, backlog, f"backlog-{name}")
        waiting = asyncio.run(post_orders(self.services.ports["api"], orders))
        self.conn.execute("analyze")
        with running_workers(self.services.process_group, workers, self.services.sandbox_url):
            return measure_round(self.conn, self.services, create_orders(self.keys, payments, name), waiting)


def run(
    *,
    past: int,
    backlog: int,
    payments: int,
    merchants: int,
    workers: int,
    idle_payments: int,
    rounds: int,
    warm_mb: int,
    on_disk: bool,
) -> Results:
    """A round of each, in turns, and their ratios; then the delay under half of the fresh rate."""
    measured: dict[str, list[Round]] = {"fresh": [], "more_workers": [], "aged": []}
    with interruptible(), ExitStack() as stack:
        server_url = stack.enter_context(warm_server(warm_mb, on_disk=on_disk))
        aged = stack.enter_context(deployment(server_url, merchants, past))
        fresh = stack.enter_context(deployment(server_url, merchants))
        for turn in range(rounds):
            measures = {
                "fresh": partial(fresh.measure, payments, workers),
                "more_workers": partial(fresh.measure, payments, 2 * workers),
                "aged": partial(aged.measure_with_backlog, payments, workers, backlog),
            }
            for name in list(measures)[:: -1 if turn % 2 else 1]:
                result = measures[name](f"{name}-{turn}")
                measured[name].append(result)
                log_progress(f"round {turn + 1}, {name}: {result}")
        assert read_sandbox(aged.services.sandbox_url, CHARGES_SUMMARY)["double"] == []
        rates = {name: [each.payments_per_second for each in results] for name, results in measured.items()}
        costs = {name: median_costs([each.costs for each in results]) for name, results in measured.items()}
        half_rate = median(rates["fresh"]) / 2
        half_load = measure_half_load(fresh, min(payments, int(HALF_LOAD_SECONDS * half_rate)), half_rate, workers)
    return {
        "benchmark": "lifecycle",
        "payments_per_second": median(rates["fresh"], 1),
        "ratio_to_fresh": median_ratio(rates["aged"], rates["fresh"]),
        "cpu_ratio_to_fresh": median_ratio(*(list(map(cpu_of_work, measured[name])) for name in ("aged", "fresh"))),
        "more_workers_ratio": median_ratio(rates["more_workers"], rates["fresh"]),
        "half_load_payments_per_second": round(half_rate, 1),
        **half_load,
        **costs,
        "past": past,
        "backlog": backlog,
        "workers": workers,
        "rounds": round_all(rates),
    }


def cpu_of_work(measured: Round) -> float:
    """The CPU time of workers and PostgreSQL for a payment."""
    return measured.costs.cpu_ms["workers"] + measured.costs.cpu_ms["postgres"]


@contextmanager
def deployment(server_url: str, merchants: int, past: int = 0) -> Generator[Deployment]:
    """A new database with so many settled payments, with its API, webhook receiver and sandbox."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(server_url))
        conn = stack.enter_context(connection(url))
        keys = create_merchants(conn, merchants, seed=1)
        if past:
            create_past(conn, url, past)
        yield Deployment(conn, stack.enter_context(running_services(url)), keys)


def create_past(conn: Connection, url: str, payments: int) -> None:
    """Copies of a settled payment, and nothing to do about them."""
    payment_id = history.create_settled_payment(conn, history.prepare(conn, merchants=1))
    for first in range(0, payments, COPIES_BETWEEN_CHECKPOINTS):
        count = min(COPIES_BETWEEN_CHECKPOINTS, payments - first)
        history.copy_payments(url, payment_id, count, days_ago=DAYS_AGO, first=first)
        conn.execute("checkpoint")
        log_progress(f"{first + count:,} past payments")
    history.finish_copies(url)
    history.skip_existing_events(conn)


def measure_half_load(deployed: Deployment, payments: int, per_second: float, workers: int) -> dict[str, float]:
    """Milliseconds from a payment's acceptance to its submission, while payments come at that rate."""
    port, services, conn = deployed.services.ports["api"], deployed.services, deployed.conn
    warm_up = create_orders(deployed.keys, min(WARM_UP_PAYMENTS, payments), "warm-up-half-load")
    orders = create_orders(deployed.keys, payments, "half-load")
    with running_workers(services.process_group, workers, services.sandbox_url):
        wait_until_settled(conn, asyncio.run(post_orders(port, warm_up)), services.settled_query)
        conn.execute("vacuum (analyze)")
        payment_ids = asyncio.run(post_orders(port, orders, per_second))
        wait_until_settled(conn, payment_ids, services.settled_query)
    assert violations(conn) == {}
    row = conn.execute(
        """
        select percentile_cont(array[0.5, 0.99]) within group (order by extract(epoch from later.at - sooner.at) * 1000)
        from surety.steps as sooner join surety.steps as later on later.payment_id = sooner.payment_id
        where sooner.payment_id = any(%s) and sooner.to_state = 'initiated' and later.to_state = 'provider_submitted'
        """,
        (payment_ids,),
    ).fetchone()
    assert row is not None
    p50, p99 = row[0]
    log_progress(f"at {per_second:,.1f} payments/s: {p50:.1f} ms to the submission at p50, {p99:.1f} ms at p99")
    return {"half_load_submit_p50_ms": round(p50, 1), "half_load_submit_p99_ms": round(p99, 1)}
