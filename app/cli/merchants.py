"""`surety merchants`: the businesses that receive payments. Each change is audited with the user's name."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import msgspec
import psycopg
from rich.table import Table

from app.cli.identity import authorize
from app.cli.limits import describe_rate_limit, merchant_limits
from app.cli.tables import print_table
from app.wording import describe_mode
from db.connect import connect
from db.errors import SuretyError
from db.settings import Settings, load_settings

ACCOUNT_ID = re.compile(r"acct_[0-9A-Za-z_]{1,200}")
CHECK_SECONDS_MAX = 60


class NoSuchMerchant(SuretyError):
    """No merchant has this id."""


@click.group()
def merchants() -> None:
    """Add, list, suspend and resume merchants."""


merchants.add_command(merchant_limits)


@merchants.command()
@click.argument("name")
@click.option("--account", help="Its own account at the provider (acct_…). Default: the platform's.")
@click.option("--unchecked", is_flag=True, help="Add it even if the provider can't be asked about its account.")
def add(name: str, account: str | None, unchecked: bool) -> None:
    """Add a merchant; prints its id. The first one makes the mode of the database final.

    An account of its own is checked at the provider, by STRIPE_API_KEY.
    """
    settings = load_settings()
    if account is not None and not ACCOUNT_ID.fullmatch(account):
        raise SuretyError("--account: an id of the provider's, such as acct_1032D82eZvKYlo2C")
    if account is None:
        account = ""
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
        except psycopg.errors.UniqueViolation:
            raise SuretyError(f"--account: another merchant has the account {account}") from None
        except psycopg.errors.ForeignKeyViolation:
            raise SuretyError("the mode of this database was changed meanwhile: run the command again") from None
        except psycopg.errors.CheckViolation as error:
            if error.diag.constraint_name == "merchant_has_no_account_of_the_platform":
                raise own_account_refused(account) from None
            raise SuretyError("a merchant's name has 1 to 200 printable characters, and no space at its ends") from None
    assert row is not None
    click.echo(row[0])
    if is_first:
        click.echo(f"the first merchant makes the mode of this database final: {describe_mode(livemode)}", err=True)


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
                raise SuretyError(f"{what}; --unchecked adds the merchant all the same")
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
def list_merchants() -> None:
    """List all merchants, the oldest first."""
    table = Table("id", "name", "account", "keys", "since", "suspended", "rate limit", box=None)
    with connect("deploy", load_settings()) as conn:
        rows = conn.execute(
            "select m.id, m.name, m.provider_account, count(k.id) filter (where k.revoked_at is null),"
            " surety.format_time(m.created_at), surety.format_time(m.suspended_at), l.*"
            " from surety.merchants as m left join surety.api_keys as k on k.merchant_id = m.id"
            " cross join lateral surety.find_rate_limit(m.id, 'merchants') as l"
            " group by m.id, l.requests_per_second, l.burst, l.is_default order by m.id"
        ).fetchall()
    print_table(table, ((*row[:-3], describe_rate_limit(*row[-3:-1], is_default=row[-1])) for row in rows))


@merchants.command()
@click.argument("merchant_id")
def suspend(merchant_id: str) -> None:
    """Suspend a merchant: its requests get 403; its payments in progress continue."""
    set_suspended(merchant_id, is_suspended=True)


@merchants.command()
@click.argument("merchant_id")
def resume(merchant_id: str) -> None:
    """Let a suspended merchant create payments again."""
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
