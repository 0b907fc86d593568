"""`surety dead-letters`: events that were given up on, and how they are made due again."""

from __future__ import annotations

import getpass
import sys
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.console import Console
from rich.table import Table

from app.cli.status import age
from db.connect import harden
from db.errors import SuretyError
from db.settings import load

COLUMNS = (
    "select d.id, d.handler, d.event_id, d.type, d.payment_id, d.reason, d.attempts, d.died_at,"
    " d.closed_at, d.closed_as, d.closed_by, d.closed_because,"
    " extract(epoch from surety.time_now() - d.died_at)::float8 as seconds from outbox.dead_letters as d"
)
# What a handler does with an event that comes again, whatever became of it the first time.
ON_REPLAY = {
    "submit": "creates the intent under the same key, or looks for it first: at most one will exist",
    "confirm": "asks about the intent first, and confirms it only if it was not",
    "cancel": "asks about the intent first, and cancels it only if it still lives",
    "apply": "reads the webhook again; facts that are known change nothing",
    "settle": "opens the expectation of money, unless it is open",
    "close": "closes the expectation of money, unless it is closed",
}


class DeadLetterError(SuretyError):
    """There is no such dead letter, or it is closed; the message says which."""


def connect() -> psycopg.Connection[dict[str, Any]]:
    """As the owner of the database of DATABASE_URL."""
    url = load().require("database_url").reveal()
    return psycopg.Connection[dict[str, Any]].connect(harden(url, "deploy"), autocommit=True, row_factory=dict_row)


@click.group()
def dead_letters() -> None:
    """List events that were given up on, show one with all its errors, make it due again."""


@dead_letters.command("list")
@click.option("--handler", help="Only those of one handler.")
@click.option("--error", help="Only those whose last error contains this text.")
@click.option("--closed", is_flag=True, help="Those that are closed, too.")
def list_letters(handler: str | None, error: str | None, closed: bool) -> None:
    """List dead letters, the oldest first."""
    with connect() as conn:
        letters = conn.execute(
            f"{COLUMNS} where (%(closed)s or d.closed_at is null)"
            " and (%(handler)s::text is null or d.handler = %(handler)s)"
            " and (%(error)s::text is null or position(%(error)s in d.attempts -> -1 ->> 'error') > 0)"
            " order by d.died_at limit 1000",
            {"handler": handler, "error": error, "closed": closed},
        ).fetchall()
    table = Table(box=None, pad_edge=False)
    for heading in ("letter", "handler", "payment", "dead for", "last error"):
        table.add_column(heading, no_wrap=heading != "last error")
    for letter in letters:
        closed_as = f" ({letter['closed_as']})" if letter["closed_as"] else ""
        last = letter["attempts"][-1]["error"] if letter["attempts"] else letter["reason"]
        table.add_row(
            letter["id"] + closed_as, letter["handler"], letter["payment_id"] or "–", age(letter["seconds"]), last
        )
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(table if letters else "no dead letters")


@dead_letters.command("show")
@click.argument("letter_id")
def show_letter(letter_id: str) -> None:
    """Show a dead letter: what was tried, where its payment stands, what a replay would do."""
    with connect() as conn:
        letter = find(conn, letter_id)
        payment = conn.execute(
            "select state, amount_minor, currency, provider_id from surety.payments where id = %s",
            (letter["payment_id"],),
        ).fetchone()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    about = " · ".join(part for part in (letter["handler"], letter["type"], letter["payment_id"]) if part)
    console.print(f"{letter['id']}   {about}   dead since {letter['died_at']:%H:%M:%S} ({age(letter['seconds'])})")
    console.print(f"reason      {letter['reason']}")
    before = None
    for number, attempt in enumerate(letter["attempts"], start=1):
        error = "same" if attempt["error"] == before else attempt["error"]
        before = attempt["error"]
        console.print(f"{number}  {attempt['at']}  {error}  [{attempt['worker']}]")
    if payment:
        held = payment["provider_id"] or "no object known"
        console.print(
            f"payment     {payment['state']}, {payment['amount_minor']} {payment['currency']}; at the provider: {held}"
        )
    if letter["closed_at"]:
        console.print(f"closed      {letter['closed_as']} by {letter['closed_by']}: {letter['closed_because']}")
    else:
        console.print(f"replay      {ON_REPLAY[letter['handler']]}")
        console.print(f'surety dead-letters replay {letter["id"]} --reason "…"     (--dry-run first)')


@dead_letters.command("replay")
@click.argument("letter_ids", nargs=-1, required=True)
@click.option("--reason", required=True, help="Why; kept in the audit trail.")
@click.option("--dry-run", is_flag=True, help="Only tell what would happen.")
def replay_letters(letter_ids: tuple[str, ...], reason: str, dry_run: bool) -> None:
    """Make events due again, with a clean count. What was replayed already is left alone."""
    if not reason.strip():
        raise DeadLetterError("--reason must say why")
    with connect() as conn:
        for letter in [find(conn, letter_id) for letter_id in letter_ids]:
            if letter["closed_at"]:
                click.echo(f"{letter['id']} is closed already ({letter['closed_as']})")
            elif dry_run:
                click.echo(f"{letter['id']} would be replayed: {letter['handler']} {ON_REPLAY[letter['handler']]}")
            else:
                conn.execute(
                    "select outbox.replay_dead_letter(%s, %s, %s)",
                    (letter["id"], f"operator:{getpass.getuser()}", reason),
                )
                click.echo(f"{letter['id']} is due again")


def find(conn: psycopg.Connection[dict[str, Any]], letter_id: str) -> dict[str, Any]:
    """A dead letter; raises DeadLetterError if there is none of that id."""
    letter = conn.execute(f"{COLUMNS} where d.id = %s", (letter_id,)).fetchone()
    if letter is None:
        raise DeadLetterError(f"there is no dead letter {letter_id}")
    return letter
