"""`surety mode`: whether real money moves in this database. Decided before the first merchant, and audited."""

from __future__ import annotations

import json

import click
import psycopg

from app.cli.identity import authorize
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.wording import describe_mode
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

MEANINGS = {
    "live": "live: every payment of this database moves real money. Workers need a live key of Stripe's (sk_live_… or"
    " rk_live_…), or a sandbox in live mode (sk_live_sandbox). The first merchant makes this final.",
    "test": "test: no payment of this database moves real money. Workers need a test key of Stripe's (sk_test_… or"
    " rk_test_…), or a sandbox. The first merchant makes this final.",
}
FINAL = {
    "merchant_has_the_mode_of_its_database": "there are merchants already: the mode is decided before the first one;"
    " use another database",
    "unmatched_fact_has_the_mode_of_its_database": "workers have stored objects of the provider's in the other mode"
    " already: the mode is decided before they start; use another database",
}
"""The reason why the mode can't be changed, by the constraint."""


class ModeIsFinal(SuretyError):
    """The mode can't be changed."""


@click.command()
@click.argument("new_mode", metavar="[live|test]", required=False, type=click.Choice(list(MEANINGS)))
@json_option
def mode(new_mode: str | None, as_json: bool) -> None:
    """Show the mode of the database, or decide it before the first merchant: live (real money moves) or test."""
    if new_mode is None:
        livemode = read_mode()
        click.echo(json.dumps({"livemode": livemode}) if as_json else describe_mode(livemode))
        return
    with connect("deploy", load_settings()) as conn:
        try:
            row = conn.execute(
                "select surety.set_livemode(%s, %s)", (new_mode == "live", authorize(conn, "mode:write"))
            ).fetchone()
        except psycopg.errors.ForeignKeyViolation as error:
            raise ModeIsFinal(FINAL[error.diag.constraint_name or ""]) from None
        except psycopg.errors.CheckViolation:
            raise ModeIsFinal(
                "this is a test database, whose clock can be moved (environment.kind): no real money may move here"
            ) from None
    assert row is not None
    click.echo(MEANINGS[new_mode] if row[0] else f"{new_mode} already")


@reads
def read_mode() -> bool:
    """Whether real money moves."""
    with connect_to_read() as conn:
        [(livemode,)] = conn.execute("select surety.read_livemode()").fetchall()
    return bool(livemode)
