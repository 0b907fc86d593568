"""`surety servers`: the servers that may do business in live mode, among which a standby takes over by itself."""

from __future__ import annotations

import json
from ipaddress import ip_address

import click
import psycopg

from app.cli.identity import authorize
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.restored import RESTORE_REFUSED, RestoreRefused
from db.connect import connect
from db.errors import message_of
from db.settings import load_settings


@click.command()
@click.argument("addresses", metavar="[ADDRESS]...", nargs=-1)
@click.option("--none", "ends_list", is_flag=True, help="List none: then a change of the timeline closes the database.")
@json_option
def servers(addresses: tuple[str, ...], *, ends_list: bool, as_json: bool) -> None:
    """Show the servers that may do business in live mode, or set them: their IP addresses, `local` for a Unix socket.

    The list lets a standby take over without a person. Any other server with this database, such as one with a restored
    backup, accepts and handles nothing until `surety restored` or `surety drill`. Without a list, a standby that takes
    over waits for `surety restored` as well. In test mode the list has no effect.
    """
    if addresses and ends_list:
        raise click.UsageError("give addresses or --none, not both")
    wanted = [plain_address(address) for address in addresses]
    if wanted or ends_list:
        set_servers(wanted)
    found, here = read_servers()
    if as_json:
        click.echo(json.dumps({"servers": found, "here": here}))
        return
    for address in found:
        click.echo(address + (" (this server)" if address == here else ""))
    if not found:
        click.echo(f"none: a change of the timeline closes the database; this server is {here}")


def set_servers(addresses: list[str]) -> None:
    """Set the list. Raises RestoreRefused."""
    with connect("deploy", load_settings()) as conn:
        actor = authorize(conn, "mode:write")
        try:
            conn.execute("select outbox.set_business_servers(%s, %s)", (addresses, actor))
        except psycopg.DatabaseError as error:
            if error.sqlstate != RESTORE_REFUSED:
                raise
            raise RestoreRefused(message_of(error)) from None


@reads
def read_servers() -> tuple[list[str], str]:
    """The list, and the address of the server that answers."""
    with connect_to_read() as conn:
        found = [row[0] for row in conn.execute("select address from outbox.business_servers order by address")]
        [(here,)] = conn.execute("select outbox.server_address()").fetchall()
    return found, here


def plain_address(text: str) -> str:
    """An IP address as PostgreSQL writes it, or `local`. Raises click.BadParameter."""
    if text == "local":
        return text
    try:
        return str(ip_address(text))
    except ValueError:
        raise click.BadParameter(f"{text} is neither an IP address nor local") from None
