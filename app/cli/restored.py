"""`surety restored` and `surety drill`: what a restored database is for."""

from __future__ import annotations

import click
import psycopg

from app.cli.options import require_text
from db.connect import connect
from db.errors import SuretyError, message_of
from db.settings import load_settings

RESTORE_REFUSED = "SU012"

reason_of_restore = click.option(
    "--reason",
    required=True,
    callback=require_text,
    help="The reason for the restore; it is stored with the restore generation.",
)


class RestoreRefused(SuretyError):
    """A copy can't do business, or a database that was not restored can't become a copy."""


@click.command()
@reason_of_restore
def restored(reason: str) -> None:
    """Open the database of DATABASE_URL for business after it was restored.

    A dump of another cluster was restored into it, or a backup was recovered to an earlier time. Until then, nothing is
    accepted or handled. Events that were not handled are due again. Repeating the command has no further effect.
    """
    before, after = open_generation("select outbox.begin_restore_generation(%s)", reason)
    click.echo(
        f"restore generation {after} is open"
        if after != before
        else f"nothing to do: restore generation {after} belongs to this cluster"
    )


@click.command()
@reason_of_restore
def drill(reason: str) -> None:
    """Open the database of DATABASE_URL, a restored copy, for a drill.

    Workers of a copy call no provider but a sandbox, whatever their key. A copy never does business again. The command
    is refused in a database that was not restored.
    """
    before, after = open_generation("select outbox.begin_drill(%s)", reason)
    click.echo(
        f"restore generation {after} is open, for a drill: workers need SURETY_SANDBOX_URL"
        if after != before
        else f"nothing to do: restore generation {after} is a drill's"
    )


def open_generation(statement: str, reason: str) -> tuple[int, int]:
    """The restore generation before and after the statement. Raises RestoreRefused."""
    with connect("deploy", load_settings()) as conn:
        before = conn.execute("select (outbox.restore_generation()).generation").fetchone()
        try:
            after = conn.execute(statement.encode(), (reason,)).fetchone()
        except psycopg.DatabaseError as error:
            if error.sqlstate != RESTORE_REFUSED:
                raise
            raise RestoreRefused(message_of(error)) from None
    assert before is not None and after is not None
    return before[0], after[0]
