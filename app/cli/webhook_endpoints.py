"""`surety webhook-endpoints`: merchants' endpoints, to which Surety sends webhooks."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click
import psycopg
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, reason_option, require_merchant, time_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

SHOW_ENDPOINTS = """
select w.merchant_id, s.document
from outbox.webhook_endpoints as w cross join lateral api.show_webhook_endpoint(w) as s
where w.deleted_at is null and (%(merchant)s::text is null or w.merchant_id = %(merchant)s)
    and (%(id)s::text is null or w.id = %(id)s)
order by w.merchant_id, w.id
"""
SHOW_FAILURES = """
select surety.format_time(surety.time_of_id(a.id)), a.event_id, a.attempt, coalesce(a.error, '')
from outbox.delivery_attempts as a
where a.endpoint_id = %s and a.outcome = 'failed' order by a.id desc limit 10
"""


@click.group("webhook-endpoints")
def webhook_endpoints() -> None:
    """Merchants' webhook endpoints: list, show, disable, enable them, and send events again."""


@webhook_endpoints.command("list")
@click.option("--merchant", "merchant_id", metavar="MERCHANT", help="Only those of one merchant.")
@json_option
@reads
def print_endpoints(merchant_id: str | None, as_json: bool) -> None:
    """List webhook endpoints, by merchant."""
    with connect_to_read() as conn:
        if merchant_id is not None:
            require_merchant(conn, merchant_id, "--merchant")
        rows = conn.execute(SHOW_ENDPOINTS, {"merchant": merchant_id, "id": None}).fetchall()
    if as_json:
        click.echo(json.dumps([{"merchant": row[0]} | row[1] for row in rows]))
        return
    if not rows:
        click.echo("no webhook endpoints")
        return
    table = Table("endpoint", "merchant", "address", "events", "status", "waiting", "given up", box=None)
    print_table(
        table,
        [
            (
                *(shown["id"], merchant, shown["url"], " ".join(shown["event_types"]), describe_status(shown)),
                *(str(shown["undelivered"]["waiting"]), str(shown["undelivered"]["given_up"])),
            )
            for merchant, shown in rows
        ],
    )


def describe_status(shown: dict[str, Any]) -> str:
    """The status, and its reason."""
    match shown["status"]:
        case "failing":
            return f"failing ({shown['failure_percent']} %)"
        case "disabled":
            return f"disabled ({shown['disabled_because']})"
        case status:
            return str(status)


@webhook_endpoints.command("show")
@click.argument("endpoint_id", metavar="ENDPOINT")
@json_option
@reads
def show_endpoint(endpoint_id: str, as_json: bool) -> None:
    """Show an endpoint, the ranges that it skipped, and its last ten failures."""
    with connect_to_read() as conn:
        row = conn.execute(SHOW_ENDPOINTS, {"merchant": None, "id": endpoint_id}).fetchone()
        if row is None:
            raise NoSuchEndpoint(endpoint_id)
        failures = conn.execute(SHOW_FAILURES, (endpoint_id,)).fetchall()
    merchant, shown = row
    if as_json:
        names = ("at", "event", "attempt", "error")
        listed = [dict(zip(names, failure, strict=True)) for failure in failures]
        click.echo(json.dumps({"merchant": merchant} | shown | {"failures": listed}))
        return
    click.echo(f"{endpoint_id}  {describe_status(shown)}")
    click.echo(f"merchant  {merchant}\naddress   {shown['url']}\nevents    {' '.join(shown['event_types'])}")
    click.echo(f"payload   {shown['payload']}, version {shown['api_version']}")
    click.echo(f"waiting   {shown['undelivered']['waiting']}, given up {shown['undelivered']['given_up']}")
    for skipped in shown["skipped"]:
        click.echo(f"skipped   {skipped['events']} events, {skipped['from']} to {skipped['to']}")
    for at, event_id, attempt, error in failures:
        click.echo(f"{at}  {event_id}  attempt {attempt}: {error}")


