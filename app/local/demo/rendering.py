"""The report of a run as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.local.demo.report import Report


def format_milliseconds(ms: float) -> str:
    """Milliseconds as text: 38 ms, 1.9 s."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def render_report(report: Report) -> RenderableType:
    """The report for a terminal."""
    ends = make_table("Final states", "")
    for state, count in report.states.items():
        ends.add_row(f"  {state}", str(count))
    times = make_table("State to state", "p50", "p99")
    for stage in report.stages:
        times.add_row(f"  {stage['name']}", format_milliseconds(stage["p50_ms"]), format_milliseconds(stage["p99_ms"]))
    later = make_table("After the charge", "")
    for what, count in report.afterwards.items():
        if count:
            later.add_row(f"  {what}", str(count))
    top = Table.grid(padding=(0, 4))
    top.add_row(ends, later, times)

    wrong = Table(box=None, pad_edge=False)
    wrong.add_column("What went wrong", no_wrap=True)
    wrong.add_column("What was counted", style="dim")
    for fault in report.faults["observed"]:
        wrong.add_row(f"{fault['count']:>4} {fault['what']}", fault["became"])

    invariants = make_table("Invariants", "violations")
    for name, violations in report.invariants.items():
        invariants.add_row(f"  {name}", Text(str(violations), style="red bold" if violations else ""))
    same = "=" if report.charges_at_provider == report.confirmed_here else "≠"
    tally = f"charged at the provider: {report.charges_at_provider} {same} confirmed here: {report.confirmed_here}"
    return Group(top, "", wrong, "", invariants, tally)


def make_table(first: str, *numbers: str) -> Table:
    """A table without lines: a text column, and right-aligned numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
