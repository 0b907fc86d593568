"""`surety merchants limits` and `surety keys limits`: requests per second, and at once after a pause."""

from __future__ import annotations

import json
from typing import Any

import click
import psycopg

from app.cli.identity import authorize
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

RATE_MAX = 1_000_000
BURST_SECONDS = 2
DEFAULTS = {"keys": "all merchants' keys", "merchants": "all merchants", "operator-keys": "all operators' keys"}

rate_option = click.option(
    "--requests-per-second", "rate", type=click.IntRange(1, RATE_MAX), help="Requests per second, on average."
)
burst_option = click.option(
    "--burst", type=click.IntRange(1, RATE_MAX), help="Requests at once after a pause; default: those of two seconds."
)
unlimited_option = click.option("--unlimited", is_flag=True, help="No limit.")
default_option = click.option("--default", "is_default", is_flag=True, help="No limit of its own: the default applies.")


@click.command(name="limits")
@click.argument("merchant_id", required=False)
@rate_option
@burst_option
@unlimited_option
@default_option
@json_option
def merchant_limits(merchant_id: str | None, *, as_json: bool, **given: Any) -> None:
    """Show or set the rate limit of a merchant, which all its keys share; without MERCHANT_ID, of all merchants.

    A new limit acts within about a second on running processes.
    """
    show_or_set(
        "merchants" if merchant_id is None else one_of(merchant_id, "merchant"), "merchants", as_json=as_json, **given
    )


@click.command(name="limits")
@click.argument("key_id", required=False)
@click.option("--operators", is_flag=True, help="Without KEY_ID: of all operators' keys.")
@rate_option
@burst_option
@unlimited_option
@default_option
@json_option
def key_limits(key_id: str | None, *, operators: bool, as_json: bool, **given: Any) -> None:
    """Show or set the rate limit of a key; without KEY_ID, of all merchants' keys.

    A new limit acts within about a second on running processes.
    """
    if operators and key_id is not None:
        raise SuretyError("--operators is for all operators' keys: leave KEY_ID out")
    all_keys = "operator-keys" if operators else "keys"
    show_or_set(all_keys if key_id is None else one_of(key_id, "key"), "keys", as_json=as_json, **given)


def one_of(subject: str, kind: str) -> str:
    """An id that was given. Raises SuretyError for a name that stands for all, which an argument must not be."""
    if subject in DEFAULTS:
        raise SuretyError(f"there is no {kind} {subject}")
    return subject


def show_or_set(
    subject: str, kind: str, *, rate: int | None, burst: int | None, unlimited: bool, is_default: bool, as_json: bool
) -> None:
    """Set the limit if one is given, and print the one that applies. Raises SuretyError."""
    if [rate is not None, unlimited, is_default].count(True) > 1:
        raise SuretyError("give one of --requests-per-second, --unlimited and --default")
    if burst is not None and rate is None:
        raise SuretyError("--burst needs --requests-per-second")
    if is_default and subject in DEFAULTS:
        raise SuretyError(f"--default: give the id of one of the {kind}; this is the default itself")
    if rate is not None or unlimited or is_default:
        if rate is not None and burst is None:
            burst = min(RATE_MAX, BURST_SECONDS * rate)
        set_limit(subject, kind, (None, None) if is_default else (0, 0) if unlimited else (rate, burst))
    shown_rate, shown_burst, applies_by_default = read_limit(subject, kind)
    if as_json:
        print_limit_as_json(subject, shown_rate, shown_burst, applies_by_default=applies_by_default)
        return
    text = describe_rate_limit(shown_rate, shown_burst, is_default=applies_by_default and subject not in DEFAULTS)
    click.echo(f"{DEFAULTS.get(subject, subject)}: {text}")


def set_limit(subject: str, kind: str, limit: tuple[int | None, int | None]) -> None:
    """Set requests per second and burst; 0 is no limit, None that of the default."""
    with connect("deploy", load_settings()) as conn:
        default = find_default(conn, subject, kind)
        scope = {"merchants": "merchants:write", "keys": "keys:write", "operator-keys": "operators:write"}
        by = authorize(conn, scope[default])
        conn.execute("select surety.set_rate_limit(%s, %s::integer, %s::integer, %s)", (subject, *limit, by))


@reads
def read_limit(subject: str, kind: str) -> tuple[int, int, bool]:
    """Requests per second and burst that apply, and whether by default. Raises SuretyError for an unknown subject."""
    with connect_to_read() as conn:
        default = find_default(conn, subject, kind)
        row = conn.execute("select * from surety.find_rate_limit(%s, %s)", (subject, default)).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def find_default(conn: psycopg.Connection[tuple[Any, ...]], subject: str, kind: str) -> str:
    """The subject whose limit is the default. Raises SuretyError for an unknown merchant or key."""
    if subject in DEFAULTS:
        return subject
    row = conn.execute(
        "select found.kind from (select id, 'merchants' as kind from surety.merchants"
        " union all select id, 'keys' from surety.api_keys"
        " union all select id, 'operator-keys' from surety.operator_keys) as found where found.id = %s",
        (subject,),
    ).fetchone()
    if row is None or (row[0] == "merchants") != (kind == "merchants"):
        raise SuretyError(f"there is no {'merchant' if kind == 'merchants' else 'key'} {subject}")
    found: str = row[0]
    return found


def print_limit_as_json(subject: str, rate: int, burst: int, *, applies_by_default: bool) -> None:
    """The limit as an object; null is no limit."""
    shown = {"subject": subject, "requests_per_second": rate or None, "burst": burst or None}
    click.echo(json.dumps(shown | {"is_default": applies_by_default}))


def describe_rate_limit(rate: int | None, burst: int | None, *, is_default: bool) -> str:
    """100 a second, 200 at once (default); unlimited."""
    return (f"{rate} a second, {burst} at once" if rate else "unlimited") + (" (default)" if is_default else "")
