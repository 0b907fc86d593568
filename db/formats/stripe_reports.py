"""Stripe's itemized reports as CSV: balance change, payout reconciliation, payouts. Columns are found by their names.

Amounts are major units; their decimal separator may be a point or a comma. Columns that are not named here are ignored.
A row that breaks a rule is yielded as refused, with the first column that does.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import IO, Literal

from msgspec import Struct

from db.formats.amounts import DecimalSeparator, Unreadable, exponent_of, minor_units
from db.formats.bank_csv import numbered_rows
from db.formats.bank_statements import FileRefused, RefusedEntry

ReportKind = Literal["balance", "payout_reconciliation", "payouts"]

AMOUNTS = ("gross", "fee", "net")
COLUMNS: dict[ReportKind, tuple[str, ...]] = {
    "balance": ("balance_transaction_id", "created_utc", "currency", *AMOUNTS, "reporting_category"),
    "payout_reconciliation": (
        *("balance_transaction_id", "created_utc", "currency", *AMOUNTS, "reporting_category"),
        "automatic_payout_id",
    ),
    "payouts": ("payout_id", "effective_at_utc", "currency", *AMOUNTS, "reporting_category", "payout_status"),
}
"""The columns that a report must have."""
OPTIONAL = ("automatic_payout_id", "trace_id", "payout_expected_arrival_date")
ID = re.compile(r"(?:txn|po)_[A-Za-z0-9_]{1,100}")
CATEGORY = re.compile(r"[a-z_]{1,64}")
FIRST_LINE_BYTES = 100_000
VALUE_MAX = 200


class ReportRow(Struct, frozen=True):
    """A row of a report; amounts in minor units of the currency."""

    line: int
    id: str
    """Of the balance transaction, or in the payouts report of the payout."""
    currency: str
    gross_minor: int
    fee_minor: int
    net_minor: int
    category: str
    at: datetime
    """When it was created; of a payout when it is effective."""
    payout_id: str | None
    status: str | None
    trace_id: str | None
    arrival_on: date | None


class RuleBroken(ValueError):
    """A column of a row breaks a rule."""

    def __init__(self, column: str, rule: str) -> None:
        super().__init__(rule)
        self.column = column


def kind_by_columns(names: list[str], file_name: str) -> ReportKind:
    """The report that has such columns. Raises FileRefused where two have."""
    if "payout_id" in names:
        return "payouts"
    words = re.sub(r"[^a-z]+", "_", file_name.lower())
    if "payout_reconciliation" in words:
        return "payout_reconciliation"
    if "automatic_payout_id" in names and "balance_change" not in words:
        raise FileRefused("--kind: say whether this is a balance or a payout-reconciliation report")
    return "balance"


class ReportFile:
    """A report that is opened: its kind, and its rows."""

    def __init__(
        self, file: IO[bytes], file_name: str, kind: ReportKind | None, decimal: DecimalSeparator | None
    ) -> None:
        start = file.readline(FIRST_LINE_BYTES).decode("utf-8-sig", "replace")
        file.seek(0)
        self.delimiter = max(",;\t", key=start.count)
        self.names = [name.strip() for name in next(csv.reader([start], delimiter=self.delimiter), [])]
        self.kind = kind or kind_by_columns(self.names, file_name)
        self.decimal = decimal
        missing = [name for name in COLUMNS[self.kind] if name not in self.names]
        if missing:
            raise FileRefused(f"a {self.kind} report has the column {', '.join(missing)}; this file has not")
        repeated = {name for name in COLUMNS[self.kind] if self.names.count(name) > 1}
        if repeated:
            raise FileRefused(f"the column {', '.join(sorted(repeated))} stands twice")
        self._file = file

    def rows(self) -> Iterator[ReportRow | RefusedEntry]:
        """The rows. Raises FileRefused for a file that is not UTF-8 or damaged."""
        text = io.TextIOWrapper(self._file, encoding="utf-8-sig", newline="")
        wanted = {name: self.names.index(name) for name in (*COLUMNS[self.kind], *OPTIONAL) if name in self.names}
        try:
            rows = csv.reader(text, delimiter=self.delimiter, strict=True)
            next(rows, None)
            for line, row in numbered_rows(rows, 0):
                if len(row) != len(self.names):
                    rule = f"a row has {len(self.names)} columns"
                    yield RefusedEntry(line, "row", f"{len(row)} columns", rule)
                    continue
                values = {name: row[at].strip() for name, at in wanted.items()}
                try:
                    yield self._row(line, values)
                except RuleBroken as broken:
                    value = values.get(broken.column, "")[:VALUE_MAX]
                    yield RefusedEntry(
                        line, broken.column, value, str(broken), values[COLUMNS[self.kind][0]][:VALUE_MAX]
                    )
        except UnicodeDecodeError as error:
            raise FileRefused(f"the file is not UTF-8: {error.reason} at byte {error.start}") from None
        finally:
            text.detach()

    def _row(self, line: int, values: dict[str, str]) -> ReportRow:
        """A row. Raises RuleBroken."""
        of_payouts = self.kind == "payouts"
        id_column, time_column = (
            ("payout_id", "effective_at_utc") if of_payouts else ("balance_transaction_id", "created_utc")
        )
        prefix = "po_" if of_payouts else "txn_"
        if not values[id_column].startswith(prefix) or not ID.fullmatch(values[id_column]):
            raise RuleBroken(id_column, f"an id begins with {prefix}")
        currency = values["currency"].lower()
        try:
            exponent_of(currency)
        except Unreadable as error:
            raise RuleBroken("currency", str(error)) from None
        gross, fee, net = (self._amount(name, values[name], currency) for name in AMOUNTS)
        if net != gross - fee:
            raise RuleBroken("net", "net is gross less fee")
        if not CATEGORY.fullmatch(values["reporting_category"]):
            raise RuleBroken("reporting_category", "a category is a word of lower-case letters")
        payout = values.get("automatic_payout_id") or None
        if payout is not None and not (payout.startswith("po_") and ID.fullmatch(payout)):
            raise RuleBroken("automatic_payout_id", "an id begins with po_")
        arrival = values.get("payout_expected_arrival_date")
        return ReportRow(
            line=line,
            id=values[id_column],
            currency=currency,
            gross_minor=gross,
            fee_minor=fee,
            net_minor=net,
            category=values["reporting_category"],
            at=time_of(time_column, values[time_column]),
            payout_id=payout,
            status=values.get("payout_status") or None,
            trace_id=values.get("trace_id") or None,
            arrival_on=time_of("payout_expected_arrival_date", arrival).date() if arrival else None,
        )

    def _amount(self, column: str, text: str, currency: str) -> int:
        """An amount in minor units. Raises RuleBroken."""
        try:
            return minor_units(text, currency, self.decimal)
        except Unreadable as error:
            raise RuleBroken(column, str(error)) from None


def time_of(column: str, text: str) -> datetime:
    """A time or a day in UTC. Raises RuleBroken."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise RuleBroken(column, "a time is YYYY-MM-DD HH:MM:SS") from None
