"""`surety keys`: the API keys of merchants and operators. Only their SHA-256 is kept, so each is shown once."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import click
import psycopg
from psycopg import sql
from rich.table import Table

from app.cli.identity import authorize
from app.cli.limits import describe_rate_limit, key_limits
from app.cli.operators import ROLES
from app.cli.options import json_option, require_merchant
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.web.keys import new_key, new_operator_key
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings, parse_network

SCOPES = ("disputes:write", "payments:write", "read", "refunds:write", "webhooks:write")
DEFAULT_NAME = "default"
TOO_MANY_KEYS = "SU010"
ROLE_TOO_GREAT = "SU011"
DAYS_MAX = 3650
OVERLAP_HOURS_MAX = 24 * 90

LIST_KEYS = """
select
    k.id, k.hint as ends_in, m.id as of, m.name as merchant, k.name, k.scopes, k.networks::text[] as networks,
    k.created_by, surety.format_time(k.created_at) as created_at, surety.format_time(k.expires_at) as expires_at,
    surety.format_time(k.last_used_at) as last_used_at, surety.format_time(k.revoked_at) as revoked_at,
    nullif(l.requests_per_second, 0) as requests_per_second, nullif(l.burst, 0) as burst,
    l.is_default as has_default_limit
from surety.api_keys as k join surety.merchants as m on m.id = k.merchant_id
cross join lateral surety.find_rate_limit(k.id, 'keys') as l
where %(merchant)s::text is null or m.id = %(merchant)s
union all
select
    k.id, k.hint, 'operator', null, o.name, array['role:' || k.role], k.networks::text[], k.created_by,
    surety.format_time(k.created_at), surety.format_time(k.expires_at), surety.format_time(k.last_used_at),
    surety.format_time(k.revoked_at), nullif(l.requests_per_second, 0), nullif(l.burst, 0), l.is_default
from surety.operator_keys as k join surety.operators as o on o.id = k.operator_id
cross join lateral surety.find_rate_limit(k.id, 'operator-keys') as l
where %(merchant)s::text is null
order by 1
"""


class NoSuchKey(SuretyError):
    """No key has this id."""


def parse_key_networks(_context: click.Context, _parameter: click.Parameter, networks: tuple[str, ...]) -> list[str]:
    """The networks in CIDR notation. Raises SuretyError for another text."""
    try:
        return [str(parse_network(network.strip())) for network in networks]
    except ValueError as error:
        raise SuretyError(f"--network: {error}") from None


@click.group()
def keys() -> None:
    """Create, rotate, list and revoke keys of merchants and operators."""


keys.add_command(key_limits)


@keys.command()
@click.argument("merchant_id", required=False)
@click.option("--name", help=f"The system that will hold a merchant's key; default: {DEFAULT_NAME}.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="A right of a merchant's key; default: all."
)
@click.option(
    "--network", "networks", multiple=True, metavar="CIDR", callback=parse_key_networks,
    help="Valid only from this network, such as 203.0.113.0/24; default: from everywhere. An operator's key is bound"
    " for the API only, not for the command line.",
)  # fmt: skip
@click.option("--days", type=click.IntRange(1, DAYS_MAX), help="Expires after so many days; default: never.")
@click.option("--operator", metavar="NAME", help="Create an operator's key instead of a merchant's.")
@click.option(
    "--role", type=click.Choice(ROLES), help="For an operator's key: its operator's role (default) or a lesser one."
)
@json_option
def create(
    merchant_id: str | None,
    name: str | None,
    scopes: tuple[str, ...],
    networks: list[str],
    days: int | None,
    operator: str | None,
    role: str | None,
    as_json: bool,
) -> None:
    """Create a key for a merchant, or for an operator, and print it: it can't be shown again.

    A merchant's key gives access to the merchant's payments only, an operator's key to /v1/operator only. A merchant
    has at most two active keys of one name with the same scopes.
    """
    require_fitting_options(merchant_id, operator, name, scopes, role)
    with connect("deploy", load_settings()) as conn:
        if operator is not None:
            print_key(*create_for_operator(conn, operator, role, networks, days), as_json=as_json)
            return
        by = authorize(conn, "keys:write")
        key = new_key(livemode=is_live(conn))
        try:
            row = conn.execute(
                "select surety.add_api_key(%s, %s, %s, %s, %s, %s::text[], %s::cidr[],"
                " surety.time_now() + make_interval(days => %s))",
                (
                    *(merchant_id, key.hash, key.hint, by),
                    *(DEFAULT_NAME if name is None else name, list(scopes or SCOPES), networks, days),
                ),
            ).fetchone()
        except psycopg.Error as error:
            raise refusal_of(error, merchant_id) from None
    assert row is not None
    print_key(row[0], key.text, as_json=as_json)


def print_key(key_id: str, text: str, *, as_json: bool) -> None:
    """A new key, with its id as JSON."""
    click.echo(json.dumps({"id": key_id, "key": text}) if as_json else text)


def require_fitting_options(
    merchant_id: str | None, operator: str | None, name: str | None, scopes: tuple[str, ...], role: str | None
) -> None:
    """Raises SuretyError unless the key is for one holder, and for options of the other kind of key."""
    if merchant_id is not None and operator is not None:
        raise SuretyError("give a MERCHANT_ID or --operator NAME, not both: a key belongs to one of them")
    if merchant_id is None and operator is None:
        raise SuretyError("give a MERCHANT_ID, or --operator NAME")
    if operator is None and role is not None:
        raise SuretyError("--role: only an operator's key has a role; limit a merchant's key by --scope")
    if operator is not None and scopes:
        raise SuretyError("--scope: only a merchant's key has scopes; limit an operator's key by --role")
    if operator is not None and name is not None:
        raise SuretyError("--name: only a merchant's key has a name; an operator's key has its operator's")


def is_live(conn: psycopg.Connection[tuple[Any, ...]]) -> bool:
    """Whether the database's keys begin with sty_live_."""
    row = conn.execute("select surety.read_livemode()").fetchone()
    return bool(row and row[0])


