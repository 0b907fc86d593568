"""`surety bank-statements`: statements of our bank accounts, and which payouts their lines pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.imports.bank_statements import CsvOptions, import_bank_file
from app.imports.files import file_argument
from app.wording import count_noun
from db.connect import connect
from db.errors import SuretyError
from db.formats.amounts import DecimalSeparator
from db.formats.bank_csv import CsvMapping
from db.settings import load_settings

LIST_STATEMENTS = """
    select id, account_id, account_hint, currency, reference, page, sequence, from_on::text, to_on::text,
        opening_minor, closing_minor, line_count, lines_minor, surety.format_amount(lines_minor, currency) as amount,
        unmatched_count, file_name
    from report.bank_statements
"""
LIST_LINES = """
    select id, booked_on::text, amount_minor, currency, surety.format_amount(amount_minor, currency) as amount,
        state, bank_reference, description, is_reversal, payout_ids
    from report.bank_lines
    where statement_id = %s and (not %s or state = 'unmatched')
    order by place, part limit %s
"""
LIST_ACCOUNTS = """
    select id, hint, bank, currency, provider_account, payer_text, surety.format_time(created_at) as created_at
    from surety.bank_accounts order by created_at, id
"""


@click.group("bank-statements")
def bank_statements() -> None:
    """Import statements of our bank accounts (camt.053, BAI2, CSV), list them, show their lines."""


@bank_statements.command("import")
@file_argument
@click.option("--mapping", metavar="NAME", help="For CSV: the mapping of its columns, set by `map`.")
@click.option("--account", metavar="NUMBER", help="For CSV: the number of the bank account.")
@click.option("--accept-totals", is_flag=True, help="For BAI2: import a file whose totals do not add up, too.")
@json_option
def import_statements(
    path: Path, mapping: str | None, account: str | None, *, accept_totals: bool, as_json: bool
) -> None:
    """Import a file of bank statements and match its lines to payouts. A file that was imported changes nothing.

    A line that came in another statement before is not stored again. Entries that break a rule are stored with their
    number, field, value and rule: `show` lists them.
    """
    if (mapping is None) != (account is None):
        raise SuretyError(f"--{'account' if account is None else 'mapping'}: for CSV, give --mapping and --account")
    with connect("deploy", load_settings()) as conn, conn.transaction():
        actor = authorize(conn, "statements:import")
        csv = CsvOptions(read_mapping(conn, mapping), account.upper().replace(" ", "")) if mapping and account else None
        done = import_bank_file(conn, path, csv, check_totals=not accept_totals, actor=actor)
    if as_json:
        click.echo(json.dumps(done))
    elif done is None:
        click.echo(f"{path.name}: imported before, nothing changed")
    else:
        click.echo(
            f"{done['id']}  {path.name}: {count_noun(done['statement_count'], 'statement')},"
            f" {count_noun(done['line_count'], 'line')} ({done['new_line_count']} new), {done['matched']} matched to"
            f" payouts, {done['unmatched']} unmatched, {done['refused_count']} refused,"
            f" {done['skipped_count']} not booked"
        )


@bank_statements.command("list")
@click.option("--account", metavar="ID", help="Only of this bank account, as `accounts` shows it.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
def list_statements(account: str | None, limit: int, as_json: bool) -> None:
    """List statements, the latest days first."""
    condition = "where %s::text is null or account_id = %s order by to_on desc, id desc limit %s"
    found = rows_of_query(LIST_STATEMENTS + condition, account, account, limit)
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        table = Table("id", "account", "statement", "days", "lines", "sum", "unmatched", box=None)
        print_table(
            table,
            (
                (
                    *(each["id"], f"…{each['account_hint']} {each['currency']}", each["reference"]),
                    *(f"{each['from_on']} – {each['to_on']}", each["line_count"], each["amount"]),
                    each["unmatched_count"] or "",
                )
                for each in found
            ),
        )
    else:
        click.echo("no bank statements")


@bank_statements.command("show")
@click.argument("shown_id", metavar="ID")
@click.option("--unmatched", is_flag=True, help="Only lines that belong to no payout.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True, help="At most so many.")
@json_option
def show_statement(shown_id: str, limit: int, *, unmatched: bool, as_json: bool) -> None:
    """Show a statement with its lines (bst_…), or a file with its statements and refused entries (bfl_…)."""
    if shown_id.startswith("bfl_"):
        show_file(shown_id, as_json=as_json)
        return
    found = rows_of_query(LIST_STATEMENTS + "where id = %s", shown_id)
    if not found:
        raise SuretyError(f"ID: there is no bank statement {shown_id}; `surety bank-statements list` shows their ids")
    lines = rows_of_query(LIST_LINES, shown_id, unmatched, limit)
    if as_json:
        click.echo(json.dumps(found[0] | {"lines": lines}))
        return
    table = Table("line", "booked", "amount", "state", "payouts", "text", box=None)
    print_table(
        table,
        (
            (*(each["id"], each["booked_on"], each["amount"], each["state"]), " ".join(each["payout_ids"]),
             each["description"] or each["bank_reference"])
            for each in lines
        ),
    )  # fmt: skip


def show_file(file_id: str, *, as_json: bool) -> None:
    """Show an imported file. Raises SuretyError."""
    found = rows_of_query("select to_jsonb(f) as file from surety.bank_files as f where id = %s", file_id)
    if not found:
        raise SuretyError(f"ID: there is no imported file {file_id}")
    refused = rows_of_query(
        "select place, field, value, rule from surety.refused_bank_entries where file_id = %s order by place, field",
        file_id,
    )
    if as_json:
        click.echo(json.dumps(found[0]["file"] | {"refused": refused}))
        return
    file = found[0]["file"]
    click.echo(f"{file['name']}  {file['format']}  {file['line_count']} lines, {file['new_line_count']} new")
    if refused:
        table = Table("entry", "field", "value", "rule", box=None)
        print_table(table, ((each["place"], each["field"], each["value"], each["rule"]) for each in refused))


@bank_statements.command("accounts")
@json_option
def list_accounts(as_json: bool) -> None:
    """List our bank accounts, which the imported statements name."""
    found = rows_of_query(LIST_ACCOUNTS)
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        table = Table("id", "number", "currency", "paid by account", "lines with", box=None)
        print_table(
            table,
            (
                (each["id"], f"…{each['hint']}", each["currency"], each["provider_account"], each["payer_text"])
                for each in found
            ),
        )
    else:
        click.echo("no bank accounts")


@bank_statements.command("set-account")
@click.argument("account_id", metavar="ID")
@click.option("--provider-account", metavar="ACCOUNT", help="The account at the provider that pays out to it.")
@click.option(
    "--payer-text", metavar="TEXT",
    help="Words that only the provider's lines have, such as STRIPE; empty: all lines are the provider's.",
)  # fmt: skip
def set_account(account_id: str, provider_account: str | None, payer_text: str | None) -> None:
    """Set who pays out to a bank account, and how the provider's lines are recognized. Lines are matched again."""
    if provider_account is None and payer_text is None:
        raise SuretyError("give --provider-account or --payer-text")
    with connect("deploy", load_settings()) as conn:
        actor = authorize(conn, "statements:import")
        row = conn.execute(
            "select surety.set_bank_account(%s, %s, %s, %s)", (account_id, provider_account, payer_text, actor)
        ).fetchone()
    if row is None or not row[0]:
        raise SuretyError(f"ID: there is no bank account {account_id}; `surety bank-statements accounts` shows them")
    click.echo(f"{account_id} is set")


