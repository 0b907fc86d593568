"""A run of the demo: start everything, post payments, kill a worker, wait until everything has ended, report."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.local.demo import merchants, payment_actions
from app.local.demo.checks import Connection, count_ended, count_unreceived_results
from app.local.demo.observed_faults import KilledWorker
from app.local.demo.report import Report, make_report
from app.local.demo.sandbox_record import read_record
from app.local.demo.services import WORKERS, DemoServices, decide_mode, shorten_delays
from app.local.demo.workspace import demo_database, demo_folder
from db.connect import harden
from db.deploy.deploy import deploy

END_TIMEOUT_SECONDS = 50.0
SECONDS_PER_PAYMENT = 0.1
CHECK_SECONDS = 0.05
HELD_EVENTS_MIN = 5
"""The kill waits for a worker that holds so many events, as long as there is time."""

ShowReport = Callable[[Report, Connection], None]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of `surety demo`."""

    payments: int
    merchants: int
    seed: int
    faults: bool
    livemode: bool
    keep: bool


def run_demo(options: DemoOptions, progress: Console, show: ShowReport) -> Report:
    """The whole demo; calls `show` while the database is still there, and returns once everything is removed."""
    started = time.monotonic()
    with ExitStack() as stack:
        workspace = stack.enter_context(demo_folder())
        url = stack.enter_context(demo_database(os.environ.get("DATABASE_URL")))
        deploy(url)
        conn = stack.enter_context(psycopg.connect(harden(url, "deploy"), autocommit=True))
        decide_mode(conn, livemode=options.livemode)
        shorten_delays(conn)
        services = DemoServices(workspace, url, options.seed, faults=options.faults, livemode=options.livemode)
        stack.callback(services.process_group.stop)
        services.start(conn)
        print_header(progress, conn, services, options)
        keys = merchants.create_merchants(conn, options.merchants, options.seed, livemode=options.livemode)
        orders = merchants.create_orders(keys, options.payments, options.seed)
        orders, agents = payment_actions.plan_actions(orders, options.seed)
        began = time.monotonic()
        traffic, kill = run_traffic(services, conn, orders, agents, progress)
        seconds = time.monotonic() - began
        replay_open_dead_letters(conn, services, options.payments)
        report = make_report(
            conn,
            read_record(services.url("sandbox")),
            traffic,
            kill,
            seed=options.seed,
            payments=options.payments,
            seconds=seconds,
        )
        show(report, conn)
        if options.keep:
            keep_running(progress, services, url, keys[0], merchants.create_admin(conn))
    progress.print(f"cleared up after {time.monotonic() - started:.1f} s")
    return report


def print_header(progress: Console, conn: Connection, services: DemoServices, options: DemoOptions) -> None:
    """Print the options, the server's version and the ports."""
    version = conn.execute("show server_version").fetchone()
    assert version is not None
    if options.livemode:
        progress.print("live mode, against the sandbox: no real money moves")
    progress.print(
        f"Surety demo   seed {options.seed} · {options.merchants} merchants · {options.payments} payments · "
        f"faults {'on' if options.faults else 'off'}\n"
        f"PostgreSQL {str(version[0]).split()[0]} ✓  deploy ✓  api :{services.ports['api']}"
        f"  webhooks :{services.ports['webhooks']}  sandbox :{services.ports['sandbox']}  workers {WORKERS}"
    )


