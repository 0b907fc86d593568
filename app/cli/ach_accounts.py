"""`surety ach accounts`: customers' bank accounts. A number is typed in or piped in, and never shown."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import click
import msgspec
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from rich.table import Table

from app.api.mandates import mandate_violations
from app.cli.identity import authorize
from app.cli.options import json_option, reason_option, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.account_numbers import AccountKeys, check_account_number, last_four, new_account_key
from db.connect import connect
from db.errors import SuretyError
from db.formats.nacha.codes import is_routing_number
from db.settings import load_settings

SCOPE = "payer-accounts:write"
ROTATED_AT_ONCE = 500
LIST_ACCOUNTS = """
    select
        b.id, b.merchant_id as merchant, b.customer_id as customer, b.routing_number, b.account_type, b.holder_type,
        b.last4, b.key_id, b.validation, b.validation_method, b.version, b.mandate,
        surety.payer_account_obstacle(b, 'WEB') as web_debit_obstacle,
        surety.format_time(b.validation_changed_at) as validation_changed_at,
        surety.format_time(b.created_at) as created_at, surety.format_time(b.mandate_revoked_at) as mandate_revoked_at,
        surety.format_time(b.removed_at) as removed_at
    from surety.payer_accounts as b
"""


@click.group()
def accounts() -> None:
    """Customers' bank accounts: add, list, show, validate, revoke, remove; rotate the keys of their numbers."""


