"""`surety merchants money-limits`: how many payments, and how much money, merchants may accept in a day."""

from __future__ import annotations

import json

import click
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option
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
@click.option("--none", "is_removed", is_flag=True, help="Remove the limit.")
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
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "limits:write")
        try:
            row = conn.execute(SET_LIMIT, (merchant_id, currency.lower(), count, amount, by)).fetchone()
        except psycopg.errors.ForeignKeyViolation:
            raise SuretyError(f"--currency: {currency} is not accepted") from None
    if row is None or row[0] is None:
        raise SuretyError(f"there is no merchant {merchant_id}")
    bounds = [f"{count} payments"] * (count is not None) + [f"{amount} minor units"] * (amount is not None)
    what = f"at most {' and '.join(bounds)} a day" if bounds else "no limit"
    click.echo(f"{merchant_id} {currency.lower()}: {what}" + ("" if row[0] else " already"))


def list_money_limits(merchant_id: str | None, *, as_json: bool) -> None:
    """Print the limits of a merchant, or all."""
    with connect("deploy", load_settings()) as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(LIST_LIMITS, (merchant_id,)).fetchall()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("merchant", "currency", "count", "amount", "day", "count so far", "amount so far", "set by", box=None)
    rows = [list(each.values())[:8] for each in found]
    if rows:
        print_table(table, rows)
    else:
        click.echo("no limits")
