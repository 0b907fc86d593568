"""`surety discrepancies`: differences between our records and the provider's; operators close them with a reason."""

from __future__ import annotations

import json
from typing import Any

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

COLUMNS = (
    "id, kind, is_critical, subject, payment_id, detail, surety.format_time(opened_at) as opened_at,"
    " surety.format_time(closed_at) as closed_at, closed_because"
)


class NoSuchDiscrepancy(SuretyError):
    """No discrepancy has this id."""

    def __init__(self, discrepancy_id: str) -> None:
        super().__init__(f"ID: there is no discrepancy {discrepancy_id}; `surety discrepancies list` shows their ids")


@click.group()
def discrepancies() -> None:
    """List differences between our records and the provider's, show one, close one with its explanation."""


@discrepancies.command("list")
@click.option("--closed", is_flag=True, help="Those that are closed, too.")
@json_option
def list_discrepancies(closed: bool, as_json: bool) -> None:
    """List open discrepancies, the critical ones first, then the oldest first."""
    found = read_discrepancies("where %s or closed_at is null order by is_critical desc, opened_at, id", closed)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("id", "kind", "subject", "payment", "opened", "state", box=None)
    rows = [
        (each["id"], each["kind"], each["subject"], each["payment_id"], each["opened_at"], state_of_discrepancy(each))
        for each in found
    ]
    if rows:
        print_table(table, rows)
    else:
        click.echo("no discrepancies" if closed else "no open discrepancies")


@discrepancies.command("show")
@click.argument("discrepancy_id", metavar="ID")
@json_option
def show_discrepancy(discrepancy_id: str, as_json: bool) -> None:
    """Show a discrepancy with its detail and, if it is closed, the explanation."""
    found = read_discrepancies("where id = %s", discrepancy_id)
    if not found:
        raise NoSuchDiscrepancy(discrepancy_id)
    [shown] = found
    if as_json:
        click.echo(json.dumps(shown))
        return
    for name, value in (
        (shown["id"], state_of_discrepancy(shown)),
        ("kind", shown["kind"]),
        ("subject", shown["subject"]),
        ("payment", shown["payment_id"]),
        ("detail", shown["detail"]),
        ("opened", shown["opened_at"]),
        ("closed", shown["closed_at"] and f"{shown['closed_at']}: {shown['closed_because']}"),
    ):
        if value:
            click.echo(f"{name:<9} {value}")


@discrepancies.command("close")
@click.argument("discrepancy_id", metavar="ID")
@reason_option
def close_discrepancy(discrepancy_id: str, reason: str) -> None:
    """Close a discrepancy with its explanation. One that is closed already keeps its first explanation."""
    with connect("deploy", load_settings()) as conn:
        row = conn.execute(
            "select surety.close_discrepancy(%s, %s, %s)",
            (discrepancy_id, reason, authorize(conn, "discrepancies:close")),
        ).fetchone()
    if row is None or row[0] is None:
        raise NoSuchDiscrepancy(discrepancy_id)
    click.echo(f"{discrepancy_id} is closed" + ("" if row[0] else " already"))


@reads
def read_discrepancies(condition: str, *values: Any) -> list[dict[str, Any]]:
    """The discrepancies that meet a condition; times in UTC."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"select {COLUMNS} from report.discrepancies {condition}".encode(), values).fetchall()


def state_of_discrepancy(discrepancy: dict[str, Any]) -> str:
    """Open, critical or closed."""
    if discrepancy["closed_at"]:
        return "closed"
    return "critical" if discrepancy["is_critical"] else "open"