@webhook_endpoints.command("disable")
@click.argument("endpoint_id", metavar="ENDPOINT")
@reason_option
def disable_endpoint(endpoint_id: str, reason: str) -> None:
    """Disable an endpoint: nothing is sent, and its events wait."""
    with connect("deploy", load_settings()) as conn:
        actor = authorized_actor(conn, endpoint_id, reason)
        row = conn.execute("select outbox.disable_endpoint(%s, 'operator', %s)", (endpoint_id, actor)).fetchone()
    click.echo(f"{endpoint_id}: disabled" if row and row[0] else f"{endpoint_id} was disabled already")


@webhook_endpoints.command("enable")
@click.argument("endpoint_id", metavar="ENDPOINT")
@click.option(
    "--from", "start", type=click.Choice(["there", "hours", "now"]), required=True,
    help="there: where it stood; hours: with the last --hours; now: what waits is skipped.",
)  # fmt: skip
@click.option("--hours", type=click.IntRange(1, 8760), help="With --from hours.")
@reason_option
def enable_endpoint(endpoint_id: str, start: str, hours: int | None, reason: str) -> None:
    """Enable an endpoint, or let an enabled one skip events that wait."""
    if (start == "hours") != (hours is not None):
        raise SuretyError("--hours belongs to --from hours, which needs it")
    with connect("deploy", load_settings()) as conn:
        actor = authorized_actor(conn, endpoint_id, reason)
        row = conn.execute(
            "select skipped from outbox.enable_endpoint(%s, %s, %s, %s)", (endpoint_id, start, hours, actor)
        ).fetchone()
    assert row is not None
    click.echo(f"{endpoint_id}: enabled, {row[0]} events are skipped")


@webhook_endpoints.command("replay")
@click.argument("endpoint_id", metavar="ENDPOINT")
@click.option("--event", "event_ids", multiple=True, metavar="EVENT", help="An event; may be repeated.")
@time_option("--since", "start", "Events that were made at this time or later.")
@time_option("--before", "before", "Events that were made before this time.")
@click.option("--undelivered", is_flag=True, help="Events that were given up.")
@click.option("--send", is_flag=True, help="Send them; without it, they are only counted.")
@reason_option
def replay_to_endpoint(
    endpoint_id: str,
    event_ids: tuple[str, ...],
    start: datetime | None,
    before: datetime | None,
    undelivered: bool,
    send: bool,
    reason: str,
) -> None:
    """Send events to an endpoint again, under the same webhook-id. First count them, without --send."""
    if not (event_ids or start or before or undelivered):
        raise SuretyError("give --event, --since, --before or --undelivered: which events are to be sent again")
    with connect("deploy", load_settings()) as conn:
        actor = authorized_actor(conn, endpoint_id, reason)
        row = conn.execute(
            "select outbox.replay_events(%s, %s::text[], %s, %s, %s, %s, %s)",
            (endpoint_id, list(event_ids) or None, start, before, undelivered, not send, actor),
        ).fetchone()
    assert row is not None
    click.echo(f"{endpoint_id}: {row[0]} events {'are sent again' if send else 'would be sent again, with --send'}")


class NoSuchEndpoint(SuretyError):
    """No webhook endpoint has this id."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(f"ENDPOINT: there is no {endpoint_id}; `surety webhook-endpoints list` shows them")


def authorized_actor(conn: psycopg.Connection[Any], endpoint_id: str, reason: str) -> str:
    """The operator as the audit trail names it. Raises SuretyError; NoSuchEndpoint."""
    actor = f"operator:{authorize(conn, 'webhook-endpoints:write')}"
    row = conn.execute(
        "select outbox.audit_endpoint(w, %s, 'webhook endpoint changed', jsonb_build_object('reason', %s::text))"
        " from outbox.webhook_endpoints as w where w.id = %s and w.deleted_at is null",
        (actor, reason, endpoint_id),
    ).fetchone()
    if row is None:
        raise NoSuchEndpoint(endpoint_id)
    return actor
