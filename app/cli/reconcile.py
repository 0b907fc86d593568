"""`surety reconcile`: a report of the provider compared with our records."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any, cast, get_args

import click
import psycopg
from psycopg.rows import dict_row

from app.cli.identity import authorize
from app.cli.options import json_option, parse_instant
from app.imports.provider_reports import ReportOptions, compare_report
from app.statements.formats import safe_text
from app.wording import count_noun
from db.connect import connect
from db.errors import SuretyError
from db.formats.amounts import DecimalSeparator
from db.formats.stripe_reports import ReportKind
from db.settings import load_settings

EXPORT_COLUMNS = ("line", "kind", "subject", "field", "here", "there", "delta_minor", "detail", "discrepancy")
DIFFERENCES = """
    select
        nullif(split_part(d.source_there, ':', 2), '')::integer as line, d.kind,
        regexp_replace(d.subject, ':report$', '') as subject, f.field ->> 'field' as field,
        f.field ->> 'here' as here, f.field ->> 'there' as there, (f.field ->> 'delta_minor')::bigint as delta_minor,
        d.detail, d.id as discrepancy
    from surety.discrepancies as d
    cross join lateral jsonb_array_elements(d.fields) with ordinality as f (field, n)
    where d.closed_at is null and (d.source_there = %(file)s or d.source_there like %(file)s || ':%%')
    order by 1, d.subject, f.n
"""
REFUSED = """
    select
        line, 'refused' as kind, '' as subject, field, null as here, value as there, null as delta_minor,
        rule as detail, null as discrepancy
    from surety.refused_report_rows where file_id = %(file)s order by line
"""


@click.command()
@click.option("--file", "path", metavar="FILE", type=click.Path(path_type=Path), help="The report, a CSV file.")
@click.option("--show", "file_id", metavar="ID", help="Show a report that was compared, instead.")
@click.option(
    "--kind", type=click.Choice([kind.replace("_", "-") for kind in get_args(ReportKind)]),
    help="Which report it is, where its name and columns leave that open.",
)  # fmt: skip
@click.option("--account", default="", metavar="ACCOUNT", help="The account at the provider; default: the platform's.")
@click.option(
    "--from", "from_at", metavar="TIME", callback=parse_instant,
    help="The begin of the report, such as 2026-11-01T00:00:00Z; default: its first row.",
)  # fmt: skip
@click.option(
    "--to", "to_at", metavar="TIME", callback=parse_instant, help="The end of the report; default: its last row."
)
@click.option(
    "--decimal", type=click.Choice(get_args(DecimalSeparator)),
    help="The decimal separator of amounts; default: as each amount shows.",
)  # fmt: skip
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write all differences and refused rows as CSV."
)
@json_option
def reconcile(
    path: Path | None,
    file_id: str | None,
    kind: str | None,
    account: str,
    from_at: datetime | None,
    to_at: datetime | None,
    decimal: DecimalSeparator | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compare a report of Stripe's with our records: balance change, payout reconciliation or payouts, itemized CSV.

    Each difference becomes a discrepancy with the field and both values. A row that breaks a rule is kept with its
    line, column, value and rule. A file that was compared changes nothing.
    """
    if (path is None) == (file_id is None):
        raise SuretyError("--file: give a report by --file, or one that was compared by --show")
    with connect("deploy", load_settings()) as conn, conn.transaction():
        done: dict[str, Any] | None
        if path is not None:
            actor = authorize(conn, "statements:import")
            report = cast(ReportKind, kind.replace("-", "_")) if kind else None
            done = compare_report(conn, path, ReportOptions(report, account, decimal, from_at, to_at), actor)
            if done is None:
                click.echo("null" if as_json else f"{path.name}: compared before, nothing changed")
                return
        else:
            row = conn.execute("select to_jsonb(f) from surety.report_files as f where id = %s", (file_id,)).fetchone()
            if row is None:
                raise SuretyError(f"--show: there is no compared report {file_id}")
            done = row[0]
        assert done is not None
        show_report(conn, done, output, as_json=as_json)


def show_report(
    conn: psycopg.Connection[tuple[Any, ...]], done: dict[str, Any], output: Path | None, *, as_json: bool
) -> None:
    """Print a report's counts and write its differences."""
    if output is not None:
        write_differences(conn, done["id"], output)
    if as_json:
        click.echo(json.dumps(done))
        return
    click.echo(
        f"{done['id']}  {done['name']}: {count_noun(done['row_count'], 'row')} of {done['kind']},"
        f" {done['difference_count']} differ, {done['missing_here_count']} not known here,"
        f" {done['missing_at_provider_count']} not in the report, {done['refused_count']} refused"
    )
    for row in read_differences(conn, done["id"], limit=20):
        given = f"{row['field']}: here {row['here']}, there {row['there']}"
        click.echo(f"  {row['line'] or ''}  {row['kind']}  {row['subject']}  {given}  {row['detail']}".rstrip())


def read_differences(conn: psycopg.Connection[tuple[Any, ...]], file_id: str, limit: int) -> list[dict[str, Any]]:
    """The first differences and refused rows of a report."""
    found: list[dict[str, Any]] = []
    for query in (DIFFERENCES, REFUSED):
        with conn.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(f"{query} limit {limit}".encode(), {"file": file_id})
            found += rows.fetchall()
    return found


def write_differences(conn: psycopg.Connection[tuple[Any, ...]], file_id: str, output: Path) -> None:
    """Write all differences and refused rows of a report as CSV, as safe for spreadsheets. Raises SuretyError."""
    try:
        with output.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(EXPORT_COLUMNS)
            for number, query in enumerate((DIFFERENCES, REFUSED)):
                with conn.cursor(f"differences_{number}") as cursor:
                    cursor.execute(query.encode(), {"file": file_id})
                    rows.writerows(tuple(safe_cell(cell) for cell in row) for row in cursor)
    except OSError as error:
        raise SuretyError(f"--output: {output}: {error.strerror}") from None


def safe_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula; numbers stay numbers."""
    if not isinstance(value, str) or value.removeprefix("-").isdecimal():
        return value
    return safe_text(value)
