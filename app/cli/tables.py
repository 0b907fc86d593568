"""Tables for people, and whole for programs that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH_OF_A_PIPE = 500


def wide_console() -> Console:
    """stdout; nothing is cut off or wrapped where nobody looks."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_PIPE
    return console


def show(table: Table, rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under the table's columns."""
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    wide_console().print(table)
