"""`surety trace`: the history of one payment."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import click
import psycopg
from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.cli.reading import reads
from app.cli.tables import wide_console
from app.wording import count_noun
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

Connection = psycopg.Connection[tuple[Any, ...]]


class NoSuchPayment(SuretyError):
    """No payment has this id."""


@click.command()
@click.argument("payment_id")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: the summary and all entries.")
@reads
def trace(payment_id: str, as_json: bool) -> None:
    """Show a payment's history, from its request to its settlement."""
    with connect("auditor", load_settings()) as conn:
        if as_json:
            click.echo(json.dumps(read_trace(conn, payment_id), ensure_ascii=False))
        else:
            wide_console().print(render_trace(conn, payment_id))


def read_summary(conn: Connection, payment_id: str) -> dict[str, Any]:
    """The summary of a payment. Raises NoSuchPayment."""
    cursor = conn.execute(
        "select amount, amount_minor, currency, state, merchant, reference, provider_id, charges, refunds, disputes,"
        " steps, transfers, still_open from surety.payment_summary(%s)",
        (payment_id,),
    )
    row = cursor.fetchone()
    if row is None or cursor.description is None:
        raise NoSuchPayment(f"there is no payment {payment_id}")
    return dict(zip((column.name for column in cursor.description), row, strict=True))


def read_entries(conn: Connection, payment_id: str) -> list[dict[str, Any]]:
    """The entries of a payment's trace, the oldest first."""
    cursor = conn.execute(
        "select at, kind, actor, summary, from_state, to_state, outcome, duration_ms, data"
        " from surety.trace_payment(%s)",
        (payment_id,),
    )
    assert cursor.description is not None
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def read_trace(conn: Connection, payment_id: str) -> dict[str, Any]:
    """The summary and all entries, as JSON can hold them."""
    summary = read_summary(conn, payment_id)
    entries = read_entries(conn, payment_id)
    for entry in entries:
        entry["at"] = entry["at"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry["duration_ms"] = None if entry["duration_ms"] is None else float(entry["duration_ms"])
    return {"payment_id": payment_id, **summary, "entries": entries}


def render_trace(conn: Connection, payment_id: str) -> Group:
    """The trace as lines: time, gap to the line before, kind, description. Raises NoSuchPayment."""
    summary = read_summary(conn, payment_id)
    entries = read_entries(conn, payment_id)
    about = " · ".join(part for part in (summary["merchant"], summary["reference"], summary["provider_id"]) if part)
    story = Table.grid(padding=(0, 2))
    story.add_column(no_wrap=True)
    story.add_column(no_wrap=True, justify="right")
    story.add_column(no_wrap=True)
    story.add_column(overflow="fold")
    before: datetime | None = None
    for entry in entries:
        at: datetime = entry["at"]
        is_later = before is None or at - before >= timedelta(milliseconds=1)
        story.add_row(
            f"{at:%H:%M:%S}.{at.microsecond // 1000:03}" if is_later else "",
            format_gap(at - before) if before is not None and is_later else "",
            entry_label(entry),
            describe_entry(entry),
        )
        before = at
    counts = [
        count_noun(summary["charges"], "charge"),
        *(count_noun(summary[noun + "s"], noun) for noun in ("refund", "dispute") if summary[noun + "s"]),
        count_noun(summary["steps"], "step"),
        count_noun(summary["transfers"], "transfer"),
        " · ".join(summary["still_open"]) or "nothing open",
    ]
    day = f"{entries[0]['at']:%Y-%m-%d}" if entries else ""
    head = Text.assemble(
        (payment_id, "bold"), f"   {summary['amount']}   ", (summary["state"], "bold"), f"   {about}   {day}"
    )
    return Group(head, story, Text(" · ".join(counts)))


def entry_label(entry: dict[str, Any]) -> Text:
    """The kind of an entry; a step's state is bold."""
    match entry["kind"]:
        case "request":
            return Text("accepted", "bold")
        case "step":
            return Text(entry["to_state"], "bold")
        case "call":
            arrow = entry["summary"][:1]
            return Text(f"  {arrow} {provider_name(entry)}")
        case "webhook" | "poll" | "file":
            return Text(f"  ← {entry['kind']}")
        case "transfer":
            return Text("  ledger")
        case "bank":
            return Text("  ← bank")
    return Text(f"  {entry['kind']}")


def describe_entry(entry: dict[str, Any]) -> Text:
    """The description of an entry."""
    text: str = entry["summary"]
    match entry["kind"]:
        case "call":
            text = text[1:].lstrip()
            if entry["duration_ms"] is not None:
                text += f", {entry['duration_ms']:.0f} ms"
        case "step":
            text = text.removeprefix(entry["to_state"]).strip()
            if entry["outcome"] == "implied":
                text += ", implied"
    if entry["outcome"] not in {"accepted", "done", "implied", "posted", "recorded", "sent", "ok"}:
        text += "" if entry["outcome"] in text else f" [{entry['outcome']}]"
    return Text(text)


def provider_name(entry: dict[str, Any]) -> str:
    """The provider of a call."""
    return str(entry["data"].get("provider", "stripe")).capitalize()


def format_gap(between: timedelta) -> str:
    """The time since the line before."""
    seconds = between.total_seconds()
    if seconds < 1:
        return f"+{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"+{seconds:.1f} s"
    if seconds < 3600:
        return f"+{seconds / 60:.0f} min"
    return f"+{seconds / 3600:.0f} h"
