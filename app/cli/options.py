"""Options that several commands share."""

from __future__ import annotations

import click

from db.errors import SuretyError


def require_text(_context: click.Context, _parameter: click.Parameter, reason: str) -> str:
    """The reason. Raises SuretyError if it is blank."""
    if not reason.strip():
        raise SuretyError("--reason must say why")
    return reason


reason_option = click.option("--reason", required=True, callback=require_text, help="The reason, for the audit trail.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
