"""`python -m tests.bench`: one command per benchmark."""

from __future__ import annotations

import click

from tests.bench import databases

as_json = click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on the last line.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def bench() -> None:
    """Measure Surety. The default sizes are those of docs/performance.md."""


@bench.command()
@click.option("--events", default=20_000, help="Events drained in each measurement.")
@click.option("--past", default=1_000_000, help="Events that have passed in the aged database.")
@click.option("--backlog", default=100_000, help="Events that wait in it.")
@click.option("--jobs", default=1_500, help="Procrastinate's jobs in each measurement.")
@click.option("--concurrency", default=0, help="Its jobs at once in each process; 0: try which is fastest.")
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
@click.option("--seed", default=1, help="Which payments are asked for.")
@as_json
def trace(*, as_json: bool, **sizes: int) -> None:
    """Milliseconds until a payment's whole trace is read."""
    from tests.bench.trace import run

    results = run(**sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=4.0, help="How long each measurement takes.")
@click.option("--connections", default=32)
@click.option("--single-lanes", default=0, help="Connections that take one request at a time; 0: the fastest number.")
@click.option("--merchants", default=20)
@click.option("--rounds", default=5)
@click.option("--warm-mb", default=512, help="How much of the server's memory and log is used once before.")
@as_json
def accept(*, as_json: bool, seconds: float, **sizes: int) -> None:
    """Payments accepted per second over HTTP, against a no-op and against a transaction for each request."""
    from tests.bench.accept import run

    results = run(seconds=seconds, **sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--payments", default=2_000, help="Payments at once in each round.")
@click.option("--merchants", default=20)
@click.option("--workers", default=2)
@click.option("--idle-payments", default=43, help="Payments one after the other.")
@click.option("--rounds", default=3)
@as_json
def lifecycle(*, as_json: bool, **sizes: int) -> None:
    """Payments per second from POST to settled, and how soon the provider hears of one on an idle system."""
    from tests.bench.lifecycle import run

    results = run(**sizes)
    databases.print_results(results, as_json=as_json)


@bench.command()
@click.option("--seconds", default=6.0, help="How long each measurement takes.")
@click.option("--connections", default=32, help="As many as keep it busy; ten times as many overload it.")
@click.option("--probes", default=8, help="Connections that time their requests.")
@click.option("--merchants", default=20)
@click.option("--rounds", default=3)
@as_json
def overload(*, as_json: bool, seconds: float, **sizes: int) -> None:
    """What becomes of payments when ten times as many are sent as are served."""
    from tests.bench.overload import run

    results = run(seconds=seconds, **sizes)
    databases.print_results(results, as_json=as_json)


if __name__ == "__main__":
    bench()
