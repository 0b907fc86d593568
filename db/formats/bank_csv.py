"""Bank statements as CSV, by a mapping that names the columns. The rows of a file are one statement per currency."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import IO, Any

from msgspec import Struct, field

from db.formats.amounts import DecimalSeparator, Unreadable, exponent_of, minor_units
from db.formats.bank_statements import (
    FileRefused,
    RefusedEntry,
    StatementHead,
    StatementLine,
    StatementPart,
    one_line,
    references_among,
)

FIELD_LENGTH_MAX = 100_000


class CsvMapping(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which columns of a bank's CSV files have what. A file has either `amount`, or `credit` and `debit`."""

    booked: str
    value: str = ""
    amount: str = ""
    credit: str = ""
    debit: str = ""
    currency_column: str = ""
    currency: str = ""
    """The currency of all rows, where no column has it."""
    reference: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    date_format: str = "%Y-%m-%d"
    decimal: DecimalSeparator = "."
    delimiter: str = ","
    encoding: str = "utf-8-sig"
    skip_lines: int = 0
    """Lines before the one with the columns' names."""

    def columns(self) -> list[str]:
        """The columns that a file must have."""
        named = (self.booked, self.value, self.amount, self.credit, self.debit, self.currency_column)
        return [one for one in (*named, *self.reference, *self.text) if one]

    def check(self) -> None:
        """Raises FileRefused for a mapping that contradicts itself."""
        if not self.booked:
            raise FileRefused("booked: a mapping names the column of the booking date")
        if bool(self.amount) == bool(self.credit and self.debit) or bool(self.credit) != bool(self.debit):
            raise FileRefused("amount: a mapping names the column of the amount, or those of credit and debit")
        if bool(self.currency) == bool(self.currency_column):
            raise FileRefused("currency: a mapping names a currency or its column")
        if self.currency:
            try:
                exponent_of(self.currency.lower())
            except Unreadable as error:
                raise FileRefused(f"currency: {error}") from None
        if len(self.delimiter) != 1:
            raise FileRefused("delimiter: one character")


def read_bank_csv(file: IO[bytes], mapping: CsvMapping, account: str, reference: str) -> Iterator[StatementPart]:
    """The rows of a CSV file as lines; a head stands before the first line of each currency.

    Raises FileRefused for a file without the mapping's columns.
    """
    mapping.check()
    try:
        text = io.TextIOWrapper(file, encoding=mapping.encoding, newline="")
    except LookupError:
        raise FileRefused(f"encoding: {mapping.encoding} is unknown") from None
    try:
        yield from read_rows(text, mapping, account, reference)
    except UnicodeDecodeError as error:
        raise FileRefused(f"the file is not {mapping.encoding}: {error.reason} at byte {error.start}") from None
    finally:
        text.detach()


def read_rows(text: io.TextIOWrapper, mapping: CsvMapping, account: str, reference: str) -> Iterator[StatementPart]:
    """The rows of a decoded file."""
    for _ in range(mapping.skip_lines):
        text.readline(FIELD_LENGTH_MAX)
    rows = csv.reader(text, delimiter=mapping.delimiter, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise FileRefused(f"the columns' names can't be read: {error}") from None
    missing = [name for name in mapping.columns() if name not in names]
    if missing:
        raise FileRefused(f"the file has no column {', '.join(missing)}; it has {', '.join(names)[:500]}")
    place_of, heads = {name: names.index(name) for name in mapping.columns()}, dict[str, StatementHead]()
    for place, row in numbered_rows(rows, mapping.skip_lines):
        if len(row) != len(names):
            yield RefusedEntry(place, "row", str(len(row)), f"a row has {len(names)} columns")
            continue
        found = read_row({name: row[at].strip() for name, at in place_of.items()}, mapping, place)
        if isinstance(found, StatementLine) and found.currency not in heads:
            heads[found.currency] = StatementHead(account=account, currency=found.currency, reference=reference)
            yield heads[found.currency]
        yield found


def numbered_rows(rows: Any, lines_before: int) -> Iterator[tuple[int, list[str]]]:
    """The rows that csv.reader finds, without empty ones, with their lines' numbers. Raises FileRefused."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise FileRefused(f"line {lines_before + rows.line_num}: {error}") from None
        if any(cell.strip() for cell in row):
            yield lines_before + rows.line_num, row


def read_row(row: dict[str, str], mapping: CsvMapping, place: int) -> StatementLine | RefusedEntry:
    """A row as a line, or the rule that it breaks."""
    booked, value = (row.get(column, "") for column in (mapping.booked, mapping.value))
    try:
        booked_on = day_by_format(booked, mapping.date_format)
        value_on = day_by_format(value, mapping.date_format) if value else None
    except ValueError:
        return RefusedEntry(place, mapping.booked, booked[:100], f"a date is written as {mapping.date_format}")
    currency = (row[mapping.currency_column] if mapping.currency_column else mapping.currency).lower()
    named = [(mapping.amount, 1)] if mapping.amount else [(mapping.credit, 1), (mapping.debit, -1)]
    given = [(column, sign, row[column]) for column, sign in named if row[column]]
    if len(given) != 1:
        return RefusedEntry(place, named[0][0], "", "a row has one amount")
    [(column, sign, amount)] = given
    try:
        minor = minor_units(amount, currency, mapping.decimal)
    except Unreadable as error:
        return RefusedEntry(place, column, amount[:100], str(error))
    # Some banks write debits with a sign in their column, others without.
    minor = -abs(minor) if sign < 0 else minor
    references = [row[name] for name in mapping.reference]
    text = one_line(row[name] for name in mapping.text)
    return StatementLine(
        place=place,
        booked_on=booked_on,
        value_on=value_on,
        amount_minor=minor,
        currency=currency,
        bank_reference=one_line(references[:1])[:64],
        references=references_among(references, text),
        text=text,
    )


def day_by_format(text: str, date_format: str) -> date:
    """A date by strptime's format. Raises ValueError."""
    return datetime.strptime(text, date_format).replace(tzinfo=UTC).date()
