"""`lifecycle`: whole payments, with API, webhook receiver, workers and sandbox as processes of their own.

    payments_per_second   from the first POST to the last settlement: each payment is created at the provider and
                          confirmed, reported by signed webhooks, and settled by the balance record that workers fetch
    cpu_ms_per_payment    in that time, by group of processes; PostgreSQL is all processes of the server
    wal_kb_per_payment    write-ahead log of the whole server in that time
    commits_per_payment   transactions of the database in that time, except the benchmark's own
    peak_rss_mb           the largest resident memory of a worker and of the API since they started
    idle_p50_ms           from the POST of one payment, while nothing else happens, until the request to create its
                          PaymentIntent arrives at the provider

The sandbox takes 1.2 s from a charge until its money is available, and workers ask for it once a second, so one payment
takes about three seconds. Many overlap. Before the first round the server's memory and log are used once, and some
payments are made that are not measured.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import httpx

from app.local.demo.merchants import Order, create_merchants
from app.local.demo.report import measure_state_durations
from app.local.demo.sandbox_record import CHARGES_SUMMARY, read_sandbox
from tests.bench.costs import Costs, median_costs, read_counters
from tests.bench.cpu_time import peak_rss_mb
from tests.bench.databases import (
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    percentile,
    warm_server,
)
from tests.bench.payment_client import create_orders, post_orders, wait_until_settled
from tests.bench.recording_proxy import RecordingProxy, post_and_listen
from tests.bench.services import Services, running_services, running_workers
from tests.support.payments import violations

WARM_UP_SHARE = 0.1
WARM_UP_PAYMENTS_MAX = 500


@dataclass(frozen=True, slots=True)
class Round:
    """The measurements of a round."""

    payments_per_second: float
    accepted_per_second: float
    costs: Costs

    def __str__(self) -> str:
        return f"{self.payments_per_second:,.0f} payments/s, {self.costs}"


def run(*, on_disk: bool, warm_mb: int, **sizes: int) -> Results:
    """`payments` at once in each round, then `idle_payments` one after the other."""
    with warm_server(warm_mb, on_disk=on_disk) as server_url:
        return measure(server_url, **sizes)


def measure(
    server_url: str, *, payments: int, merchants: int, workers: int, idle_payments: int, rounds: int
) -> Results:
    """The results of some rounds, in a new database of a server."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(server_url))
        conn = stack.enter_context(connection(url))
        keys = create_merchants(conn, merchants, seed=1)
        services = stack.enter_context(running_services(url))
        with running_workers(services.process_group, workers, services.sandbox_url):
            results = measure_rounds(conn, services, keys, payments, rounds)
        stages = measure_state_durations(conn)
        idle = measure_idle(services, workers, create_orders(keys, idle_payments, "idle"))
        charges = read_sandbox(services.sandbox_url, CHARGES_SUMMARY)
        assert charges["double"] == []
        conn.execute("vacuum (analyze)")
        assert violations(conn) == {}
    return {
        "benchmark": "lifecycle",
        **results,
        **idle,
        "double_charges": len(charges["double"]),
        "stages": {stage.name: {"p50_ms": round(stage.p50_ms), "p99_ms": round(stage.p99_ms)} for stage in stages},
        "workers": workers,
    }


def measure_rounds(conn: Connection, services: Services, keys: Sequence[str], payments: int, rounds: int) -> Results:
    """The medians of some rounds after a warm-up. Statistics are gathered before each, for autovacuum is off."""
    warm_up = min(WARM_UP_PAYMENTS_MAX, max(1, int(WARM_UP_SHARE * payments)))
    log_progress(f"warm-up: {measure_round(conn, services, create_orders(keys, warm_up, 'warm-up'))}")
    measured = []
    for turn in range(rounds):
        conn.execute("vacuum (analyze)")
        measured.append(measure_round(conn, services, create_orders(keys, payments, f"round-{turn}")))
        log_progress(f"round {turn + 1}: {measured[-1]}")
    pids = services.pids(conn)
    return {
        "payments_per_second": median([turn.payments_per_second for turn in measured], 1),
        "accepted_per_second": median([turn.accepted_per_second for turn in measured], 1),
        **median_costs([turn.costs for turn in measured]),
        "peak_rss_mb": {"worker": peak_rss_mb(pids["workers"]), "api": peak_rss_mb(pids["api"])},
        "payments": payments * rounds,
        "rounds": [round(turn.payments_per_second, 1) for turn in measured],
    }


def measure_round(conn: Connection, services: Services, orders: Sequence[Order], waiting: Sequence[str] = ()) -> Round:
    """Post all and wait until all are settled, with payments that wait already."""
    pids = services.pids(conn)
    before = read_counters(conn, pids)
    began = time.monotonic()
    payment_ids = asyncio.run(post_orders(services.ports["api"], orders))
    accepted_seconds = time.monotonic() - began
    own_queries = wait_until_settled(conn, [*waiting, *payment_ids], services.settled_query)
    seconds = time.monotonic() - began
    count = len(waiting) + len(orders)
    costs = before.costs_until(read_counters(conn, pids), count, own_queries)
    return Round(count / seconds, len(orders) / accepted_seconds, costs)


def measure_idle(services: Services, workers: int, orders: Sequence[Order]) -> dict[str, float]:
    """Percentiles of the delay of single payments; nothing without payments."""
    if not orders:
        return {}
    with (
        RecordingProxy(services.ports["sandbox"]) as proxy,
        running_workers(services.process_group, workers, proxy.url),
    ):
        delays = measure_delays(proxy, services.ports["api"], orders)
    log_progress(f"idle: {percentile(delays, 0.5):.1f} ms at p50, {max(delays):.1f} ms at most")
    return {"idle_p50_ms": round(percentile(delays, 0.5), 1), "idle_p99_ms": round(percentile(delays, 0.99), 1)}


def measure_delays(proxy: RecordingProxy, port: int, orders: Sequence[Order]) -> list[float]:
    """Milliseconds from each POST until the provider hears of it, one at a time; the first ones only warm up."""
    chance = random.Random(1)
    times = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number, order in enumerate(orders):
            times.append(post_and_listen(client, proxy, number, order)[1])
            time.sleep(chance.uniform(0.3, 0.7))
    return times[min(3, len(times) - 1) :]
