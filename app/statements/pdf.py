"""Statements as PDF, by typst, which the extra `pdf` installs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO

from app.statements.formats import time_text
from app.statements.statement import Line, MerchantStatement
from db.errors import SuretyError

LINES_MAX = 3_000
"""Typst needs about 90 kB of memory for each."""
TEMPLATE = Path(__file__).with_name("statement.typ")


class NoPdf(SuretyError):
    """A PDF can't be made, or not of so many lines."""


def write_pdf(statement: MerchantStatement, lines: Iterable[Line], file: IO[bytes]) -> None:
    """A document with the balances of each currency, the lines, and those that adjust earlier months. Raises NoPdf."""
    try:
        import typst
    except ImportError:
        raise NoPdf(
            "--format pdf needs the extra `pdf`, which is missing: pip install 'surety[pdf]'; or choose csv or json"
        ) from None
    given = list(islice(lines, LINES_MAX + 1))
    if len(given) > LINES_MAX:
        raise NoPdf(f"--format pdf: this statement has more than {LINES_MAX} lines; choose csv or json")
    # Amounts are texts, because typst rounds large numbers. The data are no part of the program, so no text is run.
    data = {
        "merchant": statement.merchant,
        "name": statement.name,
        "month": statement.month,
        "status": statement.status,
        "ends_at": time_text(statement.ends_at),
        "kinds": [kind.replace("_", " ") for kind in statement.kinds],
        "balances": [
            {
                "currency": statement.currency_name(currency),
                "rows": [
                    [kind.replace("_", " "), *(statement.text_of(amount, currency) for amount in amounts)]
                    for kind, amounts in (*kinds.items(), ("total", totals_of(kinds)))
                ],
            }
            for currency, kinds in statement.balances.items()
        ],
        "lines": [cells_of(statement, line) for line in given if line.adjusts is None],
        "adjustments": [[*cells_of(statement, line), line.adjusts] for line in given if line.adjusts is not None],
    }
    file.write(
        typst.compile(
            TEMPLATE.read_bytes(),
            sys_inputs={"data": json.dumps(data)},
            # The time of the statement, so that the same statement is the same file.
            timestamp=int(statement.ends_at.timestamp()),
            ignore_system_fonts=True,
            pdf_tags=False,
        )
    )


def totals_of(kinds: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The opening and closing balance of all accounts of a currency."""
    return sum(opening for opening, _ in kinds.values()), sum(closing for _, closing in kinds.values())


def cells_of(statement: MerchantStatement, line: Line) -> list[str]:
    """The cells of a line."""
    return [
        time_text(line.booked_at)[:16].replace("T", " "),
        line.type.replace("_", " "),
        line.payment or "",
        line.reference or "",
        statement.currency_name(line.currency),
        *(statement.text_of(amount, line.currency) for amount in (line.gross, line.fee, line.net)),
    ]
