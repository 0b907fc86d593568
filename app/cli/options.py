"""Options, and checks of them, that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import click
import psycopg

from db.errors import SuretyError

REASON_CHARACTERS_MAX = 1000
PERIOD = re.compile(r"([1-9][0-9]{0,6})([smhd])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
PERIOD_MAX = timedelta(days=90)


def require_text(_context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """The text of an option, None if it is absent. Raises SuretyError if it is blank, too long, or would control a
    terminal.
    """
    if text is None:
        return None
    option = parameter.opts[0]
    if not text.strip():
        raise SuretyError(f"{option} must say why" if option == "--reason" else f"{option} must not be blank")
    if len(text) > REASON_CHARACTERS_MAX:
        raise SuretyError(f"{option} must have at most {REASON_CHARACTERS_MAX} characters")
    if not text.isprintable():
        raise SuretyError(f"{option} must be one line without control characters")
    return text


def parse_period(_context: click.Context, parameter: click.Parameter, text: str | None) -> timedelta | None:
    """A period such as 90s, 15m, 24h or 7d; None if it is absent. Raises SuretyError for another text."""
    if text is None:
        return None
    found = PERIOD.fullmatch(text)
    period = timedelta(**{UNITS[found[2]]: int(found[1])}) if found else None
    if period is None or period > PERIOD_MAX:
        raise SuretyError(f"{parameter.opts[0]}: a number with s, m, h or d, such as 15m or 24h, at most 90d")
    return period


def require_merchant(conn: psycopg.Connection[Any], merchant_id: str, option: str = "") -> None:
    """Raises SuretyError for an unknown merchant, with the name of its option; an argument has none."""
    if conn.execute("select from surety.merchants where id = %s", (merchant_id,)).fetchone() is None:
        raise SuretyError(f"{option and option + ': '}there is no merchant {merchant_id}")


def require_currencies(conn: psycopg.Connection[Any], currencies: Iterable[str]) -> None:
    """Raises SuretyError for a currency that is not accepted."""
    accepted = [row[0] for row in conn.execute("select currency from surety.currencies order by currency")]
    for unknown in set(currencies).difference(accepted):
        raise SuretyError(f"--currency: {unknown} is not accepted; accepted are {', '.join(accepted)}")


def parse_instant(_context: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    """A time with its offset from UTC. Raises SuretyError."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise SuretyError(f"{parameter.opts[0]}: a time with its offset, such as 2027-01-01T00:00:00Z")


def time_option(option: str, name: str, text: str) -> Callable[[Any], Any]:
    """An option that takes a time."""
    return click.option(option, name, metavar="TIME", callback=parse_instant, help=text)


def parse_month(_context: click.Context, _parameter: click.Parameter, text: str | None) -> date | None:
    """The first day of the month. Raises SuretyError."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", text) or text.startswith("0000"):
        raise SuretyError("--month: a month such as 2027-01")
    return date.fromisoformat(f"{text}-01")


reason_option = click.option("--reason", required=True, callback=require_text, help="The reason, for the audit trail.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
