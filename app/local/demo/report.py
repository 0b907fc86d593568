"""What became of the demo's payments, by the database and by the sandbox's own memory."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import httpx
import msgspec
import psycopg
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

ENDED = ("settled", "partially_refunded", "refunded", "reversed", "failed", "canceled")
Connection = psycopg.Connection[tuple[Any, ...]]


class StateDuration(NamedTuple):
    """How long payments took from one state to the next, in milliseconds."""

    name: str
    p50_ms: float
    p99_ms: float


class Report(msgspec.Struct, kw_only=True):
    """The demo's result; `--json` prints it."""

    payments: int
    states: dict[str, int]
    invariants: dict[str, int]
    charges_at_provider: int
    confirmed_here: int
    double_charges: int
    refunds: int
    """That stand at the provider."""
    double_refunds: int
    disputes: dict[str, int]
    """At the provider, by status."""
    lost: int
    not_ended: int
    seconds: float
    seed: int
    stages: list[dict[str, Any]]
    afterwards: dict[str, int]
    faults: dict[str, Any]
    dead_letters: int
    replayed: int
    example: str | None

    @property
    def is_sound(self) -> bool:
        """Nothing violated, everything ended."""
        twice = self.double_charges or self.double_refunds
        return not (any(self.invariants.values()) or self.lost or twice or self.not_ended)


def count_ended(conn: Connection) -> int:
    """Payments in a final state, of which nothing is being refunded or disputed."""
    row = conn.execute(
        "select count(*) from surety.payments where state = any(%s) and refund_pending_minor = 0 and at_risk_minor = 0",
        (list(ENDED),),
    ).fetchone()
    assert row is not None
    return int(row[0])


def count_unreceived_results(conn: Connection, url: str) -> int:
    """Refunds and disputes of which the provider knows what we don't know yet."""
    with httpx.Client(base_url=url, timeout=30) as client:
        ends = {
            (record["id"], f"{record['object']}_{record['status']}")
            for kind in ("refunds", "disputes")
            for record in client.get(f"/sandbox/{kind}").json()
        }
    known = conn.execute("select object_id, kind from surety.facts where kind ~ '^(refund|dispute)_'")
    return len(ends - {(str(object_id), str(kind)) for object_id, kind in known})


def count_differing_refunds(conn: Connection, at_the_provider: dict[str, int]) -> int:
    """Currencies in which another sum was refunded here than at the provider."""
    rows = conn.execute(
        "select currency, sum(refunded_minor + refund_pending_minor)::bigint from surety.payments group by 1"
    )
    here = {str(currency): int(amount) for currency, amount in rows if amount}
    return len(here.items() ^ at_the_provider.items())


def count_payment_actions(conn: Connection) -> dict[str, int]:
    """How many payments had which story after they were accepted."""
    cursor = conn.execute(
        """
        select
            count(*) filter (where p.captured_minor > 0 and p.capture_method = 'manual') as "captured later",
            count(*) filter (where p.captured_minor between 1 and p.amount_minor - 1) as "of these, in part",
            count(*) filter (where p.state = 'canceled' and p.capture_method = 'manual') as "released",
            count(*) filter (where p.state = 'refunded') as "refunded",
            count(*) filter (where p.state = 'partially_refunded') as "refunded in part",
            count(*) filter (where 'refund_failed' = any(by_payment.kinds)) as "refunds that came back",
            count(*) filter (where 'dispute_won' = any(by_payment.kinds)) as "disputes won",
            count(*) filter (where 'dispute_lost' = any(by_payment.kinds)) as "disputes lost"
        from surety.payments as p
        cross join lateral (
            select array_agg(f.kind) as kinds from surety.facts as f where f.payment_id = p.id
        ) as by_payment
        """
    )
    row = cursor.fetchone()
    assert row is not None and cursor.description is not None
    return {column.name: int(count) for column, count in zip(cursor.description, row, strict=True)}


