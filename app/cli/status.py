"""`surety status`: what waits, what was given up on, what holds things back, and what to do next."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click
import psycopg
from rich.console import Console
from rich.table import Table

from db.connect import harden
from db.settings import load

BACKLOG_SECONDS_MAX = 300
TRANSACTION_SECONDS_MAX = 600
PARTITIONS_DAYS_MIN = 21
VERDICTS = ("GOOD", "LOOK", "ACT")


class Finding(NamedTuple):
    """Something that a person should see: how urgent (1 look, 2 act), what, and the next command or place to look."""

    urgency: int
    what: str
    next: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def status(as_json: bool) -> None:
    """Tell how things stand. Exit status 0: good, 1: look, 2: act."""
    url = load().require("database_url").reveal()
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        row = conn.execute("select surety.read_status()").fetchone()
    assert row is not None
    state: dict[str, Any] = row[0]
    findings = sorted(judge(state), key=lambda finding: -finding.urgency)
    urgency = findings[0].urgency if findings else 0
    if as_json:
        told = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"verdict": VERDICTS[urgency].lower(), "findings": told, **state}))
    else:
        draw(Console(highlight=False), state, findings, urgency)
    sys.exit(urgency)


def judge(state: dict[str, Any]) -> list[Finding]:
    """What is not as it should be."""
    found = []
    if state["is_restored_elsewhere"]:
        found.append(Finding(2, "restored from a dump: nothing is accepted", 'surety restored --reason "…"'))
    waiting = [handler for handler in state["handlers"] if handler["backlog"]]
    if not state["workers"]["alive"]:
        urgency = 2 if waiting else 1
        found.append(Finding(urgency, "no worker is alive", "procrastinate --app jobs.app worker"))
    for handler in waiting:
        if (handler["oldest_seconds"] or 0) > BACKLOG_SECONDS_MAX:
            what = f"{handler['handler']} is {age(handler['oldest_seconds'])} behind"
            found.append(Finding(2, what, "more workers, or their logs"))
    if critical := state["discrepancies"]["critical"]:
        what = (
            f"{counted(critical, 'critical discrepancy', 'critical discrepancies')}: {state['discrepancies']['first']}"
        )
        found.append(Finding(2, what, "report.discrepancies"))
    elif opened := state["discrepancies"]["open"]:
        what = f"{counted(opened, 'discrepancy', 'discrepancies')}, the first {state['discrepancies']['first']}"
        found.append(Finding(1, what, "report.discrepancies"))
    letters = state["dead_letters"]
    if letters["open"]:
        what = f"{counted(letters['open'], 'dead letter')}; the oldest has waited {age(letters['oldest_seconds'])}"
        found.append(Finding(1, what, f"surety dead-letters show {letters['first']}"))
    transaction = state["transaction"]
    if transaction and transaction["seconds"] > TRANSACTION_SECONDS_MAX:
        what = f"a transaction is open for {age(transaction['seconds'])} in {transaction['database']}"
        found.append(Finding(1, what, f"select pg_terminate_backend({transaction['pid']})"))
    if days_ahead(state) < PARTITIONS_DAYS_MIN:
        found.append(Finding(2, "partitions run out", "select surety.maintain_partitions()"))
    return found


def days_ahead(state: dict[str, Any]) -> float:
    """For how long there are partitions; their bounds are ids, which begin with hexadecimal milliseconds."""
    until = int(state["partitions_until"], 16) / 1000
    now = datetime.fromisoformat(state["at"]).astimezone(UTC).timestamp()
    return (until - now) / 86_400


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


def age(seconds: float) -> str:
    """A time for people: 40 ms, 12 s, 3 min, 5 h, 2 d."""
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 dead letter, 2 dead letters."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
