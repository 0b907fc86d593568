"""`surety customers`: merchants' customers and payers."""

from __future__ import annotations

import click

from app.cli.erasures import erase


@click.group()
def customers() -> None:
    """Erase a payer's data."""


customers.add_command(erase)
