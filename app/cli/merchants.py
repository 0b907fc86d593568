"""`surety merchants`: the businesses that receive payments. Each change is audited with the user's name."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import click
import msgspec
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.fees import fees
from app.cli.identity import authorize
from app.cli.limits import describe_rate_limit, merchant_limits
from app.cli.money_limits import money_limits
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.wording import describe_mode
from db.connect import connect
from db.errors import SuretyError
from db.settings import Settings, load_settings

ACCOUNT_ID = re.compile(r"acct_[0-9A-Za-z_]{1,200}")
CHECK_SECONDS_MAX = 60
PLATFORM = "platform"
LIST_MERCHANTS = """
    select
        m.id, m.name, nullif(m.provider_account, '') as account,
        count(k.id) filter (
            where k.revoked_at is null and (k.expires_at is null or k.expires_at > surety.time_now())) as keys,
        surety.format_time(m.created_at) as created_at,
        surety.format_time(m.suspended_at) as suspended_at,
        nullif(l.requests_per_second, 0) as requests_per_second, nullif(l.burst, 0) as burst,
        l.is_default as has_default_limit
    from surety.merchants as m left join surety.api_keys as k on k.merchant_id = m.id
    cross join lateral surety.find_rate_limit(m.id, 'merchants') as l
    group by m.id, l.requests_per_second, l.burst, l.is_default order by m.id
"""


class NoSuchMerchant(SuretyError):
    """No merchant has this id."""


@click.group()
def merchants() -> None:
    """Add, change, list, suspend and resume merchants; show and set their fees and limits."""


merchants.add_command(money_limits)
merchants.add_command(merchant_limits)
merchants.add_command(fees)


@merchants.command()
@click.argument("name")
@click.option("--account", help="Its own account at the provider (acct_…). Default: the platform's.")
@click.option("--unchecked", is_flag=True, help="Add it even if the provider can't be asked about its account.")
@json_option
def add(name: str, account: str | None, unchecked: bool, as_json: bool) -> None:
    """Add a merchant; prints its id. The first one makes the mode of the database final.

    An account of its own is checked at the provider, by STRIPE_API_KEY.
    """
    settings = load_settings()
    account = "" if account is None else require_account_id(account)
    with connect("deploy", settings) as conn:
        by = authorize(conn, "merchants:write")
        [(livemode, is_first)] = conn.execute(
            "select surety.read_livemode(), not exists (select from surety.merchants)"
        ).fetchall()
        if settings.stripe_api_key is not None or settings.surety_sandbox_url is not None:
            settings.provider.require_mode(livemode)
        if account:
            check_account(account, settings, may_stay_unchecked=unchecked)
        try:
            row = conn.execute("select surety.add_merchant(%s, %s, %s)", (name, account, by)).fetchone()
        except psycopg.errors.IntegrityError as error:
            raise refused_merchant(error, account) from None
    assert row is not None
    click.echo(json.dumps({"id": row[0]}) if as_json else row[0])
    if is_first:
        click.echo(f"the first merchant makes the mode of this database final: {describe_mode(livemode)}", err=True)


def require_account_id(account: str) -> str:
    """An id of an account. Raises SuretyError for another text."""
    if not ACCOUNT_ID.fullmatch(account):
        raise SuretyError("--account: an id of the provider's, such as acct_1032D82eZvKYlo2C")
    return account


def refused_merchant(error: psycopg.errors.IntegrityError, account: str | None) -> Exception:
    """The violated constraint as the user's error."""
    match error.diag.constraint_name:
        case "merchants_account":
            return SuretyError(f"--account: another merchant has the account {account}")
        case "merchant_has_the_mode_of_its_database":
            return SuretyError("the mode of this database was changed meanwhile: run the command again")
        case "merchant_has_no_account_of_the_platform":
            return own_account_refused(account or "")
        case "merchant_name_is_short" | "merchant_name_is_printable":
            return SuretyError("a merchant's name has 1 to 200 printable characters, and no space at its ends")
    return error


