"""`surety statement`: what changed a merchant's balance in a month."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import IO

import click

from app.cli.options import parse_month
from app.cli.reading import connect_to_read, reads
from app.statements.formats import write_csv, write_json
from app.statements.pdf import write_pdf
from app.statements.statement import read_statement, read_statement_lines
from db.errors import SuretyError

FORMATS = ("csv", "json", "pdf")
# A statement of usual size never touches the disk.
MEMORY_BYTES_MAX = 16 * 2**20


@click.command()
@click.option("--merchant", "merchant_id", metavar="MERCHANT", required=True, help="Whose statement.")
@click.option("--month", metavar="YYYY-MM", required=True, callback=parse_month, help="Of which month, by UTC.")
@click.option(
    "--format", "format_name", type=click.Choice(FORMATS),
    help="csv (amounts in major units), json (in minor units) or pdf; default: by the file's ending, else csv.",
)  # fmt: skip
@click.option(
    "--output", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Write this file, which appears when it is complete; default: standard output.",
)  # fmt: skip
def statement(merchant_id: str, month: date, format_name: str | None, output: Path | None) -> None:
    """Write a merchant's statement of a month: opening balances, a line for each booking, closing balances.

    The lines lead from the opening to the closing balances to the minor unit, in each currency, or nothing is written.
    The statement of a closed month never changes. A booking whose record is of an earlier month names that month.
    """
    ending = output.suffix[1:].lower() if output is not None else ""
    chosen = format_name or (ending if ending in FORMATS else "csv")
    if chosen == "pdf" and output is None and sys.stdout.isatty():
        raise SuretyError("--output: a PDF needs a file")
    with tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES_MAX) as file:
        write_statement(merchant_id, month, chosen, file)
        file.seek(0)
        if output is None:
            shutil.copyfileobj(file, sys.stdout.buffer)
        else:
            replace_file(output, file)


@reads
def write_statement(merchant_id: str, month: date, format_name: str, file: IO[bytes]) -> None:
    """Write the statement, from one snapshot of the database, over what the file holds. Raises SuretyError."""
    file.seek(0)
    file.truncate()
    with connect_to_read() as conn, conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        head = read_statement(conn, merchant_id, month)
        lines = read_statement_lines(conn, head)
        if format_name == "pdf":
            write_pdf(head, lines, file)
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        try:
            (write_csv if format_name == "csv" else write_json)(head, lines, text)
        finally:
            # Flushed, and the file stays open.
            text.detach()


def replace_file(path: Path, content: IO[bytes]) -> None:
    """Write a file beside it, then put it in its place. Raises SuretyError."""
    part: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            part = Path(file.name)
            shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise SuretyError(f"--output: {path} can't be written ({error.strerror})") from None
