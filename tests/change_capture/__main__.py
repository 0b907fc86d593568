"""`python -m tests.change_capture`: Debezium reads the outbox and is killed under traffic."""

from __future__ import annotations

import json

import click

from tests.change_capture.run import COUNTED, run


@click.command()
@click.option("--payments", default=1000, show_default=True, type=click.IntRange(1))
@click.option("--kills", default=4, show_default=True, type=click.IntRange(0))
@click.option("--seed", default=1, show_default=True, type=int)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON, on one line.")
def main(payments: int, kills: int, seed: int, *, as_json: bool) -> None:
    """Kill Debezium under traffic. Exit 1: an event is missing, out of order, unknown or misplaced."""
    result = run(payments, kills, seed)
    click.echo(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    if any(result[name] for name in COUNTED):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