@accounts.command("list")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Only of this merchant.")
@click.option("--customer", "customer_id", metavar="CUSTOMER", help="Only of this customer.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
@reads
def list_payer_accounts(merchant_id: str | None, customer_id: str | None, limit: int, as_json: bool) -> None:
    """List accounts, the newest first."""
    where = " where (%s::text is null or b.merchant_id = %s) and (%s::text is null or b.customer_id = %s)"
    query = f"{LIST_ACCOUNTS}{where} order by b.id desc limit %s"
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        values = (merchant_id, merchant_id, customer_id, customer_id, limit)
        found = [without_mandate(each) for each in cursor.execute(query.encode(), values).fetchall()]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo("no bank accounts")
        return
    table = Table("id", "customer", "routing", "account", "type", "validation", "web debits", box=None)
    rows = (
        (each["id"], each["customer"], each["routing_number"], f"…{each['last4']}", each["account_type"],
         each["validation"], each["web_debit_obstacle"] or "possible")
        for each in found
    )  # fmt: skip
    print_table(table, rows)


def without_mandate(account: dict[str, Any]) -> dict[str, Any]:
    """An account as lists show it."""
    return {name: value for name, value in account.items() if name != "mandate"}


@accounts.command("show")
@click.argument("account_id", metavar="ID")
@json_option
@reads
def show_payer_account(account_id: str, as_json: bool) -> None:
    """Show an account and its mandate."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(f"{LIST_ACCOUNTS} where b.id = %s".encode(), (account_id,)).fetchone()
    if found is None:
        raise no_account(account_id)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in (found | {"last4": f"…{found['last4']}", "mandate": json.dumps(found["mandate"])}).items():
        if value is not None:
            click.echo(f"{name:<22} {value}")


@accounts.command("add")
@click.option("--customer", "customer_id", metavar="CUSTOMER", required=True, help="Whose account it is.")
@click.option("--routing", metavar="NUMBER", required=True, help="The bank's routing number, nine digits.")
@click.option(
    "--type", "account_type", type=click.Choice(("checking", "savings")), required=True, help="The kind of account."
)
@click.option(
    "--holder-type", type=click.Choice(("individual", "company")), required=True, help="Whose account it is in law."
)
@click.option("--holder-name", metavar="NAME", help="The name of the account's holder.")
@click.option("--accepted-at", metavar="TIME", required=True, help="When the payer agreed: 2026-12-01T09:00:00Z.")
@click.option("--ip-address", metavar="ADDRESS", required=True, help="From where.")
@click.option("--mandate-text", metavar="TEXT", required=True, help="To which text.")
def add_payer_account(
    customer_id: str, routing: str, account_type: str, holder_type: str, holder_name: str | None, accepted_at: str,
    ip_address: str, mandate_text: str,
) -> None:  # fmt: skip
    """Add an account; prints its id. The number is asked for, or read from standard input."""
    if not is_routing_number(routing):
        raise SuretyError("--routing: must have nine digits, of which the last is the check digit of the others")
    require_instant(accepted_at)
    mandate = {"accepted_at": accepted_at, "ip_address": ip_address, "text": mandate_text}
    for violation in mandate_violations(mandate):
        raise SuretyError(violation.message)
    if not 1 <= len(mandate_text.strip()) <= 5000:
        raise SuretyError("--mandate-text: must have 1 to 5000 characters")
    keys = account_keys()
    number = ask_for_number()
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, SCOPE)
        merchant = conn.execute("select merchant_id from surety.customers where id = %s", (customer_id,)).fetchone()
        row = conn.execute("select surety.new_id('bac', surety.time_now())").fetchone()
        assert row is not None
        account_id = row[0]
        added = merchant and conn.execute(
            "select id, is_new from surety.add_payer_account(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                account_id, merchant[0], customer_id, routing, account_type, holder_type, holder_name,
                last_four(number), keys.seal(number, account_id), keys.first, keys.fingerprints(routing, number),
                Jsonb(mandate), by,
            ),
        ).fetchone()  # fmt: skip
    if not added:
        raise SuretyError(f"--customer: there is no customer {customer_id}, or it was erased")
    if not added[1]:
        raise SuretyError(f"the customer has this account already: {added[0]}")
    click.echo(added[0])


def require_instant(text: str) -> None:
    """Raises SuretyError unless a text is a time of RFC 3339."""
    try:
        instant = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        instant = None
    if instant is None or instant.tzinfo is None:
        raise SuretyError("--accepted-at: must be a time with its offset, such as 2026-12-01T09:00:00Z")


def ask_for_number() -> str:
    """The account number, asked for twice on a terminal. Raises SuretyError without showing it."""
    if sys.stdin.isatty():
        number = str(click.prompt("Account number", hide_input=True, confirmation_prompt=True))
    else:
        number = sys.stdin.readline(200)
    if broken := check_account_number(number.strip()):
        raise SuretyError(f"the account number {broken}")
    return number.strip()


@accounts.command("validate")
@click.argument("account_id", metavar="ID")
@click.option(
    "--result", type=click.Choice(("pending", "validated", "failed")), required=True, help="What the validation found."
)
@click.option(
    "--method",
    type=click.Choice(("prenote", "micro_entries", "account_check", "statement")),
    required=True,
    help="How the account was validated.",
)
@click.option("--version", type=click.IntRange(1), required=True, help="The account's version that was validated.")
@reason_option
def validate_account(account_id: str, result: str, method: str, version: int, reason: str) -> None:
    """Record the validation of an account. It holds until the account changes."""
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, SCOPE)
        query = "select surety.record_validation(%s, %s, %s, %s, %s, %s)"
        done = conn.execute(query, (account_id, result, method, version, reason, by)).fetchone()
    if not done or not done[0]:
        raise SuretyError(
            f"ID: there is no account {account_id} of version {version}, or it was removed; `surety ach accounts show"
            f" {account_id}` shows its version"
        )
    click.echo(f"{account_id} is {result}")


@accounts.command("revoke")
@click.argument("account_id", metavar="ID")
@reason_option
def revoke_account_mandate(account_id: str, reason: str) -> None:
    """Revoke the mandate of an account: no entry may name it any more."""
    end_account("surety.revoke_mandate", account_id, reason, "the mandate of {} is revoked")


@accounts.command("remove")
@click.argument("account_id", metavar="ID")
@reason_option
def remove_account(account_id: str, reason: str) -> None:
    """Remove an account and revoke its mandate."""
    end_account("surety.remove_payer_account", account_id, reason, "{} is removed")


def end_account(function: str, account_id: str, reason: str, done: str) -> None:
    """Call a function that ends something of an account; doing it twice is no error."""
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, SCOPE)
        row = conn.execute(f"select {function}(%s, %s, %s)".encode(), (account_id, reason, by)).fetchone()
    if row is not None and row[0] is False:
        raise no_account(account_id)
    click.echo(done.format(account_id))


@accounts.command("new-key")
@click.argument("name", metavar="NAME")
def print_account_key(name: str) -> None:
    """Print a new key for SURETY_ACCOUNT_KEYS; it is stored nowhere."""
    click.echo(new_account_key(name))


@accounts.command("rotate")
def rotate_account_keys() -> None:
    """Encrypt all numbers by the first key of SURETY_ACCOUNT_KEYS. It may be interrupted and repeated."""
    keys, count = account_keys(), 0
    with connect("deploy", load_settings()) as conn:
        authorize(conn, SCOPE)
        after = ""
        while True:
            page = conn.execute(
                "select id, routing_number, sealed_number, key_id from surety.payer_accounts"
                " where key_id <> %s and id > %s order by id limit %s",
                (keys.first, after, ROTATED_AT_ONCE),
            ).fetchall()
            if not page:
                break
            for account_id, routing, sealed, key_id in page:
                number = keys.open(bytes(sealed), key_id, account_id)
                query = "select surety.reseal_payer_account(%s, %s, %s, %s, %s)"
                values = (sealed, keys.seal(number, account_id), keys.first, keys.fingerprints(routing, number)[0])
                row = conn.execute(query, (account_id, *values)).fetchone()
                count += bool(row and row[0])
            after = page[-1][0]
        left = conn.execute("select count(*) from surety.payer_accounts where key_id <> %s", (keys.first,)).fetchone()
    assert left is not None
    click.echo(f"{count} numbers are encrypted by {keys.first}; {left[0]} by another key")


def account_keys() -> AccountKeys:
    """The keys of the environment. Raises SettingsError."""
    return AccountKeys(load_settings().require("surety_account_keys"))


def no_account(account_id: str) -> SuretyError:
    """The error about an unknown account."""
    return SuretyError(f"ID: there is no bank account {account_id}; `surety ach accounts list` shows their ids")
