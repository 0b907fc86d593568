"""Statements as CSV and JSON, written line by line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import IO, Any

from app.statements.statement import Line, MerchantStatement

COLUMNS = ("booked_at", "type", "payment", "reference", "object", "currency", "gross", "fee", "net")
LAST_COLUMNS = ("balance", "recorded_at", "adjusts", "id")
# A spreadsheet runs a text that begins with one of these as a formula.
FORMULA_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_csv(statement: MerchantStatement, lines: Iterable[Line], file: IO[str]) -> None:
    """A row per line between those of the opening and closing balances of each currency. Amounts in major units.

    `balance` is the sum of all accounts in that currency, after the line.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*COLUMNS, *statement.kinds, *LAST_COLUMNS))
    balance = {
        currency: sum(opening for opening, _ in kinds.values()) for currency, kinds in statement.balances.items()
    }
    writer.writerows(balance_rows(statement, "opening_balance"))
    for line in lines:
        text, currency = statement.text_of, line.currency
        balance[currency] += line.net
        writer.writerow(
            (
                *(time_text(line.booked_at), line.type, line.payment or "", safe_text(line.reference or "")),
                *(safe_text(line.object), statement.currency_name(currency)),
                *(text(line.gross, currency), text(line.fee, currency), text(line.net, currency)),
                *(text(line.changes.get(kind, 0), currency) for kind in statement.kinds),
                *(text(balance[currency], currency), time_text(line.recorded_at), line.adjusts or "", line.id),
            )
        )
    writer.writerows(balance_rows(statement, "closing_balance"))


def balance_rows(statement: MerchantStatement, kind_of_row: str) -> Iterator[tuple[str, ...]]:
    """A row for each currency, with the balances of its accounts."""
    is_closing = kind_of_row == "closing_balance"
    at = time_text(statement.ends_at if is_closing else statement.starts_at)
    for currency, kinds in statement.balances.items():
        amounts = [kinds[kind][is_closing] for kind in statement.kinds]
        yield (
            *(at, kind_of_row, "", "", "", statement.currency_name(currency), "", "", ""),
            *(statement.text_of(amount, currency) for amount in amounts),
            *(statement.text_of(sum(amounts), currency), "", "", ""),
        )


def safe_text(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe precedes one that looks like it."""
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA_BEGINNINGS) else text


def write_json(statement: MerchantStatement, lines: Iterable[Line], file: IO[str]) -> None:
    """One JSON document, a line of the statement on each of its lines. Amounts in minor units."""
    head: dict[str, Any] = {
        "merchant": statement.merchant,
        "name": statement.name,
        "month": statement.month,
        "status": statement.status,
        "starts_at": time_text(statement.starts_at),
        "ends_at": time_text(statement.ends_at),
        "closed_at": statement.closed_at,
        "balances": [
            {
                "currency": currency,
                "opening": {kind: opening for kind, (opening, _) in kinds.items()},
                "closing": {kind: closing for kind, (_, closing) in kinds.items()},
            }
            for currency, kinds in statement.balances.items()
        ],
    }
    file.write(json.dumps(head)[:-1] + ', "lines": [')
    for place, line in enumerate(lines):
        shown = {
            "id": line.id,
            "booked_at": time_text(line.booked_at),
            "type": line.type,
            "payment": line.payment,
            "reference": line.reference,
            "object": line.object,
            "currency": line.currency,
            "gross": line.gross,
            "fee": line.fee,
            "net": line.net,
            "changes": line.changes,
            "recorded_at": time_text(line.recorded_at) or None,
            "adjusts": line.adjusts,
        }
        file.write((",\n" if place else "\n") + json.dumps(shown))
    file.write("\n]}\n")


def time_text(at: datetime | None) -> str:
    """A time in UTC, as the API shows it."""
    return "" if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
