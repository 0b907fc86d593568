"""`surety merchants`: the businesses that receive payments. Each change is audited with the user's name."""

from __future__ import annotations

import click
import psycopg
from rich.table import Table

from app.cli.identity import operator_identity
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings


class NoSuchMerchant(SuretyError):
    """No merchant has this id."""


@click.group()
def merchants() -> None:
    """Add, list, suspend and resume merchants."""


@merchants.command()
@click.argument("name")
@click.option("--account", default="", help="Its own account at the provider (acct_…). Default: the platform's.")
def add(name: str, account: str) -> None:
    """Add a merchant; prints its id."""
    with connect("deploy", load_settings()) as conn:
        try:
            row = conn.execute(
                "select surety.add_merchant(%s, %s, %s)", (name, account, operator_identity())
            ).fetchone()
        except psycopg.errors.UniqueViolation:
            raise SuretyError(f"--account: another merchant has the account {account}") from None
        except psycopg.errors.ForeignKeyViolation:
            raise SuretyError("the mode of this database was changed meanwhile: run the command again") from None
        except psycopg.errors.CheckViolation as error:
            if error.diag.constraint_name == "provider_account_is_an_account_id":
                raise SuretyError("--account: an id of the provider's, such as acct_1032D82eZvKYlo2C") from None
            raise SuretyError("a merchant's name has 1 to 200 characters") from None
    assert row is not None
    click.echo(row[0])


@merchants.command(name="list")
def list_merchants() -> None:
    """List all merchants, the oldest first."""
    table = Table("id", "name", "account", "keys", "since", "suspended", box=None)
    with connect("deploy", load_settings()) as conn:
        rows = conn.execute(
            "select m.id, m.name, m.provider_account, count(k.id) filter (where k.revoked_at is null),"
            " surety.format_time(m.created_at), surety.format_time(m.suspended_at)"
            " from surety.merchants as m left join surety.api_keys as k on k.merchant_id = m.id"
            " group by m.id order by m.id"
        ).fetchall()
    print_table(table, rows)


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
            "select surety.suspend_merchant(%s, %s, %s)", (merchant_id, is_suspended, operator_identity())
        ).fetchone()
    if row is None or row[0] is None:
        raise NoSuchMerchant(f"there is no merchant {merchant_id}")
    done = "suspended" if is_suspended else "active"
    click.echo(f"{merchant_id} is {done}" + ("" if row[0] else " already"))
