"""`surety ach`: NACHA files, and customers' bank accounts (ach_accounts.py)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.ach_accounts import accounts
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.errors import SuretyError
from db.formats.nacha.problems import NachaError, NachaProblem
from db.formats.nacha.reader import NachaBatch, NachaEntry, NachaReader
from db.formats.nacha.records import NachaRecord

BATCHES_SHOWN_MAX = 1000
BATCH_FIELDS = ("company_name", "company_id", "entry_class", "entry_description", "effective_date", "odfi")
LIST_CODES = """
    select
        code, kind, meaning, window_days::text as window_days, replace(window_unit, '_', ' ') as window_unit,
        presentation, freezes, rate_group, merchant_action
    from surety.ach_return_codes where %s::text is null or code = %s order by code
"""
HEADER_FIELDS = (
    "immediate_destination",
    "immediate_destination_name",
    "immediate_origin",
    "immediate_origin_name",
    "creation_date",
    "creation_time",
    "file_id_modifier",
)


@click.group()
def ach() -> None:
    """NACHA files: read and check them. Codes of returns. Customers' bank accounts."""


ach.add_command(accounts)


@ach.command("read")
@click.argument("file", metavar="FILE")
@click.option("--strict", is_flag=True, help="As for a file that we write: every broken rule is an error.")
@json_option
def read_nacha_file(file: str, *, strict: bool, as_json: bool) -> None:
    """Print the batches, totals, errors and warnings of a NACHA file; `-` is standard input.

    The file may come from a bank: broken rules are warnings if the entry is usable all the same. Account numbers and
    names are not shown. The status is 1 if there is an error.
    """
    with open_input(file) as stream:
        found = summarize_file(NachaReader(stream, "strict" if strict else "patient"))
    if as_json:
        click.echo(json.dumps(found))
    else:
        print_summary(found)
    if found["errors"]:
        sys.exit(1)


@ach.command("codes")
@click.argument("code", metavar="[CODE]", required=False)
@json_option
@reads
def print_return_codes(code: str | None, as_json: bool) -> None:
    """List the codes of returns: meaning, time, whether the entry may be presented again, what the merchant does."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(LIST_CODES, (code, code and code.upper())).fetchall()
    if not found:
        raise SuretyError(f"CODE: {code} has no meaning in the rules; files with it are read all the same")
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("code", "meaning", "within", "again", "freezes", "merchant", box=None)
    rows = (
        (each["code"], each["meaning"], " ".join(filter(None, (each["window_days"], each["window_unit"]))),
         each["presentation"].replace("_", " "), "yes" if each["freezes"] else "", each["merchant_action"])
        for each in found
    )  # fmt: skip
    print_table(table, rows)


@contextmanager
def open_input(file: str) -> Generator[BinaryIO]:
    """The bytes of a file or of standard input. Raises SuretyError if it can't be read."""
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115 - closed below; only opening may raise here
    except OSError as error:
        raise SuretyError(f"FILE: {file} can't be read: {error.strerror}") from None
    with stream:
        yield stream


def summarize_file(reader: NachaReader) -> dict[str, Any]:
    """What a file contains: header, batches, totals, codes of returns and changes, problems. Amounts in cents."""
    batches: list[dict[str, Any]] = []
    counts, unusable, batch_count = Counter[str](), 0, 0
    problems: list[NachaProblem] = []
    try:
        for part in reader.parts():
            if isinstance(part, NachaEntry):
                unusable += not part.is_usable
                if part.return_addenda is not None:
                    counts[part.return_addenda["code"]] += 1
            else:
                batch_count += 1
                if len(batches) < BATCHES_SHOWN_MAX:
                    batches.append(describe_batch(part))
    except NachaError as unreadable:
        problems = unreadable.problems
    except OSError as error:
        raise SuretyError(f"FILE: can't be read: {error.strerror}") from None
    return {
        "mode": reader.mode,
        "header": describe_record(reader.header, HEADER_FIELDS),
        "batch_count": batch_count,
        "batches": batches,
        "entries": reader.totals.entries,
        "unusable_entries": unusable,
        "debits_minor": reader.totals.debits_minor,
        "credits_minor": reader.totals.credits_minor,
        "codes": dict(sorted(counts.items())),
        "errors": reader.errors + len(problems),
        "warnings": reader.warnings,
        "problems": [asdict(problem) for problem in [*reader.problems, *problems]],
    }


def describe_batch(batch: NachaBatch) -> dict[str, Any]:
    """A batch's header and its totals."""
    return {
        "number": batch.number,
        **describe_record(batch.header, BATCH_FIELDS),
        "entries": batch.totals.entries,
        "debits_minor": batch.totals.debits_minor,
        "credits_minor": batch.totals.credits_minor,
    }


def describe_record(record: NachaRecord | None, names: tuple[str, ...]) -> dict[str, str | None]:
    """Some fields of a record that may be missing."""
    return {name: record[name] if record is not None and name in record else None for name in names}


def print_summary(found: dict[str, Any]) -> None:
    """Print it as text."""
    header = found["header"]
    if header["immediate_origin"]:
        place = {name: plain(value) for name, value in header.items()}
        click.echo(f"from      {place['immediate_origin']} {place['immediate_origin_name']}")
        click.echo(f"to        {place['immediate_destination']} {place['immediate_destination_name']}")
        created = f"{place['creation_date']} {place['creation_time']}".strip()
        click.echo(f"created   {created} (YYMMDD HHMM), file {place['file_id_modifier']} of that day")
    if found["batches"]:
        table = Table("batch", "company", "class", "description", "effective", "entries", "debits", "credits", box=None)
        print_table(
            table,
            (
                (each["number"], plain(each["company_name"]), plain(each["entry_class"]),
                 plain(each["entry_description"]), plain(each["effective_date"]), each["entries"],
                 dollars(each["debits_minor"]), dollars(each["credits_minor"]))
                for each in found["batches"]
            ),
        )  # fmt: skip
    if found["batch_count"] > len(found["batches"]):
        click.echo(f"and {found['batch_count'] - len(found['batches'])} batches more")
    totals = f"debits {dollars(found['debits_minor'])}, credits {dollars(found['credits_minor'])}"
    click.echo(f"entries   {found['entries']}: {totals}")
    if found["codes"]:
        click.echo("codes     " + ", ".join(f"{plain(code)} {count}" for code, count in found["codes"].items()))
    if found["unusable_entries"]:
        click.echo(f"unusable  {found['unusable_entries']}")
    for each in found["problems"]:
        click.echo(f"{each['severity']}: {NachaProblem(**each)}")
    hidden = found["errors"] + found["warnings"] - len(found["problems"])
    if hidden > 0:
        click.echo(f"and {hidden} more")
    click.echo(f"{found['errors']} errors, {found['warnings']} warnings")


def plain(text: str | None) -> str:
    """A field's text, without what would control a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text or "")


def dollars(minor: int) -> str:
    """An amount in dollars."""
    return f"{minor // 100:,}.{minor % 100:02}"
