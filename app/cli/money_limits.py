"""`surety merchants money-limits`: how many payments, and how much money, merchants may accept in a day."""

from __future__ import annotations

import json
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, require_currencies, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

BIGINT_MAX = 2**63 - 1
SET_LIMIT = "select surety.set_money_limit(%s, %s, %s, %s, %s)"
LIST_LIMITS = """
select
    merchant_id as merchant, currency, count_max as count, amount_max_minor as amount, day::text,
    payments as count_today, amount_minor as amount_today, set_by, surety.format_time(set_at) as set_at
from surety.list_money_limits(%s)
"""


@click.command("money-limits")
@click.argument("merchant_id", metavar="[MERCHANT]", required=False)
@click.option("--currency", metavar="CODE", help="Set or remove the limit of this currency.")
@click.option("--count", type=click.IntRange(0, BIGINT_MAX), help="The most payments in a day, by UTC.")
@click.option("--amount", type=click.IntRange(0, BIGINT_MAX), help="The most money in a day, in minor units.")
@click.option("--none", "is_removed", is_flag=True, help="Remove the limit, both parts of it.")
@json_option
def money_limits(
    merchant_id: str | None,
    currency: str | None,
    count: int | None,
    amount: int | None,
    is_removed: bool,
    as_json: bool,
) -> None:
    """List limits and what was accepted today. With --currency: set one, by --count, --amount or both, or remove it.

    The part of a limit that is not named stays as it is.
    A request beyond the limit gets 403 limit-exceeded and leaves nothing. Payments accepted today count at once,
    whatever became of them.
    """
    if currency is None:
        if count is not None or amount is not None or is_removed:
            raise SuretyError("--currency: a limit is for one currency")
        list_money_limits(merchant_id, as_json=as_json)
        return
    if merchant_id is None:
        raise SuretyError("MERCHANT: a limit is for one merchant")
    if is_removed == (count is not None or amount is not None):
        raise SuretyError("give --count, --amount or both, or --none")
    currency = currency.lower()
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "limits:write")
        require_currencies(conn, [currency])
        # One transaction, so that the limit is shown as it was set.
        with conn.transaction():
            row = conn.execute(SET_LIMIT, (merchant_id, currency, count, amount, by)).fetchone()
            found = [limit for limit in read_money_limits(conn, merchant_id) if limit["currency"] == currency]
    if row is None or row[0] is None:
        raise SuretyError(f"there is no merchant {merchant_id}")
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(f"{merchant_id} {currency}: {describe_bounds(found)}" + ("" if row[0] else " already"))


def describe_bounds(found: list[dict[str, Any]]) -> str:
    """At most 2 payments and 5000 minor units a day; no limit."""
    if not found:
        return "no limit"
    [limit] = found
    bounds = {"payments": limit["count"], "minor units": limit["amount"]}
    return f"at most {' and '.join(f'{most} {what}' for what, most in bounds.items() if most is not None)} a day"


@reads
def list_money_limits(merchant_id: str | None, *, as_json: bool) -> None:
    """Print the limits of a merchant, or all. Raises SuretyError for an unknown merchant."""
    with connect_to_read() as conn:
        if merchant_id is not None:
            require_merchant(conn, merchant_id)
        found = read_money_limits(conn, merchant_id)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("merchant", "currency", "count", "amount", "day", "count so far", "amount so far", "set by", box=None)
    rows = [list(each.values())[:8] for each in found]
    if rows:
        print_table(table, rows)
    else:
        click.echo("no limits")


def read_money_limits(conn: psycopg.Connection[Any], merchant_id: str | None) -> list[dict[str, Any]]:
    """The limits of a merchant, or all."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LIST_LIMITS, (merchant_id,)).fetchall()
