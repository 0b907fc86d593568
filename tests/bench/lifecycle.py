"""`lifecycle`: whole payments, with API, webhook receiver, workers and sandbox as processes of their own.

    payments_per_second   from the first POST to the last settlement: each payment is created at the provider and
                          confirmed, reported by signed webhooks, and settled by the balance record that workers fetch
    idle_p50_ms           from the POST of one payment, while nothing else happens, until the request to create its
                          PaymentIntent arrives at the provider

The sandbox takes 1.2 s from a charge until its money is available, and workers ask for it once a second, so one payment
takes about three seconds. Many overlap.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import httpx

from app.local.demo.checks import count_ended
from app.local.demo.merchants import Order, TrafficResult, create_merchants, post_orders
from app.local.demo.report import measure_state_durations
from app.local.demo.sandbox_record import CHARGES_SUMMARY, read_sandbox
from app.local.demo.workspace import demo_folder
from app.local.output import LogFiles
from app.local.processes import ProcessGroup, free_port
from tests.bench.databases import (
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    percentile,
    server,
)
from tests.bench.recording_proxy import RecordingProxy
from tests.support.payments import violations

WEBHOOK_SECRET = "whsec_of_the_benchmark"
REQUEST_SECONDS_MAX = 10.0
SECONDS_PER_PAYMENT_MAX = 0.2
SECONDS_MAX = 60.0


def run(*, payments: int, merchants: int, workers: int, idle_payments: int, rounds: int) -> Results:
    """`payments` at once in each round, then `idle_payments` one after the other."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(server())))
        conn = stack.enter_context(connection(url))
        keys = create_merchants(conn, merchants, seed=1)
        process_group, ports = stack.enter_context(running_services(url))
        rates: list[float] = []
        accepted: list[float] = []
        with running_workers(process_group, workers, f"http://127.0.0.1:{ports['sandbox']}"):
            for turn in range(rounds):
                began = time.monotonic()
                posted = post_until_settled(conn, ports["api"], create_orders(keys, payments, f"round-{turn}"))
                rates.append(payments / (time.monotonic() - began))
                accepted.append(payments / posted)
                log_progress(f"round {turn + 1}: {rates[-1]:,.0f} payments/s, accepted {accepted[-1]:,.0f}/s")
        stages = measure_state_durations(conn)
        with RecordingProxy(ports["sandbox"]) as proxy, running_workers(process_group, workers, proxy.url):
            idle = measure_idle_latency(proxy, ports["api"], create_orders(keys, idle_payments, "idle"))
            log_progress(f"idle: {percentile(idle, 0.5):.1f} ms at p50, {max(idle):.1f} ms at most")
        charges = read_sandbox(f"http://127.0.0.1:{ports['sandbox']}", CHARGES_SUMMARY)
        assert charges["double"] == []
        conn.execute("vacuum (analyze)")
        assert violations(conn) == {}
    return {
        "benchmark": "lifecycle",
        "payments_per_second": median(rates, 1),
        "accepted_per_second": median(accepted, 1),
        "idle_p50_ms": round(percentile(idle, 0.5), 1),
        "idle_p99_ms": round(percentile(idle, 0.99), 1),
        "payments": payments * rounds,
        "double_charges": len(charges["double"]),
        "stages": {stage.name: {"p50_ms": round(stage.p50_ms), "p99_ms": round(stage.p99_ms)} for stage in stages},
        "workers": workers,
        "rounds": [round(rate, 1) for rate in rates],
    }


@contextmanager
def running_services(url: str) -> Generator[tuple[ProcessGroup, dict[str, int]]]:
    """API, webhook receiver and sandbox, and where they listen."""
    with demo_folder() as folder:
        names = ("api", "webhooks", "sandbox")
        ports = {name: free_port(0) for name in names}
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))
        }
        settings = {
            "DATABASE_URL": url,
            "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "SURETY_POLL_SECONDS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        process_group = ProcessGroup(inherited | settings, LogFiles(folder))
        try:
            process_group.start("api", "-m", "app.cli", "api", "--port", str(ports["api"]))
            process_group.start("webhooks", "-m", "app.cli", "webhooks", "--port", str(ports["webhooks"]))
            process_group.start(
                "sandbox",
                *("-m", "app.sandbox", "--port", str(ports["sandbox"]), "--memory", str(folder / "sandbox.sqlite")),
                *("--webhook-url", f"http://127.0.0.1:{ports['webhooks']}/stripe"),
                *("--webhook-secret", WEBHOOK_SECRET),
            )
            for name in names:
                process_group.wait_for_port(name, ports[name])
            yield process_group, ports
        finally:
            process_group.stop()


@contextmanager
def running_workers(process_group: ProcessGroup, workers: int, provider: str) -> Generator[None]:
    """Workers that call the provider at this address."""
    names = [f"worker-{number}" for number in range(1, workers + 1)]
    process_group.environment["SURETY_SANDBOX_URL"] = provider
    for name in names:
        process_group.start(name, "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", f"bench-{name}")
    try:
        yield
    finally:
        process_group.stop(*names)


def create_orders(keys: list[str], count: int, run: str) -> list[Order]:
    """Payments by cards that work."""
    return [
        Order(
            keys[number % len(keys)],
            f"bench-{run}-{number}",
            {
                "amount": 1000 + number,
                "currency": "usd",
                "payment_method": {"type": "card", "token": "pm_card_visa"},
                "return_url": "https://shop.example/return",
                "reference": f"bench-{run}-{number}",
            },
        )
        for number in range(count)
    ]


def post_until_settled(conn: Connection, port: int, orders: list[Order]) -> float:
    """Post all and wait until all are settled; returns the seconds until all were accepted."""
    wanted = count_ended(conn) + len(orders)
    began = time.monotonic()
    sold: TrafficResult = asyncio.run(post_orders(f"http://127.0.0.1:{port}", orders, lambda: None))
    accepted = time.monotonic() - began
    assert len(sold.acknowledged) == len(orders), sold.refused[:3]
    deadline = time.monotonic() + SECONDS_MAX + SECONDS_PER_PAYMENT_MAX * len(orders)
    while (ended := count_ended(conn)) < wanted:
        assert time.monotonic() < deadline, f"{wanted - ended} payments have not ended"
        time.sleep(0.02)
    return accepted


def measure_idle_latency(proxy: RecordingProxy, port: int, orders: list[Order]) -> list[float]:
    """Milliseconds from each POST until the provider hears of it, one at a time; the first ones only warm up."""
    chance = random.Random(1)
    times = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number, order in enumerate(orders):
            headers = {"Authorization": f"Bearer {order.api_key}", "Idempotency-Key": order.idempotency_key}
            began = time.perf_counter()
            client.post("/v1/payments", json=order.body, headers=headers).raise_for_status()
            times.append((proxy.wait_for(number, REQUEST_SECONDS_MAX) - began) * 1000)
            time.sleep(chance.uniform(0.3, 0.7))
    return times[min(3, len(times) - 1) :]