@bank_statements.command("map")
@click.argument("name")
@click.option("--booked", required=True, metavar="COLUMN", help="The column of the booking date.")
@click.option("--value", default="", metavar="COLUMN", help="The column of the value date.")
@click.option("--amount", default="", metavar="COLUMN", help="The column of the signed amount.")
@click.option("--credit", default="", metavar="COLUMN", help="The column of money that arrives, with --debit.")
@click.option("--debit", default="", metavar="COLUMN", help="The column of money that leaves.")
@click.option("--currency", default="", metavar="CODE", help="The currency of all rows.")
@click.option("--currency-column", default="", metavar="COLUMN", help="The column of the currency.")
@click.option("--reference", multiple=True, metavar="COLUMN", help="A column with a reference; the bank's own first.")
@click.option("--text", multiple=True, metavar="COLUMN", help="A column with a text.")
@click.option("--date-format", default="%Y-%m-%d", show_default=True, help="As of strptime: %d.%m.%Y.")
@click.option(
    "--decimal", default=".", show_default=True, type=click.Choice(get_args(DecimalSeparator)),
    help="The decimal separator of amounts.",
)  # fmt: skip
@click.option("--delimiter", default=",", show_default=True, help="Between columns: one character.")
@click.option("--encoding", default="utf-8-sig", show_default=True, help="Of the file: latin-1, utf-8-sig, …")
@click.option("--skip-lines", default=0, type=click.IntRange(0, 1000), help="Lines before the columns' names.")
def set_mapping(name: str, **columns: Any) -> None:
    """Name which columns of a bank's CSV files have what; files are imported by this name."""
    mapping = msgspec.convert(columns, CsvMapping)
    mapping.check()
    with connect("deploy", load_settings()) as conn:
        actor = authorize(conn, "statements:import")
        if not name.replace("-", "").replace("_", "").isalnum() or name != name.lower() or len(name) > 63:
            raise SuretyError("NAME: lower-case letters, digits, - and _, at most 63")
        given = Jsonb(msgspec.to_builtins(mapping))
        conn.execute("select surety.set_csv_mapping(%s, %s, %s)", (name, given, actor))
    click.echo(f"{name} is set")


@bank_statements.command("mappings")
@json_option
def list_mappings(as_json: bool) -> None:
    """List the mappings of CSV columns."""
    found = rows_of_query("select name, columns, set_by from surety.csv_mappings order by name")
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        for each in found:
            given = ", ".join(f"{key} {value}" for key, value in each["columns"].items() if value)
            click.echo(f"{each['name']}  {given}")
    else:
        click.echo("no mappings")


def read_mapping(conn: Any, name: str) -> CsvMapping:
    """The mapping of that name. Raises SuretyError."""
    row = conn.execute("select columns from surety.csv_mappings where name = %s", (name,)).fetchone()
    if row is None:
        raise SuretyError(f"--mapping: there is no mapping {name}; `surety bank-statements map` makes one")
    return msgspec.convert(row[0], CsvMapping)


@reads
def rows_of_query(query: str, *values: Any) -> list[dict[str, Any]]:
    """The rows of a query."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), values).fetchall()