def run_traffic(
    services: DemoServices,
    conn: Connection,
    orders: list[merchants.Order],
    agents: list[payment_actions.MerchantAgent],
    progress: Console,
) -> tuple[merchants.TrafficResult, KilledWorker | None]:
    """Post all orders, kill a worker in the middle, wait until all payments have ended or the time is over."""
    traffic = merchants.TrafficResult()
    failures: list[BaseException] = []

    def post_all() -> None:
        try:
            asyncio.run(run_merchants(services, orders, agents, traffic))
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            failures.append(error)

    posting = threading.Thread(target=post_all, daemon=True)
    posting.start()
    kill: KilledWorker | None = None
    deadline = time.monotonic() + END_TIMEOUT_SECONDS + SECONDS_PER_PAYMENT * len(orders)
    columns = (BarColumn(28), MofNCompleteColumn(), TextColumn("ended"), TimeElapsedColumn())
    with Progress(*columns, console=progress) as bar:
        task = bar.add_task("payments", total=len(orders))
        while time.monotonic() < deadline:
            ended = count_ended(conn)
            bar.update(task, completed=ended)
            if services.faults and kill is None:
                kill = kill_worker(services, conn, is_late=ended > len(orders) // 2)
            if failures:
                raise failures[0]
            is_over = ended >= len(orders) - len(traffic.refused) and not posting.is_alive()
            if is_over and not count_unreceived_results(conn, services.url("sandbox")):
                break
            if dead := services.process_group.ended_processes():
                progress.print(
                    f"[red]{', '.join(dead)} ended by itself[/]\n{services.process_group.output.tail(next(iter(dead)))}"
                )
                break
            time.sleep(CHECK_SECONDS)
    return traffic, kill


async def run_merchants(
    services: DemoServices,
    orders: list[merchants.Order],
    agents: list[payment_actions.MerchantAgent],
    traffic: merchants.TrafficResult,
) -> None:
    """Post the payments while each merchant's agent captures, cancels, refunds and answers disputes."""
    async with httpx.AsyncClient(base_url=services.url("api"), timeout=10) as client, asyncio.TaskGroup() as tasks:
        for agent in agents:
            tasks.create_task(agent.work(client))
        posted = await merchants.post_orders(services.url("api"), orders, lambda: None)
    traffic.acknowledged, traffic.refused, traffic.repeated = posted.acknowledged, posted.refused, posted.repeated
    traffic.refused_actions = [refusal for agent in agents for refusal in agent.refusals]


def kill_worker(services: DemoServices, conn: Connection, *, is_late: bool) -> KilledWorker | None:
    """SIGKILL the worker with the most events, once it has enough of them or it is late, and start another one."""
    rows = conn.execute(
        "select leased_by, sum(cardinality(event_ids)) from outbox.batches group by 1 order by 2 desc"
    ).fetchall()
    for name, held in rows:
        if name in services.process_group.processes and (held >= HELD_EVENTS_MIN or is_late):
            services.process_group.kill(name)
            kill = KilledWorker(name)
            leases = conn.execute("select handler, event_ids from outbox.batches where leased_by = %s", (name,))
            for handler, event_ids in leases:
                kill.held.setdefault(handler, []).extend(event_ids)
            services.start_worker(f"worker-{WORKERS + 1}")
            return kill
    return None


def replay_open_dead_letters(conn: Connection, services: DemoServices, payments: int) -> None:
    """Replay open dead letters, as an operator would, and wait until their payments have ended."""
    letters = conn.execute("select id from outbox.dead_letters where closed_at is null").fetchall()
    for (letter,) in letters:
        conn.execute("select outbox.replay_dead_letter(%s, 'operator:demo', 'the demo''s own faults')", (letter,))
    deadline = time.monotonic() + END_TIMEOUT_SECONDS / 2
    while letters and time.monotonic() < deadline:
        if count_ended(conn) >= payments and not count_unreceived_results(conn, services.url("sandbox")):
            break
        time.sleep(CHECK_SECONDS)


def keep_running(progress: Console, services: DemoServices, url: str, key: str, operator_key: str) -> None:
    """Keep everything running until an interrupt."""
    progress.print(
        f"\nStill running, until Ctrl-C:\n"
        f"  DATABASE_URL='{url}'\n"
        f"  SURETY_OPERATOR_KEY={operator_key}\n"
        f"  curl {services.url('api')}/v1/payments -H 'Authorization: Bearer {key}'\n"
        f"  {services.url('api')}/docs\n"
        f"  logs in {services.workspace}",
        soft_wrap=True,
    )
    while True:
        time.sleep(3600)
