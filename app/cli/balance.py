"""`surety balance`: balances as of any time, of a merchant or of all accounts."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.options import json_option, require_merchant, time_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table

MERCHANT_BALANCES = """
    select b.kind as account, b.currency, b.balance_minor, surety.format_amount(b.balance_minor, b.currency) as text
    from ledger.merchant_balances_at(%(merchant)s, %(at)s) as b
    order by b.currency, b.kind
"""
# By kind and currency, on the side on which the kind usually stands.
ALL_BALANCES = """
    select
        summed.account, summed.side, summed.currency, summed.balance_minor,
        surety.format_amount(summed.balance_minor, summed.currency) as text
    from (
        select
            k.kind as account, k.normal_side as side, b.currency,
            sum(case k.normal_side when 'credit' then b.balance_minor else - b.balance_minor end)::bigint
                as balance_minor
        from ledger.balances_at(%(at)s) as b join ledger.account_kinds as k on k.kind = b.kind
        group by k.kind, k.normal_side, b.currency
    ) as summed
    order by summed.currency, summed.side, summed.account
"""


@click.command()
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Of one merchant; default: of all accounts.")
@time_option("--at", "at", "Before this time, such as 2027-01-01T00:00:00Z; default: now.")
@json_option
@reads
def balance(merchant_id: str | None, at: datetime | None, as_json: bool) -> None:
    """Show balances by what was booked before a time.

    The time of a booking counts, not that of the provider's record: a record that arrives late changes no balance of
    the past. Without --merchant, accounts of the same kind are added up, and debits equal credits.
    """
    found, known_at = read_balances(merchant_id, at)
    if as_json:
        click.echo(json.dumps({"at": known_at, "merchant": merchant_id, "balances": found}))
        return
    if not found:
        click.echo(f"no postings before {known_at}")
        return
    columns = ("account", "amount") if merchant_id else ("account", "side", "amount")
    rows = [
        (each["account"], *(() if merchant_id else (each["side"],)), each["text"] or bare_amount(each))
        for each in found
    ]
    print_table(Table(*columns, box=None, caption=f"before {known_at}"), rows)


@reads
def read_balances(merchant_id: str | None, at: datetime | None) -> tuple[list[dict[str, Any]], str]:
    """The balances and the time that they are of. Raises SuretyError for an unknown merchant."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        now = conn.execute("select surety.read_clock()").fetchone()
        assert now is not None
        wanted = (at or now[0]).astimezone(UTC)
        query = ALL_BALANCES if merchant_id is None else MERCHANT_BALANCES
        found = cursor.execute(query.encode(), {"merchant": merchant_id, "at": wanted}).fetchall()
    return found, wanted.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bare_amount(balance: dict[str, Any]) -> str:
    """An amount in a currency without a row, whose decimal places are not known."""
    return f"{balance['balance_minor']} minor units of {balance['currency'].upper()}"
