"""The import of a file of bank statements: its lines are copied into a staging table while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import psycopg
from msgspec import Struct
from psycopg.types.json import Jsonb

from app.imports.files import file_digest, open_file
from db.formats.bai2 import read_bai2
from db.formats.bank_csv import CsvMapping, read_bank_csv
from db.formats.bank_statements import (
    FileRefused,
    RefusedEntry,
    SkippedEntry,
    StatementHead,
    StatementLine,
    StatementPart,
)
from db.formats.camt053 import read_camt053

STATEMENTS_MAX = 100_000
REFUSALS_MAX = 100_000
STAGE_LINES = """
    copy surety.staged_bank_lines (
        statement, place, part, booked_on, value_on, amount_minor, currency, bank_reference, reference_words,
        description, code, is_reversal
    ) from stdin
"""
STAGE_REFUSALS = "copy surety.staged_bank_refusals (place, field, value, rule, subject) from stdin"

Connection = psycopg.Connection[tuple[Any, ...]]


class CsvOptions(Struct):
    """What a CSV file does not say itself."""

    mapping: CsvMapping
    account: str


class Reading(Struct):
    """What was read so far, beside the lines."""

    heads: list[StatementHead]
    refused: list[RefusedEntry]
    skipped: int = 0


def format_of(file: IO[bytes], csv: CsvOptions | None) -> str:
    """The format by the file's first bytes. Raises FileRefused."""
    start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if csv is not None:
        return "csv"
    if start.startswith(b"<"):
        return "camt.053"
    if start.startswith(b"01,"):
        return "bai2"
    raise FileRefused("this is neither camt.053 nor BAI2; for CSV give --mapping and --account")


def import_bank_file(
    conn: Connection, path: Path, csv: CsvOptions | None, *, check_totals: bool, actor: str
) -> dict[str, Any] | None:
    """Import a file in the connection's transaction; returns its row with counts, None if it was imported before.

    Raises FileRefused for a file that is damaged as a whole: nothing of it is stored then.
    """
    with open_file(path) as file:
        digest = file_digest(file)
        known = conn.execute("select from surety.bank_files where digest = %s", (digest,)).fetchone()
        if known is not None:
            return None
        kind = format_of(file, csv)
        parts: Iterator[StatementPart]
        if kind == "csv":
            assert csv is not None
            parts = read_bank_csv(file, csv.mapping, csv.account, path.name)
        else:
            parts = read_camt053(file) if kind == "camt.053" else read_bai2(file, check_totals=check_totals)
        reading = stage(conn, parts)
    given = {"digest": digest, "name": path.name, "format": kind, "skipped": reading.skipped}
    heads = [shown_head(head) for head in reading.heads]
    row = conn.execute("select surety.import_bank_file(%s, %s, %s)", (Jsonb(given), Jsonb(heads), actor)).fetchone()
    assert row is not None
    result: dict[str, Any] | None = row[0]
    return result


def stage(conn: Connection, parts: Iterator[StatementPart]) -> Reading:
    """Copy the lines into the staging table while they are read. Raises FileRefused."""
    reading = Reading([], [])
    numbers: dict[str, int] = {}
    with conn.cursor() as cursor, cursor.copy(STAGE_LINES) as copy:
        for part in parts:
            match part:
                case StatementLine():
                    # Rows of several currencies of a CSV file alternate.
                    number = numbers[part.currency]
                    copy.write_row((
                        number, part.place, part.part, part.booked_on, part.value_on, part.amount_minor, part.currency,
                        part.bank_reference, part.references, part.text, part.code, part.is_reversal,
                    ))  # fmt: skip
                case StatementHead():
                    reading.heads.append(part)
                    numbers[part.currency] = len(reading.heads)
                    if len(reading.heads) > STATEMENTS_MAX:
                        raise FileRefused(f"a file has at most {STATEMENTS_MAX} statements")
                case RefusedEntry():
                    reading.refused.append(part)
                    if len(reading.refused) > REFUSALS_MAX:
                        raise FileRefused(f"more than {REFUSALS_MAX} entries break rules; is it the right format?")
                case SkippedEntry():
                    reading.skipped += 1
    with conn.cursor() as cursor, cursor.copy(STAGE_REFUSALS) as copy:
        for one in reading.refused:
            copy.write_row((one.place, one.field[:100], one.value[:200].replace("\0", ""), one.rule, one.subject))
    return reading


def shown_head(head: StatementHead) -> dict[str, Any]:
    """A head as JSON; the account's number only as a digest and its last four characters."""
    fields: dict[str, Any] = msgspec.to_builtins(head)
    number = fields.pop("account")
    digest = hashlib.sha256(f"{head.bank}/{number}".encode()).hexdigest()
    return fields | {"digest": digest, "hint": number[-4:]}
