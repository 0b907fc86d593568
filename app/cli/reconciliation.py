"""`surety reconciliation`: the records after which something should follow, by class."""

from __future__ import annotations

import json

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table

CLASSES = ("pending", "overdue", "discrepant", "explained")
COUNT_RECORDS = """
select
    record,
    count(*) filter (where class = 'pending') as pending, count(*) filter (where class = 'overdue') as overdue,
    count(*) filter (where class = 'discrepant') as discrepant,
    count(*) filter (where class = 'explained') as explained, count(*) as records
from report.reconciliation
group by record order by record
"""
LIST_RECORDS = """
select
    record, id, payment_id, class, surety.format_time(opened_at) as opened_at, surety.format_time(due_at) as due_at
from report.reconciliation
where class = %s order by due_at, id limit %s
"""


@click.command()
@click.option(
    "--class", "chosen", type=click.Choice(CLASSES), help="List the records of one class, the due ones first."
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="List at most so many.")
@json_option
@reads
def reconciliation(chosen: str | None, limit: int, as_json: bool) -> None:
    """Count the records after which something should follow: pending, overdue, discrepant or explained."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        if chosen is None:
            found = cursor.execute(COUNT_RECORDS).fetchall()
        else:
            found = cursor.execute(LIST_RECORDS, (chosen, limit)).fetchall()
    if as_json:
        click.echo(json.dumps(found))
    elif not found:
        click.echo("no records" if chosen is None else f"no record is {chosen}")
    else:
        print_table(Table(*found[0], box=None), (each.values() for each in found))
