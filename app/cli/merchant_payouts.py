"""`surety merchant-payouts`: payouts of what we owe merchants. The provider's payouts to us are in payouts.py."""

from __future__ import annotations

import json
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.money_limits import BIGINT_MAX
from app.cli.options import json_option, reason_option, require_currencies, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

STATES = ("asked", "left", "returned", "canceled")
SCHEDULES = ("manual", "daily", "weekly", "monthly")
LISTED_MAX = 1000
SCOPE = "merchant-payouts:write"
PROOF_CHARACTERS_MAX = 200
RULES = {
    "merchant_payout_reserve_has_days": "--reserve-basis-points and --reserve-days: give both, or 0 for both",
    "proof_is_of_one_merchant_payout": "--proof: another payout has this proof already",
}
SHOWN = """
    select
        k.id, k.merchant_id as merchant, k.state, k.amount_minor as amount, k.currency,
        surety.format_amount(k.amount_minor, k.currency) as text, k.schedule, k.period_begins::text,
        surety.format_time(k.created_at) as created_at, k.created_by, surety.format_time(k.sent_at) as sent_at, k.proof,
        surety.format_time(k.ended_at) as ended_at, k.reason
    from surety.merchant_payouts as k
"""
OWED = """
    select
        m.id as merchant, a.currency, coalesce(t.schedule, 'manual') as schedule, o.available_minor as available,
        o.reserve_minor as reserve, o.minimum_minor as minimum, o.amount_minor as amount,
        coalesce(t.reserve_basis_points, 0) as reserve_basis_points, coalesce(t.reserve_days, 0) as reserve_days,
        surety.format_amount(o.amount_minor, a.currency) as text,
        surety.format_amount(o.available_minor, a.currency) as available_text
    from surety.merchants as m
    cross join surety.currencies as a
    left join ledger.balances as b on b.account_id = 'available:' || m.id || ':' || a.currency
    left join surety.merchant_payout_terms as t on t.merchant_id = m.id and t.currency = a.currency
    cross join lateral surety.offer_merchant_payout(m.id, a.currency, surety.read_clock()) as o
    where m.provider_account = '' and (%(merchant)s::text is null or m.id = %(merchant)s)
        and (b.balance_minor <> 0 or t.merchant_id is not null)
    order by m.id, a.currency
"""


class NoSuchMerchantPayout(SuretyError):
    """No payout to a merchant has this id."""

    def __init__(self, payout_id: str) -> None:
        super().__init__(
            f"ID: there is no payout {payout_id} to a merchant; `surety merchant-payouts list` shows their ids"
        )


@click.group("merchant-payouts")
def merchant_payouts() -> None:
    """Payouts of what merchants are owed: show, create, list, mark as sent, returned or canceled.

    Surety reserves and books the money; the transfer itself is yours to make. Workers create the payouts of schedules.
    """


