"""`surety holds`: payments that wait for an operator, because of a velocity rule."""

from __future__ import annotations

import json
from typing import Any, Literal

import click
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, reason_option, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.cli.velocity import describe_period
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

SHOW_HOLDS = """
select shown.document
from surety.find_holds(%s, %s, null, %s) as found cross join lateral surety.show_payment_hold(found) as shown
order by found.opened_at, found.payment_id
"""
SHOW_HOLD = """
select shown.document
from surety.payment_holds as found cross join lateral surety.show_payment_hold(found) as shown
where found.payment_id = %s
"""
LISTED_MAX = 1000


class NoSuchHold(SuretyError):
    """No payment on hold has this id."""

    def __init__(self, payment_id: str) -> None:
        super().__init__(f"PAYMENT: no payment on hold has the id {payment_id}; `surety holds list` shows them")


@click.group()
def holds() -> None:
    """Payments on hold: list, show, release or refuse them. Nothing is sent to the provider before a release."""


@holds.command("list")
@click.option("--closed", is_flag=True, help="Those that have ended, too.")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Only those of one merchant.")
@json_option
@reads
def print_holds(closed: bool, merchant_id: str | None, as_json: bool) -> None:
    """List payments on hold, the oldest first; at most a thousand."""
    with connect_to_read() as conn:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        rows = conn.execute(SHOW_HOLDS, (None if closed else "open", merchant_id, LISTED_MAX)).fetchall()
    found = [row[0] for row in rows]
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("payment", "merchant", "amount", "rule", "since", "until", "status", box=None)
    shown = [
        (
            *(each["id"], each["payment"]["merchant"], each["payment"]["text"], each["rule"]),
            *(each["opened_at"], each["expires_at"], each["status"]),
        )
        for each in found
    ]
    if shown:
        print_table(table, shown)
    else:
        click.echo("no holds" if closed else "no payment is on hold")


@holds.command("show")
@click.argument("payment_id", metavar="PAYMENT")
@json_option
@reads
def show_hold(payment_id: str, as_json: bool) -> None:
    """Show a hold: the rule, what it found, the payment, and how the hold ended."""
    with connect_to_read() as conn:
        row = conn.execute(SHOW_HOLD, (payment_id,)).fetchone()
    if row is None:
        raise NoSuchHold(payment_id)
    shown: dict[str, Any] = row[0]
    if as_json:
        click.echo(json.dumps(shown))
        return
    detail, payment, closed = shown["detail"], shown["payment"], shown["closed"]
    click.echo(f"{shown['id']}  {shown['status']}")
    click.echo(f"payment   {payment['text']} of {payment['merchant']}, {payment['state']}")
    currency = f" in {detail['currency']}" if detail["currency"] else ""
    what = "payments" if detail["exceeded"] == "count" else "minor units"
    click.echo(
        f"rule      {shown['rule']}: more than {detail['maximum']} {what}{currency} of one {detail['subject']}"
        f" within {describe_period(detail['period_seconds'])}"
    )
    end = "" if closed else f", canceled at {shown['expires_at']} without a decision"
    click.echo(f"since     {shown['opened_at']}{end}")
    if closed:
        click.echo(
            f"closed    {closed['at']} by {closed['by']}" + (f": {closed['because']}" if closed["because"] else "")
        )


@holds.command("release")
@click.argument("payment_id", metavar="PAYMENT")
@reason_option
def release_payment(payment_id: str, reason: str) -> None:
    """Release a payment: it is sent to the provider."""
    apply_hold_decision(payment_id, "released", reason)


@holds.command("refuse")
@click.argument("payment_id", metavar="PAYMENT")
@reason_option
def refuse_payment(payment_id: str, reason: str) -> None:
    """Refuse a payment: it ends as failed, and nothing is charged."""
    apply_hold_decision(payment_id, "refused", reason)


def apply_hold_decision(payment_id: str, decision: Literal["released", "refused"], reason: str) -> None:
    """Release or refuse one payment. Raises SuretyError if its hold has ended otherwise."""
    with connect("deploy", load_settings()) as conn:
        by = f"operator:{authorize(conn, 'holds:decide')}"
        row = conn.execute(
            "select outcome, detail from surety.decide_hold(%s, %s, %s, %s)", (payment_id, decision, by, reason)
        ).fetchone()
    assert row is not None
    outcome, detail = row
    match outcome:
        case "not_found":
            raise NoSuchHold(payment_id)
        case "ended":
            raise SuretyError(f"{payment_id}: {detail}")
    click.echo(f"{payment_id}: {detail}")
