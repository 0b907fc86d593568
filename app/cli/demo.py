"""`surety demo`: payments against a misbehaving sandbox of Stripe, on this machine."""

from __future__ import annotations

import json
import secrets
import sys

import click
import msgspec
from rich.console import Console

from app.cli.trace import render_trace
from app.local.demo.checks import Connection
from app.local.demo.rendering import render_report
from app.local.demo.report import Report
from app.local.demo.run import DemoOptions, run_demo
from app.local.processes import Interrupted, interruptible

PAYMENTS_PER_MERCHANT_MIN = 10
"""A merchant with fewer payments earns too little for its refunds."""
PIPE_WIDTH = 110


@click.command()
@click.option(
    "--payments", default=500, show_default=True, type=click.IntRange(1, 100_000), help="The number of payments."
)
@click.option(
    "--merchants", default=20, show_default=True, type=click.IntRange(1, 500), help="The number of merchants."
)
@click.option("--seed", type=int, help="The seed of the faults and their times; the same seed gives the same faults.")
@click.option("--no-faults", is_flag=True, help="No faults: the provider never misbehaves, and no worker is killed.")
@click.option("--live", is_flag=True, help="In live mode, against the sandbox: no real money moves.")
@click.option("--keep", is_flag=True, help="Keep everything running until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, last.")
def demo(
    payments: int, merchants: int, seed: int | None, no_faults: bool, live: bool, keep: bool, as_json: bool
) -> None:
    """Make payments over HTTP while the provider misbehaves and a worker dies; then check every invariant.

    Starts PostgreSQL, the API, the webhook receiver, two workers and a sandbox of Stripe, all on loopback, and leaves
    nothing behind. Real keys in the environment are ignored. Exit status 1 if an acknowledged payment is missing, if
    anything was charged or refunded twice, if the sandbox's record and the database differ, if an invariant is
    violated, or if a payment has not ended.
    """
    options = DemoOptions(
        payments=payments,
        merchants=min(merchants, max(1, payments // PAYMENTS_PER_MERCHANT_MIN)),
        seed=secrets.randbelow(10_000) if seed is None else seed,
        faults=not no_faults,
        livemode=live,
        keep=keep,
    )
    progress = Console(stderr=True, highlight=False)
    try:
        with interruptible():
            report = run_demo(options, progress, print_json if as_json else print_report)
    except Interrupted as interruption:
        progress.print(f"{interruption}: cleared up, nothing is left")
        sys.exit(130)
    sys.exit(0 if report.is_sound else 1)


def print_json(report: Report, conn: Connection) -> None:
    """The report as one JSON object on the last line of stdout."""
    click.echo(json.dumps(msgspec.to_builtins(report), ensure_ascii=False))


def print_report(report: Report, conn: Connection) -> None:
    """The report as tables on stdout, with the trace of one payment."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(render_report(report))
    if report.example:
        console.print(f"\nOne of them: {report.example}")
        console.print(render_trace(conn, report.example))
    console.print("Look yourself: uv run surety demo --keep")