@merchant_payouts.command("owed")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Only of one merchant.")
@json_option
@reads
def print_owed(merchant_id: str | None, as_json: bool) -> None:
    """Show by merchant and currency what could be paid out now, with the terms. Negative balances are owed to us."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        found = cursor.execute(OWED, {"merchant": merchant_id}).fetchall()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("merchant", "available", "reserve", "minimum", "payable now", "schedule", box=None)
    rows = [
        (each["merchant"], each["available_text"], each["reserve"], each["minimum"], each["text"], each["schedule"])
        for each in found
    ]
    if rows:
        print_table(table, rows)
    else:
        click.echo("nothing is owed")


@merchant_payouts.command("terms")
@click.argument("merchant_id", metavar="MERCHANT")
@click.option("--currency", "currencies", multiple=True, required=True, metavar="CODE", help="In this currency.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="When workers pay out; manual: never by themselves.")
@click.option("--minimum", type=click.IntRange(1, BIGINT_MAX), help="The smallest payout, in minor units.")
@click.option("--reserve-basis-points", type=click.IntRange(0, 10_000), help="The part that stays: 500 is 5 %.")
@click.option("--reserve-days", type=click.IntRange(0, 365), help="Of the money settled within so many days.")
def set_terms(
    merchant_id: str,
    currencies: tuple[str, ...],
    schedule: str | None,
    minimum: int | None,
    reserve_basis_points: int | None,
    reserve_days: int | None,
) -> None:
    """Set when a merchant is paid out, and how much stays here. A part that is not named stays as it is."""
    if (schedule, minimum, reserve_basis_points, reserve_days) == (None, None, None, None):
        raise SuretyError("give --schedule, --minimum, or --reserve-basis-points and --reserve-days")
    chosen = sorted({currency.lower() for currency in currencies})
    with connect("deploy", load_settings()) as conn:
        require_currencies(conn, chosen)
        by = authorize(conn, SCOPE)
        row = call(
            conn,
            "select surety.set_merchant_payout_terms(%s, %s, %s, %s, %s, %s, %s)",
            (merchant_id, chosen, schedule, minimum, reserve_basis_points, reserve_days, by),
        )
    if row[0] is None:
        raise SuretyError(f"there is no merchant {merchant_id}")
    click.echo(f"{merchant_id}: " + ("terms are set" if row[0] else "these terms are set already"))


@merchant_payouts.command("create")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Of this merchant now, whatever its schedule.")
@click.option("--currency", metavar="CODE", help="In this currency; needs --merchant.")
@json_option
def create_payouts(merchant_id: str | None, currency: str | None, as_json: bool) -> None:
    """Create the payouts that schedules ask for, or one by hand with --merchant and --currency.

    A merchant gets at most one payout for each period of its schedule and one by hand in a day, in each currency, so a
    repetition pays nothing twice.
    """
    if (merchant_id is None) != (currency is None):
        raise SuretyError("--merchant and --currency: give both, or neither for all payouts that are due")
    if merchant_id is not None and currency is not None:
        created = create_by_hand(merchant_id, currency.lower())
        text = f"{created['id']}: {created['amount']} minor units are reserved"
        text += "" if created["created"] else "; it was created before"
        click.echo(json.dumps(created) if as_json else text)
        return
    count = 0
    with connect("deploy", load_settings()) as conn:
        by = f"operator:{authorize(conn, SCOPE)}"
        while made := call(conn, "select surety.create_due_merchant_payouts(%s)", (by,))[0]:
            count += made
    click.echo(json.dumps({"created": count}) if as_json else f"{count} payouts created")


def create_by_hand(merchant_id: str, currency: str) -> dict[str, Any]:
    """Pay one merchant out now: the payout, and whether it was created now. Raises SuretyError, which says why not."""
    with connect("deploy", load_settings()) as conn:
        require_currencies(conn, (currency,))
        by = f"operator:{authorize(conn, SCOPE)}"
        query = "select outcome, payout_id, amount_minor from surety.create_merchant_payout(%s, %s, 'manual', %s)"
        outcome, payout_id, amount = call(conn, query, (merchant_id, currency, by))
    match outcome:
        case "created" | "exists":
            return {"id": payout_id, "amount": amount, "created": outcome == "created"}
        case "no_merchant":
            raise SuretyError(f"--merchant: there is no merchant {merchant_id}")
        case "own_account":
            raise SuretyError(f"{merchant_id}: its money is on its own account at the provider, so we owe it nothing")
        case "suspended":
            raise SuretyError(f"{merchant_id} is suspended; `surety merchants resume` ends that")
        case "negative":
            raise SuretyError(f"{merchant_id}: its balance is {amount} minor units: it owes us")
        case "below_minimum":
            raise SuretyError(f"{merchant_id}: {amount} minor units can be paid out, less than its minimum")
    raise AssertionError(outcome)


@merchant_payouts.command("list")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Only of one merchant.")
@click.option("--state", type=click.Choice(STATES), help="Only in this state; asked are those to be sent.")
@json_option
@reads
def list_merchant_payouts(merchant_id: str | None, state: str | None, as_json: bool) -> None:
    """List payouts to merchants, the newest first; at most a thousand."""
    with connect_to_read() as conn:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
    condition = (
        "where (%s::text is null or k.merchant_id = %s) and (%s::text is null or k.state = %s)"
        f" order by k.id desc limit {LISTED_MAX}"
    )
    found = read_merchant_payouts(condition, merchant_id, merchant_id, state, state)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("id", "merchant", "amount", "state", "created", "proof or reason", box=None)
    rows = [
        (
            *(each["id"], each["merchant"], each["text"], each["state"], each["created_at"]),
            each["reason"] or each["proof"],
        )
        for each in found
    ]
    if rows:
        print_table(table, rows)
    else:
        click.echo("no payouts to merchants")


@merchant_payouts.command("show")
@click.argument("payout_id", metavar="ID")
@json_option
def show_merchant_payout(payout_id: str, as_json: bool) -> None:
    """Show a payout to a merchant."""
    found = read_merchant_payouts("where k.id = %s", payout_id)
    if not found:
        raise NoSuchMerchantPayout(payout_id)
    [shown] = found
    if as_json:
        click.echo(json.dumps(shown))
        return
    for name in ("id", "merchant", "state", "text", "schedule", "period_begins", "created_at", "created_by"):
        click.echo(f"{name.replace('_', ' ').replace('text', 'amount'):<14} {shown[name]}")
    for name in ("sent_at", "proof", "ended_at", "reason"):
        if shown[name]:
            click.echo(f"{name.replace('_', ' '):<14} {shown[name]}")


@merchant_payouts.command("sent")
@click.argument("payout_id", metavar="ID")
@click.option("--proof", required=True, help="What proves the transfer, such as the bank's reference.")
def mark_sent(payout_id: str, proof: str) -> None:
    """Mark a payout as left: you have made its transfer."""
    if not proof.strip() or len(proof) > PROOF_CHARACTERS_MAX or not proof.isprintable():
        raise SuretyError(f"--proof must be one line of 1 to {PROOF_CHARACTERS_MAX} characters")
    move_payout(payout_id, "left", proof, None)


@merchant_payouts.command("returned")
@click.argument("payout_id", metavar="ID")
@reason_option
def mark_returned(payout_id: str, reason: str) -> None:
    """Mark a payout that has left as returned: its amount is available again, for the next one."""
    move_payout(payout_id, "returned", None, reason)


@merchant_payouts.command("cancel")
@click.argument("payout_id", metavar="ID")
@reason_option
def cancel_merchant_payout(payout_id: str, reason: str) -> None:
    """Cancel a payout whose transfer was not made. Make sure that it will not be made."""
    move_payout(payout_id, "canceled", None, reason)


def move_payout(payout_id: str, state: str, proof: str | None, reason: str | None) -> None:
    """Bring a payout into a state. Raises SuretyError if its present one does not lead there."""
    with connect("deploy", load_settings()) as conn:
        by = f"operator:{authorize(conn, SCOPE)}"
        query = "select outcome, state from surety.move_merchant_payout(%s, %s, %s, %s, %s)"
        outcome, present = call(conn, query, (payout_id, state, proof, reason, by))
    match outcome:
        case "not_found":
            raise NoSuchMerchantPayout(payout_id)
        case "refused":
            raise SuretyError(f"{payout_id} is {present}, which can't become {state}")
        case "changed":
            click.echo(f"{payout_id} is {state}")
        case "unchanged":
            click.echo(f"{payout_id} is {state} already")
        case _:
            raise AssertionError(outcome)


def call(conn: psycopg.Connection[Any], query: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The row that a function returns. Raises SuretyError for a value that breaks a rule."""
    try:
        row = conn.execute(query.encode(), values).fetchone()
    except psycopg.errors.IntegrityError as error:
        rule = RULES.get(error.diag.constraint_name or "")
        if rule is None:
            raise
        raise SuretyError(rule) from None
    assert row is not None
    return tuple(row)


@reads
def read_merchant_payouts(condition: str, *values: Any) -> list[dict[str, Any]]:
    """The payouts that meet a condition."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"{SHOWN} {condition}".encode(), values).fetchall()