@merchants.command(name="set")
@click.argument("merchant_id", metavar="MERCHANT")
@click.option("--name", help="A new name. Traces and reports of older payments show it, too.")
@click.option("--account", help=f"Another account at the provider (acct_…), or `{PLATFORM}` for the platform's.")
@click.option("--unchecked", is_flag=True, help="Set it even if the provider can't be asked about the account.")
def set_merchant(merchant_id: str, name: str | None, account: str | None, unchecked: bool) -> None:
    """Change a merchant's name, or its account at the provider. The audit trail keeps both values.

    Payments, refunds and disputes stay on the account of their payment. So the account can change only while the
    merchant has no payment, and no key or is suspended for a minute. Later, add another merchant for another account.
    The account is checked at the provider, as by `add`.
    """
    if name is None and account is None:
        raise SuretyError("give --name, --account or both")
    settings = load_settings()
    account = "" if account == PLATFORM else None if account is None else require_account_id(account)
    with connect("deploy", settings) as conn:
        by = authorize(conn, "merchants:write")
        if account:
            [(livemode,)] = conn.execute("select surety.read_livemode()").fetchall()
            if settings.stripe_api_key is not None or settings.surety_sandbox_url is not None:
                settings.provider.require_mode(livemode)
            check_account(account, settings, may_stay_unchecked=unchecked)
        try:
            row = conn.execute(
                "select surety.set_merchant(%s, %s, %s, %s)", (merchant_id, name, account, by)
            ).fetchone()
        except psycopg.errors.IntegrityError as error:
            raise refused_merchant(error, account) from None
    match row and row[0]:
        case "has-payments":
            raise SuretyError(
                f"--account: {merchant_id} has payments or customers, which stay on its account; add another one"
            )
        case "has-keys":
            raise SuretyError(
                f"--account: {merchant_id} has keys; suspend it, and set the account a minute later, before its first"
                " payment"
            )
        case None:
            raise NoSuchMerchant(f"there is no merchant {merchant_id}")
        case outcome:
            click.echo(f"{merchant_id} is {outcome}")


def check_account(account: str, settings: Settings, *, may_stay_unchecked: bool) -> None:
    """Ask the provider about an account. Raises SuretyError if it is the platform's own or not connected to it.

    If that can't be checked, raises SuretyError as well, unless the account may stay unchecked; then reports it.
    """
    checked = read_account_check(account, settings)
    match checked["result"]:
        case "own":
            raise own_account_refused(account)
        case "refused":
            raise SuretyError(
                f"--account: {account} is no account that is connected to the platform: {checked['detail']}"
            )
        case "unknown":
            what = f"it was not checked whether {account} is connected to the platform: {checked['detail']}"
            if not may_stay_unchecked:
                raise SuretyError(f"{what}; --unchecked does without")
            click.echo(what, err=True)


def read_account_check(account: str, settings: Settings) -> dict[str, str]:
    """The result and detail of an AccountCheck (jobs/stripe/merchant_account.py).

    Only workers' code calls providers, so it runs in a process of its own.
    """
    if settings.stripe_api_key is None and settings.surety_sandbox_url is None:
        return {"result": "unknown", "detail": "STRIPE_API_KEY is not set"}
    command = [sys.executable, "-P", "-m", "jobs.stripe.merchant_account", account]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS_MAX, check=True)
        return msgspec.json.decode(done.stdout, type=dict[str, str])
    except subprocess.TimeoutExpired:
        return {"result": "unknown", "detail": f"no answer within {CHECK_SECONDS_MAX} s"}
    except subprocess.CalledProcessError as error:
        return {"result": "unknown", "detail": (error.stderr.splitlines() or [str(error)])[-1]}


def own_account_refused(account: str) -> SuretyError:
    """The refusal of the platform's own account as a merchant's."""
    return SuretyError(f"--account: {account} is the platform's own account; leave --account out for a merchant on it")


@merchants.command(name="list")
@json_option
@reads
def list_merchants(as_json: bool) -> None:
    """List all merchants, the oldest first. Without an account, a merchant is on the platform's."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(LIST_MERCHANTS).fetchall()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("id", "name", "account", "keys", "since", "suspended", "rate limit", box=None)
    print_table(
        table,
        (
            (
                *(each["id"], each["name"], each["account"], each["keys"], each["created_at"], each["suspended_at"]),
                describe_rate_limit(each["requests_per_second"], each["burst"], is_default=each["has_default_limit"]),
            )
            for each in found
        ),
    )


@merchants.command()
@click.argument("merchant_id", metavar="MERCHANT")
def suspend(merchant_id: str) -> None:
    """Suspend a merchant: its new payments and captures get 403, at once and on every process.

    All else goes on. Payments that were accepted are carried out. Its keys read, cancel, refund and submit evidence, so
    payers get their money back. Refunds, disputes and webhooks of the provider are booked, and events are emitted. A
    hold that it does not capture in time is released by the provider.
    """
    set_suspended(merchant_id, is_suspended=True)


@merchants.command()
@click.argument("merchant_id", metavar="MERCHANT")
def resume(merchant_id: str) -> None:
    """Let a suspended merchant create payments and capture them again."""
    set_suspended(merchant_id, is_suspended=False)


def set_suspended(merchant_id: str, *, is_suspended: bool) -> None:
    """Suspend or resume."""
    with connect("deploy", load_settings()) as conn:
        row = conn.execute(
            "select surety.suspend_merchant(%s, %s, %s)",
            (merchant_id, is_suspended, authorize(conn, "merchants:write")),
        ).fetchone()
    if row is None or row[0] is None:
        raise NoSuchMerchant(f"there is no merchant {merchant_id}")
    done = "suspended" if is_suspended else "active"
    click.echo(f"{merchant_id} is {done}" + ("" if row[0] else " already"))
