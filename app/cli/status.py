"""`surety status`: what waits, what was given up on, what holds things back, and what to do next."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import psycopg
from rich.console import Console
from rich.table import Table

from app.standing import VERDICTS, Finding, age, judge, verdict_of
from db.connect import harden
from db.settings import load


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def status(as_json: bool) -> None:
    """Tell how things stand. Exit status 0: good, 1: look, 2: act."""
    url = load().require("database_url").reveal()
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        row = conn.execute("select surety.read_status()").fetchone()
    assert row is not None
    state: dict[str, Any] = row[0]
    findings = judge(state)
    urgency = verdict_of(findings)
    if as_json:
        told = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"verdict": VERDICTS[urgency].lower(), "findings": told, **state}))
    else:
        draw(Console(highlight=False), state, findings, urgency)
    sys.exit(urgency)


def draw(console: Console, state: dict[str, Any], findings: list[Finding], urgency: int) -> None:
    """For people."""
    console.print(f"{VERDICTS[urgency]:<6} {findings[0].what if findings else 'all is well'}", style="bold")
    for finding in findings[1:]:
        console.print(f"       {finding.what}")
    table = Table(box=None, pad_edge=False)
    table.add_column("handler")
    for heading in ("backlog", "oldest", "retries due", "suspects", "dead"):
        table.add_column(heading, justify="right")
    for handler in state["handlers"]:
        table.add_row(
            handler["handler"] + (" (paused)" if handler["is_paused"] else ""),
            str(handler["backlog"]),
            age(handler["oldest_seconds"]) if handler["oldest_seconds"] is not None else "–",
            *(str(handler[name]) for name in ("retries_due", "suspects", "dead")),
        )
    console.print(table)
    workers = state["workers"]
    console.print(f"workers  {workers['alive']} alive" + (f", {workers['silent']} silent" if workers["silent"] else ""))
    if unfinished := state["unfinished"]:
        console.print(
            f"oldest unfinished payment  {unfinished['id']}  {age(unfinished['seconds'])}, {unfinished['state']}",
            soft_wrap=True,
        )
    if transaction := state["transaction"]:
        where = f"{transaction['application']} in {transaction['database']}"
        console.print(f"oldest transaction  {age(transaction['seconds'])}, {where}")
    if findings:
        console.print(f"next: {findings[0].next}", markup=False)
