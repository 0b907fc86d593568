"""`surety operators`: the accounts of the people who operate Surety, and what their roles may do."""

from __future__ import annotations

import json

import click
import psycopg
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import NO_KEY, NotAuthorized, authorize, local_user, personal_key
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.web.keys import new_operator_key
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

ROLES = ("viewer", "support", "finance", "admin")
RULES = {
    "operator_name_is_short_and_plain": "an operator's name has 1 to 100 letters, digits and . _ @ -",
    "operator_name_is_unique": "there is an operator of this name already; names are never used again",
    "operator_email_is_an_address": "--email: an address, such as ana@example.com",
    "operator_email_is_unique": "--email: another operator has this address",
}

LIST_OPERATORS = """
select
    o.id, o.name, o.email, o.role, o.deactivated_at is null as is_active, o.created_by,
    surety.format_time(o.created_at) as created_at,
    count(k.id) filter (
        where o.deactivated_at is null and k.revoked_at is null
            and (k.expires_at is null or k.expires_at > surety.time_now())) as keys,
    surety.format_time(max(k.last_used_at)) as last_used_at
from surety.operators as o left join surety.operator_keys as k on k.operator_id = o.id
group by o.id
order by o.name
"""


@click.group()
def operators() -> None:
    """Add, change and list operators, and show what each role may do."""


@operators.command(name="add")
@click.argument("name")
@click.option("--email", required=True, help="The operator's e-mail address.")
@click.option("--role", required=True, type=click.Choice(ROLES), help="What it may do: `surety operators roles`.")
@json_option
def add_account(name: str, email: str, role: str, as_json: bool) -> None:
    """Add an operator and print a first personal key: it can't be shown again. NAME stands in the audit trail.

    The first admin needs no personal key, only access to the database, as long as no active admin has a valid key.
    """
    key = new_operator_key()
    settings = load_settings()
    with connect("deploy", settings) as conn:
        try:
            if personal_key(settings) is not None:
                by = authorize(conn, "operators:write")
                conn.execute(
                    "select surety.add_operator(%s, %s, %s, %s, %s, %s)", (name, email, role, key.hash, key.hint, by)
                )
            elif role != "admin":
                raise NotAuthorized(NO_KEY)
            else:
                row = conn.execute(
                    "select surety.add_first_admin(%s, %s, %s, %s, %s)",
                    (name, email, key.hash, key.hint, f"local:{local_user()}"),
                ).fetchone()
                if row is None or row[0] is None:
                    raise NotAuthorized(f"there is an admin already, so {NO_KEY}")
        except psycopg.errors.IntegrityError as error:
            raise SuretyError(RULES.get(error.diag.constraint_name or "", str(error))) from None
    click.echo(json.dumps({"operator": name, "key": key.text}) if as_json else key.text)


@operators.command(name="list")
@json_option
@reads
def list_operators(as_json: bool) -> None:
    """List operators by name."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(LIST_OPERATORS).fetchall()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("id", "name", "e-mail", "role", "active", "valid keys", "since", "last used", box=None)
    print_table(
        table,
        (
            (
                *(each["id"], each["name"], each["email"], each["role"], "yes" if each["is_active"] else "no"),
                *(each["keys"], each["created_at"], each["last_used_at"]),
            )
            for each in found
        ),
    )


@operators.command(name="set")
@click.argument("name")
@click.option("--email", help="A new e-mail address.")
@click.option("--role", type=click.Choice(ROLES), help="A new role, at once.")
@click.option("--active/--inactive", "is_active", default=None, help="Keys of an inactive operator are refused.")
def set_operator(name: str, email: str | None, role: str | None, is_active: bool | None) -> None:
    """Change an operator. Accounts are never deleted, because the audit trail names them."""
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "operators:write")
        try:
            row = conn.execute(
                "select surety.set_operator(%s, %s, %s, %s, %s)", (name, email, role, is_active, by)
            ).fetchone()
        except psycopg.errors.IntegrityError as error:
            raise SuretyError(RULES.get(error.diag.constraint_name or "", str(error))) from None
    if row is None or row[0] is None:
        raise SuretyError(f"there is no operator {name}")
    click.echo(f"{name} is changed" if row[0] else f"{name} is unchanged")


@operators.command()
@json_option
@reads
def roles(as_json: bool) -> None:
    """Show the scopes of each role."""
    with connect_to_read() as conn:
        rows = conn.execute(
            "select s.scope, array_agg(s.role) from surety.role_scopes as s group by s.scope order by s.scope"
        ).fetchall()
    if as_json:
        click.echo(json.dumps({role: [scope for scope, having in rows if role in having] for role in ROLES}))
        return
    table = Table("scope", *ROLES, box=None)
    print_table(table, ((scope, *("yes" if role in having else "" for role in ROLES)) for scope, having in rows))
