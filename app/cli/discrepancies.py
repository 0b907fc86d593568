"""`surety discrepancies`: where our records and the other side's differ. Operators assign, snooze and resolve them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click
from psycopg.types.json import Jsonb
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, parse_period, reason_option, require_merchant, require_text
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.wording import count_noun
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

Command = TypeVar("Command", bound=Callable[..., Any])

SHOWN = """
select shown.document
from surety.find_discrepancies(%s, null, %s) as found cross join lateral surety.show_discrepancy(found) as shown
order by array_position(array['critical', 'warning', 'notice'], found.severity), found.id
"""
SHOW_ONE = """
select shown.document
from surety.discrepancies as found cross join lateral surety.show_discrepancy(found) as shown where found.id = %s
"""
LISTED_MAX = 100_000
SEVERITIES = ("notice", "warning", "critical")
RESOLUTIONS = ("explained", "corrected", "written_off", "forced")


class NoSuchDiscrepancy(SuretyError):
    """No discrepancy has this id."""

    def __init__(self, discrepancy_id: str) -> None:
        super().__init__(f"ID: there is no discrepancy {discrepancy_id}; `surety discrepancies list` shows their ids")


FILTERS = (
    click.option("--kind", help="Only those of one kind, such as fee."),
    click.option("--severity", type=click.Choice(SEVERITIES), help="Only those of one severity."),
    click.option("--merchant", metavar="MERCHANT", help="Only those of one merchant."),
    click.option("--payment", metavar="PAYMENT", help="Only those of one payment."),
    click.option("--assignee", metavar="NAME", help="Only those assigned to one operator."),
    click.option("--older-than", metavar="TIME", callback=parse_period, help="Only those opened so long ago, as 7d."),
    click.option("--max-delta", type=click.IntRange(min=0), metavar="MINOR", help="Only small differing amounts."),
    click.option("--snoozed", is_flag=True, help="Those that are snoozed, too."),
)


def filter_options(command: Command) -> Command:
    """Add the options that select discrepancies."""
    for option in reversed(FILTERS):
        command = option(command)
    return command


def filter_of(older_than: timedelta | None, snoozed: bool, closed: bool = False, **chosen: Any) -> dict[str, Any]:
    """The filter as surety.find_discrepancies takes it."""
    statuses = ["open", *(["snoozed"] if snoozed else []), *(["closed"] if closed else [])]
    before = None if older_than is None else (datetime.now(UTC) - older_than).isoformat()
    return {"statuses": statuses, "opened_before": before, **chosen}


@click.group()
def discrepancies() -> None:
    """Differences between our records and the provider's or bank's: list, show, assign, snooze, resolve."""


@discrepancies.command("list")
@filter_options
@click.option("--closed", is_flag=True, help="Those that are closed, too.")
@json_option
@reads
def print_discrepancies(as_json: bool, **chosen: Any) -> None:
    """List open discrepancies, the critical ones first, then the oldest first."""
    with connect_to_read() as conn:
        if chosen["merchant"] is not None:
            require_merchant(conn, chosen["merchant"], "--merchant")
        found = [row[0] for row in conn.execute(SHOWN, (Jsonb(filter_of(**chosen)), LISTED_MAX))]
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("id", "kind", "subject", "differs", "payment", "opened", "assignee", "state", box=None)
    rows = [
        (
            *(
                each["id"],
                each["kind"],
                each["subject"],
                describe_differences(each),
                each["payment"],
                each["opened_at"],
            ),
            *(each["assignee"], describe_urgency(each)),
        )
        for each in found
    ]
    if rows:
        print_table(table, rows)
    else:
        click.echo("no discrepancies" if chosen["closed"] else "no open discrepancies")


@discrepancies.command("show")
@click.argument("discrepancy_id", metavar="ID")
@json_option
@reads
def print_discrepancy(discrepancy_id: str, as_json: bool) -> None:
    """Show a discrepancy: the differing fields with both values and sources, and how it was closed."""
    with connect_to_read() as conn:
        row = conn.execute(SHOW_ONE, (discrepancy_id,)).fetchone()
    if row is None:
        raise NoSuchDiscrepancy(discrepancy_id)
    shown: dict[str, Any] = row[0]
    if as_json:
        click.echo(json.dumps(shown))
        return
    again, closed, first = shown["seen_again"], shown["closed"], shown["first_seen"]
    for name, value in (
        (shown["id"], describe_urgency(shown)),
        ("kind", shown["kind"]),
        ("subject", shown["subject"] + (f", occurrence {shown['occurrence']}" if shown["occurrence"] > 1 else "")),
        ("payment", shown["payment"]),
        ("merchant", shown["merchant"]),
        ("detail", shown["detail"]),
        *(("differs", describe_difference(field)) for field in shown["fields"]),
        ("here", shown["sources"]["here"]),
        ("there", shown["sources"]["there"]),
        ("opened", shown["opened_at"]),
        ("at first", first and first["detail"]),
        ("again", again["count"] and f"{count_noun(again['count'], 'time')}, the last at {again['last_at']}"),
        ("assignee", shown["assignee"]),
        ("snoozed", shown["snoozed_until"] and f"until {shown['snoozed_until']}"),
        ("note", shown["note"]),
        ("closed", closed and f"{closed['at']} as {closed['how']} by {closed['by']}: {closed['because']}"),
    ):
        if value:
            click.echo(f"{name:<9} {value}")


@discrepancies.command("assign")
@click.argument("discrepancy_id", metavar="ID")
@click.option("--to", "assignee", metavar="NAME", help="An active operator. Without it, the assignment ends.")
@click.option("--note", callback=require_text, help="A note for them; it replaces the present one.")
def set_assignee(discrepancy_id: str, assignee: str | None, note: str | None) -> None:
    """Assign a discrepancy to an operator, with a note for them."""
    query = "select outcome, detail from surety.assign_discrepancy(%s, %s, %s, %s)"
    apply_change("discrepancies:assign", query, discrepancy_id, assignee, note)


@discrepancies.command("snooze")
@click.argument("discrepancy_id", metavar="ID")
@click.option("--for", "period", metavar="TIME", required=True, callback=parse_period, help="Such as 12h or 3d.")
@click.option("--note", required=True, callback=require_text, help="The awaited answer.")
def set_snooze(discrepancy_id: str, period: timedelta, note: str) -> None:
    """Keep a discrepancy out of `surety status` for a time. Other values end the snooze earlier."""
    query = "select outcome, detail from surety.snooze_discrepancy(%s, surety.time_now() + %s, %s, %s)"
    apply_change("discrepancies:resolve", query, discrepancy_id, period, note)


@discrepancies.command("resolve")
@click.argument("discrepancy_id", metavar="[ID]", required=False)
@filter_options
@click.option("--expect", type=click.IntRange(min=0), metavar="NUMBER", help="How many match; else none is resolved.")
@click.option("--resolution", type=click.Choice(RESOLUTIONS), default="explained", help="How, else explained.")
@click.option("--dry-run", is_flag=True, help="Only report what would happen.")
@reason_option
@json_option
def resolve_selected(
    discrepancy_id: str | None, expect: int | None, resolution: str, dry_run: bool, reason: str, as_json: bool,
    **chosen: Any,
) -> None:  # fmt: skip
    """Close one discrepancy, or all open ones that match, with a reason. A closed one keeps its first reason."""
    is_filtered = any(value is not None for name, value in chosen.items() if name != "snoozed")
    if (discrepancy_id is None) != is_filtered:
        raise SuretyError("ID: give either an id, or filters such as --kind and --merchant with --expect")
    if discrepancy_id is None and expect is None and not dry_run:
        raise SuretyError("--expect: say how many discrepancies match (--dry-run counts them)")
    with connect("deploy", load_settings()) as conn:
        by = f"operator:{authorize(conn, 'discrepancies:resolve')}"
        if chosen["merchant"] is not None:
            require_merchant(conn, chosen["merchant"], "--merchant")
        if discrepancy_id is None:
            query = "select * from surety.resolve_discrepancies(%s, %s, %s, %s, %s, %s)"
            given: tuple[Any, ...] = (Jsonb(filter_of(**chosen)), expect, resolution, reason, by, dry_run)
        else:
            query = "select %s as id, done.* from surety.resolve_discrepancy(%s, %s, %s, %s, %s) as done"
            given = (discrepancy_id, discrepancy_id, resolution, reason, by, dry_run)
        done = conn.execute(query, given).fetchall()
    match done:
        case [(None, "refused", detail)]:
            raise SuretyError(f"--expect: {detail}")
        case [(_, "not_found", _)]:
            raise NoSuchDiscrepancy(str(discrepancy_id))
    if as_json:
        click.echo(json.dumps([dict(zip(("id", "outcome", "detail"), row, strict=True)) for row in done]))
        return
    for found, _, detail in done:
        click.echo(f"{found}: {detail}")
    if discrepancy_id is None:
        verb = "would be resolved" if dry_run else "resolved"
        click.echo(f"{count_noun(len(done), 'discrepancy', 'discrepancies')} {verb}")


def apply_change(scope: str, query: str, discrepancy_id: str, *values: Any) -> None:
    """Change one discrepancy as the operator of the personal key. Raises SuretyError if it is refused."""
    with connect("deploy", load_settings()) as conn:
        by = f"operator:{authorize(conn, scope)}"
        row = conn.execute(query.encode(), (discrepancy_id, *values, by)).fetchone()
    assert row is not None
    outcome, detail = row
    match outcome:
        case "not_found":
            raise NoSuchDiscrepancy(discrepancy_id)
        case "refused":
            raise SuretyError(f"{discrepancy_id}: {detail}")
    click.echo(f"{discrepancy_id}: {detail}")


def describe_difference(field: dict[str, Any]) -> str:
    """One differing field with both values; of an amount also the difference, in minor units."""
    here, there = ("nothing" if field[side] is None else field[side] for side in ("here", "there"))
    delta = field["delta_minor"]
    return f"{field['field']}: {here} here, {there} there" + (f" ({delta:+})" if delta is not None else "")


def describe_differences(discrepancy: dict[str, Any]) -> str:
    """The first differing field, and how many more there are."""
    first, *more = discrepancy["fields"]
    return describe_difference(first) + (f" and {len(more)} more" if more else "")


def describe_urgency(discrepancy: dict[str, Any]) -> str:
    """The severity of an open discrepancy, else snoozed or closed."""
    return str(discrepancy["severity"] if discrepancy["status"] == "open" else discrepancy["status"])
