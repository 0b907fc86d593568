"""`lifecycle`: whole payments, with API, webhook receiver, workers and sandbox as processes of their own.

    payments_per_second   from the first POST to the last settlement: each payment is created at the provider and
                          confirmed, told of by signed webhooks, and settled by the balance record that workers fetch
    idle_p50_ms           from the POST of one payment, while nothing else happens, until the request to create its
                          intent arrives at the provider

The sandbox takes 1.2 s from a charge until its money is available, and workers ask for it once a second, so one payment
alone takes about three seconds; many overlap.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import httpx

from app.local.demo import report
from app.local.demo.merchants import Order, Till, open_shops, sell
from app.local.demo.workspace import folder
from app.local.processes import Troupe, free_port
from tests.bench.ground import Connection, Figures, connection, deployed, median, percentile, server, tell
from tests.bench.provider import Wire
from tests.support.payments import violations

WEBHOOK_SECRET = "whsec_of_the_benchmark"
HEARING_SECONDS_MAX = 10.0
SECONDS_PER_PAYMENT_MAX = 0.2
SECONDS_MAX = 60.0


def run(*, payments: int, merchants: int, workers: int, idle_payments: int, rounds: int) -> Figures:
    """`payments` at once in each round, then `idle_payments` one after the other."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed(stack.enter_context(server())))
        conn = stack.enter_context(connection(url))
        keys = open_shops(conn, merchants, seed=1)
        troupe, ports = stack.enter_context(service(url))
        rates: list[float] = []
        accepted: list[float] = []
        with working(troupe, workers, f"http://127.0.0.1:{ports['sandbox']}"):
            for turn in range(rounds):
                began = time.monotonic()
                posted = settle(conn, ports["api"], write_orders(keys, payments, f"round-{turn}"))
                rates.append(payments / (time.monotonic() - began))
                accepted.append(payments / posted)
                tell(f"round {turn + 1}: {rates[-1]:,.0f} payments/s, accepted {accepted[-1]:,.0f}/s")
        stages = report.measure_stages(conn)
        with Wire(ports["sandbox"]) as wire, working(troupe, workers, wire.url):
            idle = listen(wire, ports["api"], write_orders(keys, idle_payments, "idle"))
            tell(f"idle: {percentile(idle, 0.5):.1f} ms at p50, {max(idle):.1f} ms at most")
        charges, _, _ = report.ask_sandbox(f"http://127.0.0.1:{ports['sandbox']}")
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
def service(url: str) -> Generator[tuple[Troupe, dict[str, int]]]:
    """API, webhook receiver and sandbox, and where they listen."""
    with folder() as scene:
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
        troupe = Troupe(scene, inherited | settings)
        try:
            troupe.start("api", "-m", "app.cli", "api", "--port", str(ports["api"]))
            troupe.start("webhooks", "-m", "app.cli", "webhooks", "--port", str(ports["webhooks"]))
            troupe.start(
                "sandbox",
                *("-m", "app.sandbox", "--port", str(ports["sandbox"]), "--memory", str(scene / "sandbox.sqlite")),
                *("--webhook-url", f"http://127.0.0.1:{ports['webhooks']}/stripe"),
                *("--webhook-secret", WEBHOOK_SECRET),
            )
            for name in names:
                troupe.wait_for_port(name, ports[name])
            yield troupe, ports
        finally:
            troupe.stop()


@contextmanager
def working(troupe: Troupe, workers: int, provider: str) -> Generator[None]:
    """Workers that call the provider at this address."""
    others = dict(troupe.processes)
    troupe.environment["SURETY_SANDBOX_URL"] = provider
    for number in range(1, workers + 1):
        troupe.start(
            f"worker-{number}", "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", f"bench-{number}"
        )
    try:
        yield
    finally:
        mine = {name: process for name, process in troupe.processes.items() if name not in others}
        for process in mine.values():
            process.terminate()
        for process in mine.values():
            process.wait()
        troupe.processes = others


def write_orders(keys: list[str], count: int, run: str) -> list[Order]:
    """Payments by cards that work."""
    return [
        Order(
            keys[number % len(keys)],
            f"bench-{run}-{number}",
            {
                "amount": 1000 + number,
                "currency": "usd",
                "payment_method": {"type": "card", "token": "pm_card_visa"},
                "reference": f"bench-{run}-{number}",
            },
        )
        for number in range(count)
    ]


def settle(conn: Connection, port: int, orders: list[Order]) -> float:
    """Post all and wait until all are settled; returns the seconds until all were accepted."""
    wanted = report.count_ended(conn) + len(orders)
    began = time.monotonic()
    till: Till = asyncio.run(sell(f"http://127.0.0.1:{port}", orders, lambda: None))
    accepted = time.monotonic() - began
    assert len(till.acknowledged) == len(orders), till.refused[:3]
    deadline = time.monotonic() + SECONDS_MAX + SECONDS_PER_PAYMENT_MAX * len(orders)
    while (ended := report.count_ended(conn)) < wanted:
        assert time.monotonic() < deadline, f"{wanted - ended} payments have not ended"
        time.sleep(0.02)
    return accepted


def listen(wire: Wire, port: int, orders: list[Order]) -> list[float]:
    """Milliseconds from each POST until the provider hears of it, one at a time; the first ones only warm up."""
    lot = random.Random(1)
    times = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number, order in enumerate(orders):
            headers = {"Authorization": f"Bearer {order.api_key}", "Idempotency-Key": order.idempotency_key}
            began = time.perf_counter()
            client.post("/v1/payments", json=order.body, headers=headers).raise_for_status()
            times.append((wire.wait_for(number, HEARING_SECONDS_MAX) - began) * 1000)
            time.sleep(lot.uniform(0.3, 0.7))
    return times[min(3, len(times) - 1) :]
