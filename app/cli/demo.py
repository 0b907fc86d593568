"""`surety demo`: a payment service, its provider and its troubles, for real, on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.local.demo import merchants, payment_actions, report
from app.local.demo.workspace import demo_database, demo_folder
from app.local.processes import Interrupted, ProcessGroup, free_port, interruptible
from db.connect import harden
from db.deploy.deploy import deploy

WORKERS = 2
END_TIMEOUT_SECONDS = 50.0
SECONDS_PER_PAYMENT = 0.1
PAYMENTS_PER_MERCHANT_MIN = 10
"""Who sells less can't give much back."""

# A minute is short: what takes its time in earnest is shortened here, in the demo's own database and processes.
LEASE = "4 seconds"
RETRY_AFTER = ["0.5 seconds", "2 seconds", "5 seconds"]
ASK_AFTER = "2 seconds"
PROVIDER_TIMEOUT_SECONDS = "2"
POLL_SECONDS = "1"


@dataclass(slots=True)
class KilledWorker:
    """The worker that was killed, and how many events it held."""

    name: str
    held: int


@click.command()
@click.option("--payments", default=500, show_default=True, type=click.IntRange(1, 100_000), help="How many.")
@click.option("--merchants", "shops", default=20, show_default=True, type=click.IntRange(1, 500), help="Of how many.")
@click.option("--seed", type=int, help="What goes wrong, and when; the same seed, the same troubles.")
@click.option("--no-faults", is_flag=True, help="A provider that never misbehaves, and no worker killed.")
@click.option("--keep", is_flag=True, help="Keep everything running afterwards, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, last.")
def demo(payments: int, shops: int, seed: int | None, no_faults: bool, keep: bool, as_json: bool) -> None:
    """Make payments over HTTP while the provider misbehaves and a worker dies; then check every promise.

    Starts PostgreSQL, the API, the webhook receiver, two workers and a sandbox of Stripe, all on loopback, and leaves
    nothing behind. Real keys in the environment are ignored. Exit status 1 if a promise is broken.
    """
    seed = secrets.randbelow(10_000) if seed is None else seed
    shops = min(shops, max(1, payments // PAYMENTS_PER_MERCHANT_MIN))
    progress = Console(stderr=True, highlight=False)
    try:
        with interruptible():
            result = run_demo(payments, shops, seed, not no_faults, keep, as_json, progress)
    except Interrupted as interruption:
        progress.print(f"{interruption}: cleared up, nothing is left")
        sys.exit(130)
    sys.exit(0 if result.is_sound else 1)


def run_demo(
    payments: int, shops: int, seed: int, faults: bool, keep: bool, as_json: bool, progress: Console
) -> report.Report:
    """The whole demo; returns its result once everything is cleared up."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    started = time.monotonic()
    with ExitStack() as stack:
        workspace = stack.enter_context(demo_folder())
        url = stack.enter_context(demo_database(os.environ.get("DATABASE_URL")))
        deploy(url)
        conn = stack.enter_context(psycopg.connect(harden(url, "deploy"), autocommit=True))
        shorten_demo_delays(conn)
        processes = DemoProcesses(workspace, url, seed, faults)
        stack.callback(processes.process_group.stop)
        processes.open(conn)
        version = conn.execute("show server_version").fetchone()
        assert version is not None
        progress.print(
            f"Surety demo   seed {seed} · {shops} merchants · {payments} payments · "
            f"faults {'on' if faults else 'off'}\n"
            f"PostgreSQL {str(version[0]).split()[0]} ✓  deploy ✓  api :{processes.ports['api']}"
            f"  webhooks :{processes.ports['webhooks']}  sandbox :{processes.ports['sandbox']}  workers {WORKERS}"
        )
        keys = merchants.create_merchants(conn, shops, seed)
        orders, agents = payment_actions.plan_actions(merchants.create_orders(keys, payments, seed), seed)
        selling = time.monotonic()
        traffic, kill = run_traffic(processes, conn, orders, agents, progress)
        seconds = time.monotonic() - selling
        replayed = replay_open_dead_letters(conn, processes, payments)
        result = summarize(conn, processes, traffic, kill, replayed, seed=seed, payments=payments, seconds=seconds)
        print_result(console, result, conn, as_json)
        if keep:
            keep_running(progress, processes, url, keys[0])
    progress.print(f"cleared up after {time.monotonic() - started:.1f} s")
    return result


def shorten_demo_delays(conn: report.Connection) -> None:
    """Shorten what takes minutes in earnest."""
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute("update outbox.handlers set lease = %s::interval, retry_after = %s::interval[]", (LEASE, RETRY_AFTER))
    conn.execute("update surety.states set poll_after = %s::interval where poll_after is not null", (ASK_AFTER,))
    conn.execute(
        "update surety.dispute_statuses set poll_after = %s::interval where poll_after is not null", (ASK_AFTER,)
    )
    conn.execute("update surety.refund_states set poll_after = %s::interval where poll_after is not null", (ASK_AFTER,))


class DemoProcesses:
    """The processes and where they listen."""

    def __init__(self, workspace: Path, url: str, seed: int, faults: bool) -> None:
        self.seed, self.faults, self.workspace = seed, faults, workspace
        self.ports = {name: free_port(port) for name, port in (("api", 8000), ("webhooks", 8001), ("sandbox", 8002))}
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))
        }
        pg_bin = {"SURETY_PG_BIN": os.environ["SURETY_PG_BIN"]} if "SURETY_PG_BIN" in os.environ else {}
        self.secret = f"whsec_{secrets.token_hex(16)}"
        self.process_group = ProcessGroup(
            workspace,
            inherited
            | pg_bin
            | {
                "DATABASE_URL": url,
                "STRIPE_WEBHOOK_SECRET": self.secret,
                "SURETY_SANDBOX_URL": self.url("sandbox"),
                "SURETY_PROVIDER_TIMEOUT": PROVIDER_TIMEOUT_SECONDS,
                "SURETY_POLL_SECONDS": POLL_SECONDS,
                "PYTHONUNBUFFERED": "1",
            },
        )

    def url(self, name: str) -> str:
        """Where a process listens."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def open(self, conn: report.Connection) -> None:
        """Start everything; returns once all listen and the workers are at work."""
        start = self.process_group.start
        start("api", "-m", "app.cli", "api", "--port", str(self.ports["api"]))
        start("webhooks", "-m", "app.cli", "webhooks", "--port", str(self.ports["webhooks"]))
        start(
            "sandbox",
            *("-m", "app.sandbox", "--port", str(self.ports["sandbox"]), "--seed", str(self.seed)),
            *("--memory", str(self.workspace / "sandbox.sqlite"), "--webhook-secret", self.secret),
            *("--webhook-url", f"{self.url('webhooks')}/stripe"),
            *(("--faults",) if self.faults else ("--auto-payer",)),
        )
        for number in range(1, WORKERS + 1):
            self.start_worker(f"worker-{number}")
        for name, port in self.ports.items():
            self.process_group.wait_for_port(name, port)
        self.process_group.wait_for("worker-1", lambda: count_workers(conn) >= WORKERS)

    def start_worker(self, name: str) -> None:
        """One of Procrastinate's workers; its name tells who held what."""
        self.process_group.start(name, "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", name)


def count_workers(conn: report.Connection) -> int:
    """Workers that have registered."""
    row = conn.execute("select count(*) from procrastinate.procrastinate_workers").fetchone()
    assert row is not None
    return int(row[0])


def run_traffic(
    processes: DemoProcesses,
    conn: report.Connection,
    orders: list[merchants.Order],
    agents: list[payment_actions.MerchantAgent],
    progress: Console,
) -> tuple[merchants.TrafficResult, KilledWorker | None]:
    """Post all orders, kill a worker in the middle, wait until all payments have ended."""
    traffic = merchants.TrafficResult()
    failures: list[BaseException] = []

    def post_all() -> None:
        try:
            asyncio.run(run_merchants(processes, orders, agents, traffic))
        except BaseException as error:  # noqa: BLE001  # told to the main thread, which raises it
            failures.append(error)

    selling = threading.Thread(target=post_all, daemon=True)
    selling.start()
    kill: KilledWorker | None = None
    deadline = time.monotonic() + END_TIMEOUT_SECONDS + SECONDS_PER_PAYMENT * len(orders)
    columns = (BarColumn(28), MofNCompleteColumn(), TextColumn("ended"), TimeElapsedColumn())
    with Progress(*columns, console=progress) as bar:
        task = bar.add_task("payments", total=len(orders))
        while True:
            ended = report.count_ended(conn)
            bar.update(task, completed=ended)
            if processes.faults and kill is None:
                kill = kill_worker(processes, conn, is_late=ended > len(orders) // 2)
            if failures:
                raise failures[0]
            is_over = ended >= len(orders) - len(traffic.refused) and not selling.is_alive()
            if is_over and not report.count_unreceived_results(conn, processes.url("sandbox")):
                break
            if time.monotonic() > deadline:
                break
            if dead := processes.process_group.ended_processes():
                progress.print(
                    f"[red]{', '.join(dead)} ended by itself[/]\n{processes.process_group.log_tail(next(iter(dead)))}"
                )
                break
            time.sleep(0.05)
    return traffic, kill


async def run_merchants(
    processes: DemoProcesses,
    orders: list[merchants.Order],
    agents: list[payment_actions.MerchantAgent],
    traffic: merchants.TrafficResult,
) -> None:
    """Sell, and do what the merchants want done afterwards."""
    async with httpx.AsyncClient(base_url=processes.url("api"), timeout=10) as client, asyncio.TaskGroup() as tasks:
        for agent in agents:
            tasks.create_task(agent.work(client))
        sold = await merchants.post_orders(processes.url("api"), orders, lambda: None)
    traffic.acknowledged, traffic.refused, traffic.repeated = sold.acknowledged, sold.refused, sold.repeated
    traffic.refused_actions = [refusal for agent in agents for refusal in agent.refusals]


def kill_worker(processes: DemoProcesses, conn: report.Connection, *, is_late: bool) -> KilledWorker | None:
    """SIGKILL the worker that holds the most events, if it holds some (or if it is late), and start another."""
    rows = conn.execute(
        "select leased_by, sum(cardinality(event_ids)) from outbox.batches group by 1 order by 2 desc"
    ).fetchall()
    for name, held in rows:
        if name in processes.process_group.processes and (held >= 5 or is_late):
            processes.process_group.kill(name)
            processes.start_worker(f"worker-{WORKERS + 1}")
            return KilledWorker(name, int(held))
    return None


def replay_open_dead_letters(conn: report.Connection, processes: DemoProcesses, payments: int) -> int:
    """What an operator would do about what was given up on; waits until those payments have ended, too."""
    letters = conn.execute("select id from outbox.dead_letters where closed_at is null").fetchall()
    for (letter,) in letters:
        conn.execute("select outbox.replay_dead_letter(%s, 'operator:demo', 'the demo''s own faults')", (letter,))
    deadline = time.monotonic() + END_TIMEOUT_SECONDS / 2
    while letters and report.count_ended(conn) < payments and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(letters)


def summarize(
    conn: report.Connection,
    processes: DemoProcesses,
    traffic: merchants.TrafficResult,
    kill: KilledWorker | None,
    replayed: int,
    *,
    seed: int,
    payments: int,
    seconds: float,
) -> report.Report:
    """Ask the database and the sandbox's own memory."""
    charges, faults, webhooks = report.fetch_sandbox_summaries(processes.url("sandbox"))
    refunds, disputes = report.fetch_sandbox_returns(processes.url("sandbox"))
    promises, lost = report.count_violations(conn, traffic.acknowledged, charges)
    counts = conn.execute(
        "select p.state, count(*) from surety.payments as p join surety.states as s on s.state = p.state"
        " group by p.state, s.position order by s.position"
    )
    states = {str(state): int(count) for state, count in counts}
    confirmed = conn.execute("select count(*) from surety.payments where captured_minor > 0").fetchone()
    dead = conn.execute("select count(*) from outbox.dead_letters").fetchone()
    assert confirmed is not None and dead is not None
    if confirmed[0] != charges["payments"]:
        promises["charged at the provider = confirmed here"] = abs(confirmed[0] - charges["payments"])
    promises["no refund is made twice"] = len(refunds["double"])
    promises["refunded at the provider = refunded here"] = report.count_differing_refunds(conn, refunds["amounts"])
    promises["what merchants ask for afterwards is accepted"] = len(traffic.refused_actions)
    return report.Report(
        payments=payments,
        states=states,
        invariants=promises,
        charges_at_provider=charges["charges"],
        confirmed_here=confirmed[0],
        double_charges=len(charges["double"]),
        refunds=refunds["refunds"],
        double_refunds=len(refunds["double"]),
        disputes=disputes,
        lost=lost,
        not_ended=payments - report.count_ended(conn),
        seconds=round(seconds, 2),
        seed=seed,
        stages=[duration._asdict() for duration in report.measure_state_durations(conn)],
        afterwards=report.count_payment_actions(conn),
        faults={
            "observed": describe_faults(conn, faults, webhooks, kill, replayed),
            "at_the_provider": faults["injected"],
        },
        dead_letters=dead[0],
        replayed=replayed,
        example=report.find_example(conn),
    )


def describe_faults(
    conn: report.Connection, faults: dict[str, Any], webhooks: dict[str, Any], kill: KilledWorker | None, replayed: int
) -> list[dict[str, Any]]:
    """What went wrong, each with what became of it; only what did happen."""
    injected: dict[str, int] = {}
    for row in faults["injected"]:
        injected[row["fault"]] = injected.get(row["fault"], 0) + row["count"]
    polled = conn.execute(
        """
        select max(extract(epoch from f.recorded_at - s.at))
        from surety.facts as f
        join surety.steps as s on s.payment_id = f.payment_id and s.to_state = 'provider_submitted'
        where f.kind in ('captured', 'failed', 'canceled') and f.source = 'poll'
        """
    ).fetchone()
    asked = conn.execute("select count(*) from surety.calls where sends > 1").fetchone()
    assert polled is not None and asked is not None
    by_asking = f"found by asking, {polled[0]:.1f} s after submission at most" if polled[0] else "no harm done"
    timeouts = faults["timeouts"]
    rows = [
        (
            timeouts["count"],
            f"provider timeouts ({timeouts['took_effect']} took effect)",
            "asked, not charged again: 0 second charges",
        ),
        (
            injected.get("error_500_before", 0) + injected.get("error_500_after", 0),
            "errors 500 of the provider",
            f"asked first, or repeated under the same key ({asked[0]} calls in all)",
        ),
        (
            injected.get("rate_limit_429", 0) + injected.get("conflict_409", 0),
            "answers 429 and 409",
            "tried again later, uncounted",
        ),
        (
            injected.get("reset", 0) + injected.get("garbage_200", 0),
            "answers cut off or garbled",
            "the same as a timeout",
        ),
        (webhooks["repeated"], "webhooks repeated", "ignored"),
        (webhooks["reordered"], "webhooks out of order", "the same end"),
        (webhooks["lost"], "webhooks lost", by_asking),
        (webhooks["forged"], "webhooks wrongly signed", "kept as evidence, answered 400"),
        (
            int(kill is not None),
            f"worker killed, {kill and kill.held} events held",
            "taken over when its lease ran out",
        ),
        (replayed, "events failed three times and more", "dead letters, replayed just now"),
    ]
    return [{"count": count, "what": what, "became": became} for count, what, became in rows if count]


def print_result(console: Console, result: report.Report, conn: report.Connection, as_json: bool) -> None:
    """Results go to stdout: for people, or one JSON object on the last line."""
    if as_json:
        console.file.write(json.dumps(msgspec.to_builtins(result), ensure_ascii=False) + "\n")
        console.file.flush()
        return
    report.print_report(console, result)
    if result.example:
        from app.cli.trace import render_trace

        console.print(f"\nOne of them: {result.example}")
        console.print(render_trace(conn, result.example))
    console.print("Look yourself: uv run surety demo --keep")


def keep_running(progress: Console, processes: DemoProcesses, url: str, key: str) -> None:
    """Keep everything running until somebody interrupts."""
    progress.print(
        f"\nStill running, until Ctrl-C:\n"
        f"  DATABASE_URL='{url}'\n"
        f"  curl {processes.url('api')}/v1/payments -H 'Authorization: Bearer {key}'\n"
        f"  {processes.url('api')}/docs\n"
        f"  logs in {processes.workspace}",
        soft_wrap=True,
    )
    while True:
        time.sleep(3600)
