"""`surety keys`: the API keys of merchants and operators. Only their SHA-256 is kept, so each is shown once."""

from __future__ import annotations

from typing import Any

import click
import psycopg
from rich.table import Table

from app.cli.identity import operator_identity
from app.cli.tables import print_table
from app.web.keys import new_key, new_operator_key
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings


class NoSuchKey(SuretyError):
    """No key has this id."""


@click.group()
def keys() -> None:
    """Create, list and revoke keys of merchants and operators."""


@keys.command()
@click.argument("merchant_id", required=False)
@click.option("--operator", metavar="NAME", help="Create an operator's key instead of a merchant's.")
def create(merchant_id: str | None, operator: str | None) -> None:
    """Create a key for a merchant, or for an operator, and print it: it can't be shown again.

    A merchant's key gives access to the merchant's payments only, an operator's key to /v1/operator only.
    """
    if (merchant_id is None) == (operator is None):
        raise SuretyError("give a MERCHANT_ID, or --operator NAME")
    with connect("deploy", load_settings()) as conn:
        if operator is not None:
            click.echo(create_for_operator(conn, operator))
            return
        environment = conn.execute("select livemode from surety.environment").fetchone()
        key = new_key(livemode=bool(environment and environment[0]))
        try:
            conn.execute(
                "select surety.add_api_key(%s, %s, %s, %s)", (merchant_id, key.hash, key.hint, operator_identity())
            )
        except psycopg.errors.ForeignKeyViolation:
            raise SuretyError(f"there is no merchant {merchant_id}") from None
    click.echo(key.text)


def create_for_operator(conn: psycopg.Connection[tuple[Any, ...]], operator: str) -> str:
    """A new key for an operator. Raises SuretyError for an invalid name."""
    key = new_operator_key()
    try:
        conn.execute(
            "select surety.add_operator_key(%s, %s, %s, %s)", (operator, key.hash, key.hint, operator_identity())
        )
    except psycopg.errors.CheckViolation:
        raise SuretyError("an operator's name has 1 to 100 letters, digits and . _ @ -") from None
    return key.text


@keys.command(name="list")
@click.option("--merchant", "merchant_id", help="Only this merchant's.")
def list_keys(merchant_id: str | None) -> None:
    """List keys, the oldest first, each by its last characters."""
    table = Table("id", "ends in", "of", "name", "since", "revoked", box=None)
    with connect("deploy", load_settings()) as conn:
        rows = conn.execute(
            "select k.id, k.hint, m.id, m.name, surety.format_time(k.created_at), surety.format_time(k.revoked_at)"
            " from surety.api_keys as k join surety.merchants as m on m.id = k.merchant_id"
            " where %(merchant)s::text is null or m.id = %(merchant)s"
            " union all"
            " select o.id, o.hint, 'operator', o.operator, surety.format_time(o.created_at),"
            " surety.format_time(o.revoked_at)"
            " from surety.operator_keys as o where %(merchant)s::text is null"
            " order by 1",
            {"merchant": merchant_id},
        ).fetchall()
    print_table(table, rows)


@keys.command()
@click.argument("key_id")
def revoke(key_id: str) -> None:
    """Revoke a key at once and permanently."""
    with connect("deploy", load_settings()) as conn:
        row = conn.execute(
            "select coalesce(surety.revoke_api_key(%(key)s, %(by)s), surety.revoke_operator_key(%(key)s, %(by)s))",
            {"key": key_id, "by": operator_identity()},
        ).fetchone()
    if row is None or row[0] is None:
        raise NoSuchKey(f"there is no key {key_id}")
    click.echo(f"{key_id} is revoked" + ("" if row[0] else " already"))
