"""`surety customers`: merchants' customers and their saved payment methods, for operators."""

from __future__ import annotations

import json
from typing import Any

import click
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.erasures import erase
from app.cli.options import json_option, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.errors import SuretyError

LIST_CUSTOMERS = """
    select
        c.id, c.merchant_id as merchant, c.email, c.name, c.provider_id,
        (select count(*) from surety.payment_methods as m where m.customer_id = c.id and m.detached_at is null)
            as payment_methods,
        surety.format_time(c.created_at) as created_at, surety.format_time(c.erased_at) as erased_at
    from surety.customers as c
    where (%(merchant)s::text is null or c.merchant_id = %(merchant)s)
        and (%(email)s::text is null or c.folded_email = surety.fold_email(%(email)s))
    order by c.id desc limit %(limit)s
"""
SHOW_CUSTOMER = """
    select shown.document || jsonb_build_object(
        'merchant', c.merchant_id,
        'payment_methods', (
            select coalesce(jsonb_agg(method.document::jsonb order by m.id), '[]')
            from surety.payment_methods as m cross join lateral api.show_payment_method(m) as method
            where m.customer_id = c.id
        )
    ) as document
    from surety.customers as c
    cross join lateral (select one.document::jsonb as document from api.show_customer(c) as one) as shown
    where c.id = %s
"""


class NoSuchCustomer(SuretyError):
    """No customer has this id."""


@click.group()
def customers() -> None:
    """List merchants' customers, show one with its saved payment methods, erase a payer's data."""


customers.add_command(erase)


@customers.command("list")
@click.option("--merchant", metavar="MERCHANT", help="Those of one merchant.")
@click.option("--email", metavar="ADDRESS", help="Those with this e-mail address.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many at most.")
@json_option
@reads
def print_customers(merchant: str | None, email: str | None, limit: int, as_json: bool) -> None:
    """List customers, the newest first."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        if merchant is not None:
            require_merchant(conn, merchant, "--merchant")
        asked = {"merchant": merchant, "email": email, "limit": limit}
        found = cursor.execute(LIST_CUSTOMERS, asked).fetchall()
    if as_json:
        click.echo(json.dumps(found))
    elif not found:
        click.echo("no customers")
    else:
        columns = ("id", "merchant", "email", "name", "provider_id", "payment_methods", "created_at", "erased_at")
        table = Table("id", "merchant", "email", "name", "at the provider", "methods", "since", "erased", box=None)
        print_table(table, [tuple(each[column] for column in columns) for each in found])


@customers.command("show")
@click.argument("customer_id", metavar="ID")
@json_option
@reads
def print_customer(customer_id: str, as_json: bool) -> None:
    """Show a customer with its saved payment methods, those that were removed too."""
    with connect_to_read() as conn:
        row = conn.execute(SHOW_CUSTOMER, (customer_id,)).fetchone()
    if row is None:
        raise NoSuchCustomer(f"ID: there is no customer {customer_id}; `surety customers list` shows their ids")
    document: dict[str, Any] = row[0]
    if as_json:
        click.echo(json.dumps(document))
        return
    methods = document.pop("payment_methods")
    for name, value in document.items():
        if value not in (None, {}):
            click.echo(f"{name:<12} {json.dumps(value) if isinstance(value, dict) else value}")
    for method in methods:
        card = f"{method['brand']} …{method['last4']} {method['exp_month']}/{method['exp_year']}"
        click.echo(f"{method['id']}  {card}" + (", removed" if method["detached_at"] else ""))
