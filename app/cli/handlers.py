"""`surety handlers`: the handlers of events; operators pause and resume them."""

from __future__ import annotations

import json

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, reason_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings


class NoSuchHandler(SuretyError):
    """No handler has this name."""


@click.group()
def handlers() -> None:
    """List the handlers of events, pause one, resume it."""


@handlers.command("list")
@json_option
@reads
def list_handlers(as_json: bool) -> None:
    """List the handlers: the work of each, and the time since which it is paused."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(
            "select handler, meaning, surety.format_time(paused_at) as paused_at from outbox.handlers order by handler"
        ).fetchall()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("handler", "meaning", "paused since", box=None)
    print_table(table, [(each["handler"], each["meaning"], each["paused_at"]) for each in found])


@handlers.command("pause")
@click.argument("handler")
@reason_option
def pause_handler(handler: str, reason: str) -> None:
    """Pause a handler: new events wait; the batch in progress is finished."""
    set_paused(handler, reason, is_paused=True)


@handlers.command("resume")
@click.argument("handler")
@reason_option
def resume_handler(handler: str, reason: str) -> None:
    """Resume a paused handler."""
    set_paused(handler, reason, is_paused=False)


def set_paused(handler: str, reason: str, *, is_paused: bool) -> None:
    """Pause or resume. Raises NoSuchHandler."""
    with connect("deploy", load_settings()) as conn:
        row = conn.execute(
            "select outbox.set_handler_paused(%s, %s, %s, %s)",
            (handler, is_paused, reason, authorize(conn, "handlers:write")),
        ).fetchone()
        if row is None or row[0] is None:
            known = conn.execute("select string_agg(handler, ', ' order by handler) from outbox.handlers").fetchone()
            assert known is not None
            raise NoSuchHandler(f"HANDLER: there is no handler {handler}; the handlers are {known[0]}")
    click.echo(f"{handler} is {'paused' if is_paused else 'active'}" + ("" if row[0] else " already"))