def measure_state_durations(conn: Connection) -> list[StateDuration]:
    """From accepted to submitted to confirmed to settled, over all payments that got there."""
    stages = (
        ("accepted → submitted", "initiated", "provider_submitted"),
        ("submitted → confirmed", "provider_submitted", "confirmed"),
        ("confirmed → settled", "confirmed", "settled"),
    )
    measured = []
    for name, begin, end in stages:
        row = conn.execute(
            """
            select
                percentile_cont(0.5) within group (order by extract(epoch from later.at - sooner.at) * 1000),
                percentile_cont(0.99) within group (order by extract(epoch from later.at - sooner.at) * 1000)
            from surety.steps as sooner
            join surety.steps as later on later.payment_id = sooner.payment_id and later.to_state = %s
            where sooner.to_state = %s
            """,
            (end, begin),
        ).fetchone()
        if row and row[0] is not None:
            measured.append(StateDuration(name, float(row[0]), float(row[1])))
    return measured


def count_violations(conn: Connection, acknowledged: list[str], sandbox: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Violations by promise, those that need a merchant's or the provider's word first; and how many were lost."""
    lost = conn.execute(
        "select count(*) from unnest(%s::text[]) as acknowledged (id) where not exists"
        " (select from surety.payments as p where p.id = acknowledged.id)",
        (acknowledged,),
    ).fetchone()
    assert lost is not None
    promises: dict[str, int] = {
        "every acknowledged payment is present": int(lost[0]),
        "no payment is charged twice": len(sandbox["double"]),
    }
    checked = conn.execute("select name, violations from surety.check_invariants()")
    return promises | {str(name): int(violations) for name, violations in checked}, int(lost[0])


def find_example(conn: Connection) -> str | None:
    """A payment with a story: refunded in part, and confirmed by its webhook before our answer, if there are such."""
    row = conn.execute(
        """
        select p.id from surety.payments as p
        where p.state in ('settled', 'partially_refunded')
        order by p.state = 'partially_refunded' desc, exists (
            select from surety.facts as f
            where f.payment_id = p.id and f.kind = 'captured' and f.source = 'webhook'
        ) desc, p.id
        limit 1
        """
    ).fetchone()
    return str(row[0]) if row else None


def fetch_sandbox_summaries(url: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The provider's own memory: its charges, the faults it made, the webhooks it sent."""
    with httpx.Client(base_url=url, timeout=30) as client:
        charges = client.get("/sandbox/charges/summary", params={"metadata_key": "surety_payment"}).json()
        return charges, client.get("/sandbox/faults").json(), client.get("/sandbox/webhooks").json()


def fetch_sandbox_returns(url: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The provider's own memory: its refunds, and its disputes by status."""
    with httpx.Client(base_url=url, timeout=30) as client:
        refunds = client.get("/sandbox/refunds/summary", params={"metadata_key": "surety_refund"}).json()
        return refunds, dict(Counter(dispute["status"] for dispute in client.get("/sandbox/disputes").json()))


def format_milliseconds(ms: float) -> str:
    """Milliseconds for people: 38 ms, 1.9 s."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def render_report(report: Report) -> RenderableType:
    """The report for a terminal."""
    ends = make_table("Where they ended", "")
    for state, count in report.states.items():
        ends.add_row(f"  {state}", str(count))
    times = make_table("Stage to stage", "p50", "p99")
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
    wrong.add_column("What became of it", style="dim")
    for fault in report.faults["observed"]:
        wrong.add_row(f"{fault['count']:>4} {fault['what']}", fault["became"])

    promises = make_table("Promises", "violations")
    for name, violations in report.invariants.items():
        promises.add_row(f"  {name}", Text(str(violations), style="red bold" if violations else ""))
    same = "=" if report.charges_at_provider == report.confirmed_here else "≠"
    tally = f"charged at the provider: {report.charges_at_provider} {same} confirmed here: {report.confirmed_here}"
    return Group(top, "", wrong, "", promises, tally)


def make_table(first: str, *numbers: str) -> Table:
    """A table without lines: a text, and numbers at the right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def print_report(console: Console, report: Report) -> None:
    """Print it."""
    console.print(render_report(report))
