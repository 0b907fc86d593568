"""The comparison of a provider's report: its rows are copied into a staging table while they are read."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from msgspec import Struct
from psycopg.types.json import Jsonb

from app.imports.bank_statements import REFUSALS_MAX, STAGE_REFUSALS
from app.imports.files import file_digest, open_file
from db.formats.amounts import DecimalSeparator
from db.formats.bank_statements import FileRefused, RefusedEntry
from db.formats.stripe_reports import ReportFile, ReportKind, ReportRow

STAGE_ROWS = """
    copy surety.staged_report_rows (
        line, id, currency, gross_minor, fee_minor, net_minor, category, at, payout_id, status, trace_id, arrival_on
    ) from stdin
"""


class ReportOptions(Struct):
    """What a report does not say itself."""

    kind: ReportKind | None = None
    account: str = ""
    decimal: DecimalSeparator | None = None
    from_at: datetime | None = None
    to_at: datetime | None = None


def compare_report(
    conn: psycopg.Connection[tuple[Any, ...]], path: Path, options: ReportOptions, actor: str
) -> dict[str, Any] | None:
    """Compare a report in the connection's transaction; returns its row with counts, None if it was compared before.

    Raises FileRefused for a file that is no such report.
    """
    with open_file(path) as file:
        digest = file_digest(file)
        asked = (digest, options.account)
        known = conn.execute("select from surety.report_files where digest = %s and account = %s", asked).fetchone()
        if known is not None:
            return None
        report = ReportFile(file, path.name, options.kind, options.decimal)
        stage_report(conn, report)
    # The planner knows nothing of rows that this transaction brought.
    conn.execute("analyze surety.staged_report_rows")
    given = {
        "digest": digest,
        "name": path.name,
        "kind": report.kind,
        "account": options.account,
        "from": options.from_at and options.from_at.isoformat(),
        "to": options.to_at and options.to_at.isoformat(),
    }
    row = conn.execute("select surety.compare_report(%s, %s)", (Jsonb(given), actor)).fetchone()
    assert row is not None
    result: dict[str, Any] | None = row[0]
    return result


def stage_report(conn: psycopg.Connection[tuple[Any, ...]], report: ReportFile) -> None:
    """Copy the rows into the staging table while they are read. Raises FileRefused."""
    refused: list[RefusedEntry] = []
    with conn.cursor() as cursor, cursor.copy(STAGE_ROWS) as copy:
        for row in report.rows():
            match row:
                case ReportRow():
                    copy.write_row((
                        row.line, row.id, row.currency, row.gross_minor, row.fee_minor, row.net_minor, row.category,
                        row.at, row.payout_id, row.status, row.trace_id, row.arrival_on,
                    ))  # fmt: skip
                case RefusedEntry():
                    refused.append(row)
                    if len(refused) > REFUSALS_MAX:
                        raise FileRefused(f"more than {REFUSALS_MAX} rows break rules; is it the right file?")
    with conn.cursor() as cursor, cursor.copy(STAGE_REFUSALS) as copy:
        for one in refused:
            copy.write_row((one.place, one.field[:100], one.value.replace("\0", ""), one.rule, one.subject))
