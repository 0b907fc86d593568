"""`surety close`: the end of a month's books."""

from __future__ import annotations

import json
import time
from datetime import date
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, parse_month
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

LIST_MONTHS = """
    select
        to_char(month, 'YYYY-MM') as month, surety.format_time(closed_at) as closed_at, closed_by, findings
    from ledger.closed_months order by month
"""
WAIT_SECONDS = 30
"""For transactions that are open across the end of the month."""


@click.command()
@click.option("--month", metavar="YYYY-MM", callback=parse_month, help="Close this month; default: list closed ones.")
@json_option
def close(month: date | None, as_json: bool) -> None:
    """Close the books of a month, by UTC: keep the balance of every account at its end, and list open matters.

    Months are closed in their order, once they are over. A later booking belongs to a later month, also if its
    record is of a closed one: the statement of that month lists it as an adjustment. Closing a month again changes
    nothing.
    """
    if month is None:
        print_months(as_json=as_json)
        return
    outcome = close_month(month)
    closed = next(each for each in read_months() if each["month"] == f"{month:%Y-%m}")
    if as_json:
        click.echo(json.dumps(closed))
        return
    click.echo(f"{closed['month']} is closed" + (" already" if outcome == "closed_before" else ""))
    if closed["findings"]:
        table = Table("open at that time", "count", "one of them", box=None)
        print_table(
            table,
            (
                (kind.replace("_", " "), found["count"], found["example"])
                for kind, found in sorted(closed["findings"].items())
            ),
        )
    else:
        click.echo("nothing was open")


def close_month(month: date) -> str:
    """Close a month; returns whether it was closed now or before. Raises SuretyError, which names the rule."""
    named = f"{month:%Y-%m}"
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "books:close")
        outcome, detail = try_to_close(conn, month, by)
        if outcome == "not_final" and sum_days(conn, month):
            outcome, detail = try_to_close(conn, month, by)
    match outcome:
        case "closed" | "closed_before":
            return outcome
        case "not_over":
            raise SuretyError(f"--month: {named} isn't over; it ends at {detail}")
        case "no_postings":
            raise SuretyError("--month: nothing was ever booked here, so there is no month to close")
        case "out_of_order":
            raise SuretyError(f"--month: months are closed in their order; the next one is {detail}")
        case "not_final":
            raise SuretyError(
                f"--month: the days of {named} can't end yet: ten minutes must have passed since, and no transaction"
                " may hold the table ledger.transfers for long; try again in a few minutes"
            )
        case "unbalanced":
            raise SuretyError(
                f"the books of {named} don't balance in {detail}: a row was changed by hand; `surety status` names it"
            )
    raise AssertionError(outcome)


def try_to_close(conn: psycopg.Connection[Any], month: date, by: str) -> tuple[str, str | None]:
    """The outcome of one try, with its detail."""
    row = conn.execute("select outcome, detail from ledger.close_month(%s, %s)", (month, by)).fetchone()
    assert row is not None
    return row[0], row[1]


def sum_days(conn: psycopg.Connection[Any], month: date) -> bool:
    """End the days of the month and sum them, each in a transaction; whether all are summed."""
    deadline = time.monotonic() + WAIT_SECONDS
    while conn.execute("select ledger.end_days()").fetchone() == (False,):
        if time.monotonic() > deadline:
            return False
    while conn.execute("select ledger.sum_day()").fetchone() == (True,):
        pass
    query = "select summed_to >= ledger.month_end(%s) from ledger.final_postings"
    return conn.execute(query, (month,)).fetchone() == (True,)


def print_months(*, as_json: bool) -> None:
    """Print the closed months."""
    months = read_months()
    if as_json:
        click.echo(json.dumps(months))
    elif months:
        rows = ((each["month"], each["closed_at"], each["closed_by"], count_findings(each)) for each in months)
        print_table(Table("month", "closed", "by", "open then", box=None), rows)
    else:
        click.echo("no month is closed")


def count_findings(month: dict[str, Any]) -> int:
    """How many matters were open when a month was closed."""
    return sum(found["count"] for found in month["findings"].values())


@reads
def read_months() -> list[dict[str, Any]]:
    """The closed months, in their order."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LIST_MONTHS).fetchall()
