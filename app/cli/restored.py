"""`surety restored`."""

from __future__ import annotations

import click
import psycopg

from app.cli.options import require_text
from db.connect import harden
from db.settings import load_settings


@click.command()
@click.option(
    "--reason",
    required=True,
    callback=require_text,
    help="The reason for the restore; it is stored with the restore generation.",
)
def restored(reason: str) -> None:
    """Open the database of DATABASE_URL after it was restored.

    A dump of another cluster was restored into it, or its cluster was set back to an earlier time. Until then, nothing
    is handled, and in another cluster nothing is accepted. Events that were not handled are due again. Repeating the
    command has no further effect.
    """
    url = load_settings().require("database_url").reveal()
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        before = conn.execute("select max(generation) from outbox.restore_generations").fetchone()
        after = conn.execute("select outbox.begin_restore_generation(%s)", (reason,)).fetchone()
    assert before is not None and after is not None
    click.echo(
        f"restore generation {after[0]} is open"
        if after != before
        else f"nothing to do: restore generation {after[0]} belongs to this cluster"
    )
