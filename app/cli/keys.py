"""`surety keys`: the API keys of merchants. Only their SHA-256 is kept, so each is shown once, when it is made."""

from __future__ import annotations

import getpass

import click
import psycopg
from rich.table import Table

from app.cli.tables import show
from app.keys import new_key
from db.connect import connect
from db.errors import SuretyError
from db.settings import load


class NoSuchKey(SuretyError):
    """No key has this id."""


@click.group()
def keys() -> None:
    """Create, list and revoke API keys."""


@keys.command()
@click.argument("merchant_id")
def create(merchant_id: str) -> None:
    """Create a key for a merchant and print it: it can't be shown again."""
    with connect("deploy", load()) as conn:
        environment = conn.execute("select livemode from surety.environment").fetchone()
        key = new_key(livemode=bool(environment and environment[0]))
        try:
            conn.execute(
                "select surety.add_api_key(%s, %s, %s, %s)", (merchant_id, key.hash, key.hint, getpass.getuser())
            )
        except psycopg.errors.ForeignKeyViolation:
            raise SuretyError(f"there is no merchant {merchant_id}") from None
    click.echo(key.text)


@keys.command(name="list")
@click.option("--merchant", "merchant_id", help="Only this merchant's.")
def list_all(merchant_id: str | None) -> None:
    """List keys, the oldest first; of each key its last characters are known."""
    table = Table("id", "ends in", "merchant", "name", "since", "revoked", box=None)
    with connect("deploy", load()) as conn:
        rows = conn.execute(
            "select k.id, k.hint, m.id, m.name, surety.iso(k.created_at), surety.iso(k.revoked_at)"
            " from surety.api_keys as k join surety.merchants as m on m.id = k.merchant_id"
            " where %(merchant)s::text is null or m.id = %(merchant)s order by k.id",
            {"merchant": merchant_id},
        ).fetchall()
    show(table, rows)


@keys.command()
@click.argument("key_id")
def revoke(key_id: str) -> None:
    """Revoke a key at once and for ever."""
    with connect("deploy", load()) as conn:
        row = conn.execute("select surety.revoke_api_key(%s, %s)", (key_id, getpass.getuser())).fetchone()
    if row is None or row[0] is None:
        raise NoSuchKey(f"there is no key {key_id}")
    click.echo(f"{key_id} is revoked" + ("" if row[0] else " already"))
