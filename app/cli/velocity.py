"""`surety velocity`: rules about many payments of one payer within a period."""

from __future__ import annotations

import json
from datetime import timedelta

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.money_limits import BIGINT_MAX
from app.cli.options import json_option, parse_period, require_currencies, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

SUBJECTS = ("card", "customer", "email")
ADD_RULE = "select surety.add_velocity_rule(%s, %s, %s, %s, %s, %s, %s, %s)"
LIST_RULES = """
select
    id, merchant_id as merchant, subject, extract(epoch from period)::bigint as period_seconds, count_max as count,
    amount_max_minor as amount, currency, action, created_by, surety.format_time(created_at) as created_at,
    surety.format_time(removed_at) as removed_at
from surety.velocity_rules
where removed_at is null or %s
order by id
"""


def describe_period(seconds: int) -> str:
    """90 s, 15 m, 24 h, 7 d: in the largest unit of --per without a remainder, and days from two on."""
    if seconds >= 2 * 86_400 and seconds % 86_400 == 0:
        return f"{seconds // 86_400} d"
    for length, unit in ((3600, "h"), (60, "m")):
        if seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


@click.group()
def velocity() -> None:
    """Rules about many payments of one payer: list, add, remove.

    A payment beyond a rule is refused, or accepted and put on hold until an operator decides (surety holds).
    """


@velocity.command("list")
@click.option("--removed", is_flag=True, help="Those that were removed, too.")
@json_option
@reads
def print_velocity_rules(removed: bool, as_json: bool) -> None:
    """List the rules, the oldest first."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(LIST_RULES, (removed,)).fetchall()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("id", "merchant", "subject", "per", "count", "amount", "currency", "action", "removed", box=None)
    rows = [
        (
            *(each["id"], each["merchant"] or "each", each["subject"], describe_period(each["period_seconds"])),
            *(each["count"], each["amount"], each["currency"], each["action"], each["removed_at"]),
        )
        for each in found
    ]
    if rows:
        print_table(table, rows)
    else:
        click.echo("no rules")


@velocity.command("add")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Default: each merchant, counted apart.")
@click.option("--subject", type=click.Choice(SUBJECTS), required=True, help="By what payments are counted; see above.")
@click.option("--per", "period", metavar="TIME", required=True, callback=parse_period, help="Such as 15m, 24h, 7d.")
@click.option("--count", type=click.IntRange(0, BIGINT_MAX), help="The most payments of one payer in that time.")
@click.option("--amount", type=click.IntRange(0, BIGINT_MAX), help="The most money, in minor units of --currency.")
@click.option("--currency", metavar="CODE", help="About payments in this currency alone.")
@click.option("--action", type=click.Choice(("refuse", "hold")), required=True, help="For a payment beyond the rule.")
def add_velocity_rule(
    merchant_id: str | None, subject: str, period: timedelta, count: int | None, amount: int | None,
    currency: str | None, action: str,
) -> None:  # fmt: skip
    r"""Add a rule; prints its id. Payments of the period before it count at once.

    \b
    email     the payer's address, given with the payment
    customer  the stored customer
    card      the card of a saved payment method: payments by methods of it, whichever customer's, and those that saved
              one. Payments by a new token are neither judged nor counted: their card is not known beforehand.
    """
    if count is None and amount is None:
        raise SuretyError("give --count, --amount or both")
    if amount is not None and currency is None:
        raise SuretyError("--currency: an amount is in one currency")
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "limits:write")
        currency = currency and currency.lower()
        if currency is not None:
            require_currencies(conn, [currency])
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        values = merchant_id, subject, period, count, amount, currency, action, by
        row = conn.execute(ADD_RULE, values).fetchone()
    assert row is not None
    click.echo(row[0])


@velocity.command("remove")
@click.argument("rule_id", metavar="ID")
def remove_velocity_rule(rule_id: str) -> None:
    """Remove a rule. Payments that it holds stay on hold."""
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "limits:write")
        row = conn.execute("select surety.remove_velocity_rule(%s, %s)", (rule_id, by)).fetchone()
    if row is None or row[0] is None:
        raise SuretyError(f"ID: there is no rule {rule_id}; `surety velocity list` shows their ids")
    click.echo(f"{rule_id} is removed" + ("" if row[0] else " already"))
