"""Tables for terminals, and unwrapped for programs that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 500


def wide_console() -> Console:
    """stdout; outside a terminal, lines are neither cut nor wrapped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def print_table(table: Table, rows: Iterable[Iterable[Any]]) -> None:
    """Print rows under the table's columns."""
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    wide_console().print(table)