def refusal_of(error: psycopg.Error, merchant_id: str | None) -> Exception:
    """The error of a new key as the user's, or itself."""
    if error.sqlstate == TOO_MANY_KEYS:
        return SuretyError(f"{error.diag.message_primary}: {error.diag.message_hint}")
    if error.sqlstate == ROLE_TOO_GREAT:
        return SuretyError(f"--role: {error.diag.message_primary}")
    match error.diag.constraint_name:
        case "api_key_belongs_to_a_merchant":
            return SuretyError(f"there is no merchant {merchant_id}")
        case "api_key_name_is_short_and_plain":
            return SuretyError("a key's name has 1 to 100 letters, digits and . _ @ -")
        case "api_key_networks_are_few" | "operator_key_networks_are_few":
            return SuretyError("a key has at most 50 networks")
    return error


def create_for_operator(
    conn: psycopg.Connection[tuple[Any, ...]], operator: str, role: str | None, networks: list[str], days: int | None
) -> tuple[str, str]:
    """The id and the text of a new key for an operator.

    Raises SuretyError for an unknown name and for a role greater than the operator's.
    """
    key = new_operator_key()
    by = authorize(conn, "operators:write")
    try:
        row = conn.execute(
            "select surety.add_operator_key(%s, %s, %s, %s, %s, %s::cidr[],"
            " surety.time_now() + make_interval(days => %s))",
            (operator, key.hash, key.hint, by, role, networks, days),
        ).fetchone()
    except psycopg.Error as error:
        raise refusal_of(error, None) from None
    if row is None or row[0] is None:
        raise SuretyError(f"there is no active operator {operator}")
    return row[0], key.text


@keys.command()
@click.argument("key_id")
@click.option(
    "--overlap-hours", type=click.IntRange(0, OVERLAP_HOURS_MAX), default=72, show_default=True,
    help="The old key stays valid for so long.",
)  # fmt: skip
@json_option
def rotate(key_id: str, overlap_hours: int, as_json: bool) -> None:
    """Create the successor of a key, with the same rights and networks and as long a life, and print it.

    The old key expires after the overlap. A merchant's key with an active successor is not rotated again.
    """
    with connect("deploy", load_settings()) as conn:
        is_operators = is_key_of_operator(conn, key_id)
        by = authorize(conn, "operators:write" if is_operators else "keys:write")
        key = new_operator_key() if is_operators else new_key(livemode=is_live(conn))
        rotate_key = "rotate_operator_key" if is_operators else "rotate_api_key"
        try:
            row = conn.execute(
                sql.SQL("select surety.{}(%s, %s, %s, %s, %s)").format(sql.Identifier(rotate_key)),
                (key_id, key.hash, key.hint, timedelta(hours=overlap_hours), by),
            ).fetchone()
        except psycopg.Error as error:
            raise refusal_of(error, None) from None
    if row is None or row[0] is None:
        raise NoSuchKey(f"there is no active key {key_id}")
    print_key(row[0], key.text, as_json=as_json)


def is_key_of_operator(conn: psycopg.Connection[tuple[Any, ...]], key_id: str) -> bool:
    """Whether it is an operator's key."""
    row = conn.execute("select exists (select from surety.operator_keys where id = %s)", (key_id,)).fetchone()
    return bool(row and row[0])


@keys.command(name="list")
@click.option("--merchant", "merchant_id", help="Only this merchant's.")
@json_option
@reads
def list_keys(merchant_id: str | None, as_json: bool) -> None:
    """List keys, the oldest first, each by its last characters."""
    with connect_to_read() as conn:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        cursor = conn.execute(LIST_KEYS, {"merchant": merchant_id})
        names = [column.name for column in cursor.description or ()]
        found = [dict(zip(names, row, strict=True)) for row in cursor]
    if as_json:
        click.echo(json.dumps(found))
        return
    columns = ("id", "ends in", "of", "merchant", "name", "scopes", "networks", "created", "expires", "last used")
    table = Table(*columns, "revoked", "rate limit", box=None)
    print_table(
        table,
        (
            (
                *(key["id"], key["ends_in"], key["of"], key["merchant"], key["name"]),
                *(" ".join(key["scopes"]), " ".join(key["networks"])),
                *(key["created_at"], key["expires_at"], key["last_used_at"], key["revoked_at"]),
                describe_rate_limit(key["requests_per_second"], key["burst"], is_default=key["has_default_limit"]),
            )
            for key in found
        ),
    )


@keys.command()
@click.argument("key_id")
def revoke(key_id: str) -> None:
    """Revoke a key at once and permanently."""
    with connect("deploy", load_settings()) as conn:
        if is_key_of_operator(conn, key_id):
            by = authorize(conn, "operators:write")
            row = conn.execute("select surety.revoke_operator_key(%s, %s)", (key_id, by)).fetchone()
        else:
            by = authorize(conn, "keys:revoke")
            row = conn.execute("select surety.revoke_api_key(%s, %s)", (key_id, by)).fetchone()
    if row is None or row[0] is None:
        raise NoSuchKey(f"there is no key {key_id}")
    click.echo(f"{key_id} is revoked" + ("" if row[0] else " already"))
