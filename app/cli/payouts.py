"""`surety payouts`: what the provider pays out from our balance to our bank."""

from __future__ import annotations

import json
from typing import Any

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.errors import SuretyError

COLUMNS = """
    id, account, status, was_paid, amount_minor, currency, surety.format_amount(amount_minor, currency) as amount,
    is_automatic, trace_id, to_char(arrival_on, 'YYYY-MM-DD') as arrival_on, failure_code, line_count, lines_minor,
    surety.format_time(created_at) as created_at
"""
LINES = """
    select
        category, currency, count(*) as lines, count(distinct payment_id) as payments,
        count(*) filter (where payment_id is null and category in ('charge', 'refund', 'dispute')) as unrecognized,
        sum(net_minor)::bigint as net_minor, surety.format_amount(sum(net_minor)::bigint, currency) as net
    from report.payout_lines where payout_id = %s and account = %s
    group by category, currency order by category, currency
"""


@click.group()
def payouts() -> None:
    """List the provider's payouts to our bank, and show what one of them pays out."""


@payouts.command("list")
@click.option("--status", metavar="STATUS", help="Only of this status: pending, in_transit, paid, canceled, failed.")
@click.option("--account", metavar="ACCOUNT", help="Only of this account at the provider.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
def list_payouts(status: str | None, account: str | None, limit: int, as_json: bool) -> None:
    """List payouts, the newest first."""
    found = read_payouts(
        "where (%s::text is null or status = %s) and (%s::text is null or account = %s)"
        " order by created_at desc, id limit %s",
        *(status, status, account, account, limit),
    )
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        table = Table("id", "account", "amount", "status", "arrival", "trace id", "balance transactions", box=None)
        print_table(
            table,
            (
                (each["id"], each["account"], each["amount"], status_of_payout(each), each["arrival_on"],
                 each["trace_id"], describe_lines(each))
                for each in found
            ),
        )  # fmt: skip
    else:
        click.echo("no payouts")


@payouts.command("show")
@click.argument("payout_id", metavar="ID")
@json_option
def show_payout(payout_id: str, as_json: bool) -> None:
    """Show a payout and the balance transactions that it pays out, by category."""
    found = read_payouts("where id = %s order by account", payout_id)
    if not found:
        raise SuretyError(f"ID: there is no payout {payout_id}; `surety payouts list` shows their ids")
    shown = [each | {"lines": read_lines(each)} for each in found]
    if as_json:
        click.echo(json.dumps(shown if len(shown) > 1 else shown[0]))
        return
    for each in shown:
        for name, value in (
            (each["id"], f"{each['amount']}  {status_of_payout(each)}"),
            ("account", each["account"]),
            ("created", each["created_at"]),
            ("arrival", each["arrival_on"]),
            ("trace id", each["trace_id"]),
            ("failure", each["failure_code"]),
            ("pays out", describe_lines(each)),
        ):
            if value:
                click.echo(f"{name:<9} {value}")
        if each["lines"]:
            table = Table("category", "lines", "payments", "unrecognized", "net", box=None)
            print_table(
                table,
                (
                    (line["category"], line["lines"], line["payments"], line["unrecognized"] or "", line["net"])
                    for line in each["lines"]
                ),
            )


@reads
def read_payouts(condition: str, *values: Any) -> list[dict[str, Any]]:
    """The payouts that meet a condition; amounts in minor units and as text."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"select {COLUMNS} from report.payouts {condition}".encode(), values).fetchall()


@reads
def read_lines(payout: dict[str, Any]) -> list[dict[str, Any]]:
    """The balance transactions of a payout, summed by category and currency."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LINES, (payout["id"], payout["account"])).fetchall()


def status_of_payout(payout: dict[str, Any]) -> str:
    """Its status; of one that failed after it was paid both."""
    return "failed after it was paid" if payout["status"] == "failed" and payout["was_paid"] else str(payout["status"])


def describe_lines(payout: dict[str, Any]) -> str:
    """How the balance transactions of a payout compare with its amount."""
    if payout["line_count"] is None:
        return "not read" if payout["is_automatic"] else "not known of a manual payout"
    fits = payout["lines_minor"] == payout["amount_minor"]
    return f"{payout['line_count']}, they {'add up' if fits else 'do not add up: ' + str(payout['lines_minor'])}"
