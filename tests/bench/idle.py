"""`idle`: what idle processes cost, and whether a pause delays the next payment.

    worker_cpu_percent      CPU time of a worker in a pause without payments, per cent of a core
    postgres_cpu_percent    the same for all processes of the database server, beside that many idle workers
    commits_per_second      transactions in such a pause
    delay_after_pause_ms    from the POST of a payment after such a pause until the request to create its PaymentIntent
                            arrives at the provider
    delay_after_second_ms   the same for a payment one second after the one before
    pause_ratio             the one delay compared with the other

A pause begins when no payment is under way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx

from app.local.demo.merchants import Order, create_merchants
from tests.bench.costs import read_counters
from tests.bench.databases import (
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    round_all,
    warm_server,
)
from tests.bench.payment_client import create_orders, wait_until_settled
from tests.bench.recording_proxy import RecordingProxy, post_and_listen
from tests.bench.services import Services, running_services, running_workers

SINGLE_PAYMENTS = 5
QUIET_SECONDS = 2.0


@dataclass(slots=True)
class Merchant:
    """Posts single payments, each on a new connection, and sees when the provider hears of them."""

    client: httpx.Client
    proxy: RecordingProxy
    orders: Iterator[tuple[int, Order]]
    ids: list[str] = field(default_factory=list)

    def post(self) -> float:
        """Milliseconds until the provider hears of the next payment."""
        number, order = next(self.orders)
        payment_id, delay = post_and_listen(self.client, self.proxy, number, order)
        self.ids.append(payment_id)
        return delay


def run(*, seconds: float, workers: int, rounds: int, poll_seconds: float, warm_mb: int) -> Results:
    """In each round a pause of so many seconds, then payments one second apart. The first payments only warm up."""
    delays: dict[str, list[float]] = {"after_pause": [], "after_second": []}
    shares: dict[str, list[float]] = {}
    commits = []
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(warm_server(warm_mb))))
        conn = stack.enter_context(connection(url))
        orders = create_orders(create_merchants(conn, 1, seed=1), (rounds + 1) * (SINGLE_PAYMENTS + 1), "idle")
        services = stack.enter_context(running_services(url, poll_seconds=poll_seconds))
        proxy = stack.enter_context(RecordingProxy(services.ports["sandbox"]))
        stack.enter_context(running_workers(services.process_group, workers, proxy.url))
        client = stack.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{services.ports['api']}", limits=httpx.Limits(max_keepalive_connections=0)
            )
        )
        merchant = Merchant(client, proxy, iter(enumerate(orders)))
        for _ in range(SINGLE_PAYMENTS):
            merchant.post()
        for turn in range(rounds):
            wait_until_settled(conn, merchant.ids, services.settled_query)
            time.sleep(QUIET_SECONDS)
            cpu, rate = measure_pause(conn, services, seconds)
            commits.append(rate)
            for group, share in cpu.items():
                shares.setdefault(group, []).append(share)
            delays["after_pause"].append(merchant.post())
            for _ in range(SINGLE_PAYMENTS):
                time.sleep(1)
                delays["after_second"].append(merchant.post())
            log_progress(f"round {turn + 1}: per cent of a core {round_all(shares)}, ms {round_all(delays)}")
    return {
        "benchmark": "idle",
        "worker_cpu_percent": round(median(shares["workers"]) / workers, 2),
        **{f"{group}_cpu_percent": median(shares[group], 2) for group in ("postgres", "api", "receiver", "sandbox")},
        "commits_per_second": median(commits, 2),
        **{f"delay_{when}_ms": median(each, 1) for when, each in delays.items()},
        "pause_ratio": round(median(delays["after_pause"]) / median(delays["after_second"]), 3),
        "seconds": seconds,
        "workers": workers,
        "poll_seconds": poll_seconds,
        "rounds": round_all(shares | delays),
    }


def measure_pause(conn: Connection, services: Services, seconds: float) -> tuple[dict[str, float], float]:
    """CPU time by group of processes in per cent of a core, and commits per second, while nothing happens."""
    pids = services.pids(conn)
    before, began = read_counters(conn, pids), time.monotonic()
    time.sleep(seconds)
    after, passed = read_counters(conn, pids), time.monotonic() - began
    shares = {group: 100 * (after.cpu[group] - used) / passed for group, used in before.cpu.items()}
    return shares, max(0, after.commits - before.commits - 1) / passed
