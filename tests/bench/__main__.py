"""`python -m tests.bench`: one command per benchmark."""

from __future__ import annotations

from typing import Any

import click

from app.local.processes import Interrupted
from tests.bench import databases

warm_mb = click.option("--warm-mb", default=512, help="How much of the server's memory and log is used once before.")
as_json = click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on the last line.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def bench() -> None:
    """Measure Surety. The default sizes are those of docs/performance.md."""


@bench.command()
@click.option("--events", default=20_000, help="Events drained in each measurement.")
@click.option("--past", default=1_000_000, help="Past events in the aged database.")
@click.option("--backlog", default=100_000, help="Waiting events in it.")
@click.option("--jobs", default=1_500, help="Procrastinate's jobs in each measurement.")
@click.option("--concurrency", default=0, help="Its concurrent jobs in each process; 0: the fastest number.")
@click.option("--merchants", default=300)
@click.option("--rounds", default=5)
@as_json
def drain(*, as_json: bool, **sizes: int) -> None:
    """Events per second through a handler, against Procrastinate with a job for each event."""
    from tests.bench.drain import run

    results = run(**sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--entries", default=1_000_000, help="Audit entries in the database, at least.")
@click.option("--traces", default=1_000, help="Traces of each kind in a round.")
@click.option("--merchants", default=300)
@click.option("--rounds", default=5)
@click.option("--seed", default=1, help="Selects the payments.")
@as_json
def trace(*, as_json: bool, **sizes: int) -> None:
    """Milliseconds until a payment's whole trace is returned."""
    from tests.bench.trace import run

    results = run(**sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=4.0, help="How long each measurement takes.")
@click.option("--connections", default=32)
@click.option(
    "--single-lanes",
    "single_connections",
    default=0,
    help="Batching connections with batches of one request; 0: the fastest number.",
)
@click.option("--merchants", default=20)
@click.option("--rounds", default=5)
@warm_mb
@click.option("--limits", is_flag=True, help="Also with a rate limit for each key and merchant, by turns.")
@as_json
def accept(*, as_json: bool, seconds: float, limits: bool, **sizes: int) -> None:
    """Payments accepted per second over HTTP, against a no-op and against a transaction for each request."""
    from tests.bench.accept import run

    results = run(seconds=seconds, limits=limits, **sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--payments", default=6_000, help="Payments at once in each round.")
@click.option("--merchants", default=20)
@click.option("--workers", default=2)
@click.option("--idle-payments", default=43, help="Payments one after the other; 0 leaves this out.")
@click.option("--rounds", default=3)
@warm_mb
@click.option("--against", metavar="REV", help="Run this revision's own benchmark in turns; needs git and uv.")
@click.option("--dbos", is_flag=True, help="Run the same payments as DBOS workflows in turns; needs uv.")
@click.option("--base-payments", default=2_000, help="Payments in a round of DBOS, or of a REV that reports no costs.")
@click.option("--past", default=0, help="Settled payments in a database that is compared with a fresh one.")
@click.option("--backlog", default=0, help="Payments that wait in it. A million past payments need 20 GB on a disk.")
@click.option("--durable", "on_disk", is_flag=True, help="Keep the server's data on a disk (/var/tmp), not in memory.")
@as_json
def lifecycle(*, as_json: bool, past: int, backlog: int, **sizes: Any) -> None:
    """Payments per second from POST to settled, their cost, and the delay until an idle system calls the provider."""
    from tests.bench import comparison, lifecycle, scale

    only_compared = {name: sizes.pop(name) for name in ("against", "dbos", "base_payments")}
    try:
        if past or backlog:
            results = scale.run(past=past, backlog=backlog, **sizes)
        elif only_compared["against"] or only_compared["dbos"]:
            results = comparison.run(**only_compared, **sizes)
        else:
            results = lifecycle.run(**sizes)
    except Interrupted as interrupted:
        raise click.ClickException(f"interrupted by {interrupted}") from None
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=60.0, help="How long each pause is.")
@click.option("--workers", default=2)
@click.option("--poll-seconds", default=60.0, help="How often workers poll; the default is the product's.")
@click.option("--rounds", default=3)
@warm_mb
@as_json
def idle(*, as_json: bool, seconds: float, poll_seconds: float, **sizes: int) -> None:
    """CPU time of idle workers and PostgreSQL, and the delay of a payment after a pause."""
    from tests.bench.idle import run

    results = run(seconds=seconds, poll_seconds=poll_seconds, **sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=6.0, help="How long each measurement takes.")
@click.option("--connections", default=32, help="Enough for full load; ten times as many overload the API.")
@click.option("--probes", default=8, help="Connections that time their requests.")
@click.option("--merchants", default=20)
@click.option("--rounds", default=3)
@as_json
def overload(*, as_json: bool, seconds: float, **sizes: int) -> None:
    """Results of payments under ten times the load that the API can serve."""
    from tests.bench.overload import run

    results = run(seconds=seconds, **sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=4.0, help="How long each measurement takes.")
@click.option("--oversized", default=200, help="Oversized requests in each round.")
@click.option("--rounds", default=3)
@as_json
def hostile(*, as_json: bool, seconds: float, **sizes: int) -> None:
    """A well-behaved client's latency, and the process's memory, beside clients that exceed every limit."""
    from tests.bench.hostile import run

    results = run(seconds=seconds, **sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=6.0, help="How long each measurement takes.")
@click.option("--probes", default=4, help="Connections of the quiet merchant, which time their requests.")
@click.option("--connections", default=64, help="Connections of the noisy merchant.")
@click.option("--rate", default=500, help="The noisy merchant's limit: requests per second, and as many at once.")
@click.option("--rounds", default=5)
@as_json
def fairness(*, as_json: bool, seconds: float, **sizes: int) -> None:
    """A quiet merchant's latency, alone and beside a noisy one at its rate limit and far above it."""
    from tests.bench.fairness import run

    results = run(seconds=seconds, **sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--entries", default=500_000, help="Entries of the file; every tenth has an addenda record.")
@as_json
def nacha(*, as_json: bool, entries: int) -> None:
    """NACHA entries written and read per second of CPU time, in bounded memory."""
    from tests.bench.nacha import run

    results = run(entries)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--payments", default=100_000, help="Payments whose money the report has.")
@click.option("--small", default=10_000, help="Payments of the database that the cost of a row is compared with.")
@click.option("--planted", default=600, help="Mistakes in the report, of every kind.")
@click.option("--probes", default=200, help="Contradicting facts whose discrepancies are waited for.")
@as_json
def reconcile(*, as_json: bool, **sizes: int) -> None:
    """A report of the provider with planted mistakes: which are missed or invented, and what a row costs."""
    from tests.bench.reconcile import run

    results = run(**sizes)
    databases.print_results(results, as_json=as_json)


if __name__ == "__main__":
    bench()
