"""`surety merchants fees`: what a merchant pays us for a payment, and from when on."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, LiteralString

import click
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.money_limits import BIGINT_MAX
from app.cli.options import json_option, require_currencies, time_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

BASIS_POINTS_MAX = 10_000
LIST_RATES = """
    select
        %(merchant)s as merchant, currency, basis_points, fixed_minor, surety.format_time(effective_at) as effective_at,
        is_in_force, surety.format_time(withdrawn_at) as withdrawn_at
    from surety.list_fee_rates(%(merchant)s)
    where (%(currencies)s::text[] = '{}' or currency = any(%(currencies)s))
        and (%(with_past)s or (not is_past and withdrawn_at is null))
"""
RULES = {
    "fee_rates_pkey": (
        "--from: these fees change at this very time already, or did until that was withdrawn; choose another"
    ),
    "fee_rate_is_withdrawn_before_it_begins": (
        "--from: fees that have begun, or begin within a minute, can't be withdrawn; set others from later on"
    ),
    "fee_rate_begins_later_than_it_is_set": "--from must be a minute ahead or more, for payments to come",
    "fee_rate_is_below_the_smallest_amount": "--fixed-minor must be less than the smallest amount of a payment",
}


@click.command()
@click.argument("merchant_id", metavar="MERCHANT")
@click.option("--currency", "currencies", multiple=True, metavar="CODE", help="Only in this currency; default: in all.")
@click.option(
    "--basis-points", type=click.IntRange(0, BASIS_POINTS_MAX),
    help="Set the part of the amount: 290 is 2.9 %.",
)  # fmt: skip
@click.option(
    "--fixed-minor", type=click.IntRange(0, BIGINT_MAX),
    help="Set the fixed part, in minor units of the currencies, which --currency must name.",
)  # fmt: skip
@time_option(
    "--from", "effective_at", "When a change takes effect, such as 2027-01-01T00:00:00Z; default: in a minute."
)
@click.option("--withdraw", is_flag=True, help="Withdraw the change that takes effect at --from, before it does.")
@click.option("--all", "with_past", is_flag=True, help="Show the fees of the past and those withdrawn, too.")
@json_option
def fees(
    merchant_id: str,
    currencies: tuple[str, ...],
    basis_points: int | None,
    fixed_minor: int | None,
    effective_at: datetime | None,
    *,
    withdraw: bool,
    with_past: bool,
    as_json: bool,
) -> None:
    """Show a merchant's fees, or set them by --basis-points and --fixed-minor, or withdraw a change to come.

    A fee is amount × basis points / 10000, rounded to a minor unit (half to even), plus the fixed part, and at most
    the amount. It is taken when a payment is captured, by the rate that was in force when the payment was accepted. A
    change alters no payment that was accepted before it. One that has not begun can be withdrawn: the fees before it
    stay in force. Later changes keep the parts that they were shown with.
    """
    currencies = tuple(currency.lower() for currency in currencies)
    is_change = basis_points is not None or fixed_minor is not None
    if withdraw and (is_change or effective_at is None):
        raise SuretyError("--withdraw: give the time of the change by --from, and no other fees")
    if effective_at is not None and not is_change and not withdraw:
        raise SuretyError("--from: give --basis-points or --fixed-minor, which take effect then, or --withdraw")
    if fixed_minor is not None and not currencies:
        raise SuretyError("--fixed-minor: name the currencies of its minor units by --currency")
    changed, unchanged = None, "these fees are set already"
    if is_change:
        changed = set_rates(merchant_id, currencies, basis_points, fixed_minor, effective_at)
    elif withdraw:
        changed, unchanged = (
            withdraw_rates(merchant_id, currencies, effective_at), "this change of fees is withdrawn already"
        )  # fmt: skip
    found = read_rates(merchant_id, currencies, with_past=with_past)
    if not found:
        raise SuretyError(f"there is no merchant {merchant_id}")
    if as_json:
        click.echo(json.dumps(found))
        return
    if changed == 0:
        click.echo(f"{merchant_id}: {unchanged}")
    table = Table("currency", "basis points", "fixed", "in force", "since", box=None)
    print_table(
        table,
        (
            (
                *(each["currency"], each["basis_points"], each["fixed_minor"]),
                "withdrawn" if each["withdrawn_at"] else "yes" if each["is_in_force"] else "",
                each["effective_at"] or "the beginning",
            )
            for each in found
        ),
    )


def set_rates(
    merchant_id: str,
    currencies: tuple[str, ...],
    basis_points: int | None,
    fixed_minor: int | None,
    effective_at: datetime | None,
) -> int:
    """Set fees in these currencies, or in all; returns in how many they differ from those in force then.

    Raises SuretyError.
    """
    with connect("deploy", load_settings()) as conn:
        require_currencies(conn, currencies)
        by = authorize(conn, "merchants:write")
        query = "select surety.set_fee_rates(%s, %s, %s, %s, %s, %s)"
        asked = (merchant_id, currencies_or_all(conn, currencies), basis_points, fixed_minor, effective_at, by)
        return count_changed(conn, merchant_id, query, asked)


def withdraw_rates(merchant_id: str, currencies: tuple[str, ...], effective_at: datetime | None) -> int:
    """Withdraw the changes that begin at a time, in these currencies or in all; returns how many were not yet.

    Raises SuretyError.
    """
    with connect("deploy", load_settings()) as conn:
        require_currencies(conn, currencies)
        by = authorize(conn, "merchants:write")
        chosen = currencies_or_all(conn, currencies)
        known = conn.execute(
            "select from surety.fee_rates where merchant_id = %s and currency = any(%s) and effective_at = %s limit 1",
            (merchant_id, chosen, effective_at),
        ).fetchone()
        query = "select surety.withdraw_fee_rates(%s, %s, %s, %s)"
        withdrawn = count_changed(conn, merchant_id, query, (merchant_id, chosen, effective_at, by))
    if known is None:
        raise SuretyError(f"--from: no fees of {merchant_id} change then; `surety merchants fees` shows when they do")
    return withdrawn


def currencies_or_all(conn: psycopg.Connection[Any], currencies: tuple[str, ...]) -> list[str]:
    """The given currencies, each once, or all that are accepted."""
    return sorted(set(currencies)) or [row[0] for row in conn.execute("select currency from surety.currencies")]


def count_changed(conn: psycopg.Connection[Any], merchant_id: str, query: LiteralString, asked: tuple[Any, ...]) -> int:
    """The number that a function of fees returns. Raises SuretyError."""
    try:
        row = conn.execute(query, asked).fetchone()
    except psycopg.errors.IntegrityError as error:
        raise SuretyError(RULES.get(error.diag.constraint_name or "", str(error))) from None
    if row is None or row[0] is None:
        raise SuretyError(f"there is no merchant {merchant_id}")
    return int(row[0])


@reads
def read_rates(merchant_id: str, currencies: tuple[str, ...], *, with_past: bool) -> list[dict[str, Any]]:
    """The merchant's rates in force and those to come, by currency and time. Raises SuretyError."""
    chosen = {"merchant": merchant_id, "currencies": list(currencies), "with_past": with_past}
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        require_currencies(conn, currencies)
        return cursor.execute(LIST_RATES, chosen).fetchall()
