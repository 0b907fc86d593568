"""`python -m tests.fuzz`."""

from __future__ import annotations

import json
import os
import secrets
import sys
from contextlib import ExitStack

import click
import msgspec

from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.fuzz.run import run

PREFIX = "surety_fuzz"


@click.command(context_settings={"show_default": True})
@click.option("--cases", default=2000, type=click.IntRange(1), help="Requests.")
@click.option("--seed", type=int, help="Seed of the requests.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on the last line.")
def main(cases: int, seed: int | None, as_json: bool) -> None:
    """Send unlikely requests by every kind of caller. Exit status 1 if an answer was wrong.

    With DATABASE_URL a database is made on that server, and dropped at the end.
    """
    seed = secrets.randbelow(10_000) if seed is None else seed
    click.echo(f"seed {seed}", err=True)
    with ExitStack() as stack:
        server = os.environ.get("DATABASE_URL") or stack.enter_context(EmbeddedServer()).url
        database = stack.enter_context(temporary_database(server, PREFIX))
        deploy(database)
        result = run(database, cases, seed, lambda line: click.echo(line, err=True))
    fields = msgspec.to_builtins(result)
    click.echo(json.dumps(fields) if as_json else json.dumps(fields, indent=2))
    sys.exit(0 if result.is_sound else 1)


if __name__ == "__main__":
    main()
