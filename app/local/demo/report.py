"""The report of a run: every number is counted in the database or read from the sandbox's record."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import msgspec

from app.local.demo.checks import (
    ACKNOWLEDGED_PRESENT,
    CHARGED_TWICE,
    REFUNDED_TWICE,
    Connection,
    count_differences,
    count_ended,
    count_violations,
    query_count,
)
from app.local.demo.merchants import TrafficResult
from app.local.demo.observed_faults import KilledWorker, describe_faults
from app.local.demo.sandbox_record import SandboxRecord

ACTIONS_ACCEPTED = "every later request of a merchant is accepted"


class StateDuration(NamedTuple):
    """Percentiles of the time from one state to the next, in milliseconds."""

    name: str
    p50_ms: float
    p99_ms: float


class Report(msgspec.Struct, kw_only=True):
    """The demo's result; `--json` prints it."""

    payments: int
    live_payments: int
    """Payments in live mode: all or none."""
    states: dict[str, int]
    invariants: dict[str, int]
    """Violations by invariant."""
    charges_at_provider: int
    confirmed_here: int
    double_charges: int
    refunds: int
    """Refunds that stand at the provider."""
    double_refunds: int
    disputes: dict[str, int]
    """Disputes at the provider, by status."""
    lost: int
    """Acknowledged payments that are missing in the database."""
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
        """Whether no invariant is violated, nothing is lost, nothing was done twice and every payment has ended."""
        wrong = (*self.invariants.values(), self.lost, self.double_charges, self.double_refunds, self.not_ended)
        return not any(wrong)


def make_report(
    conn: Connection,
    record: SandboxRecord,
    traffic: TrafficResult,
    kill: KilledWorker | None,
    *,
    seed: int,
    payments: int,
    seconds: float,
) -> Report:
    """Check and count everything."""
    invariants = count_violations(conn, traffic.acknowledged, record.charges_summary["double"])
    invariants[REFUNDED_TWICE] = len(record.refunds_summary["double"])
    invariants |= count_differences(conn, record)
    invariants[ACTIONS_ACCEPTED] = len(traffic.refused_actions)
    return Report(
        payments=payments,
        live_payments=query_count(conn, "select count(*) from surety.payments where livemode"),
        states=count_states(conn),
        invariants=invariants,
        charges_at_provider=record.charges_summary["charges"],
        confirmed_here=query_count(conn, "select count(*) from surety.payments where captured_minor > 0"),
        double_charges=invariants[CHARGED_TWICE],
        refunds=record.refunds_summary["refunds"],
        double_refunds=invariants[REFUNDED_TWICE],
        disputes=dict(Counter(dispute["status"] for dispute in record.disputes)),
        lost=invariants[ACKNOWLEDGED_PRESENT],
        not_ended=payments - count_ended(conn),
        seconds=round(seconds, 2),
        seed=seed,
        stages=[duration._asdict() for duration in measure_state_durations(conn)],
        afterwards=count_payment_actions(conn),
        faults={"observed": describe_faults(conn, record, kill), "at_the_provider": record.faults["injected"]},
        dead_letters=query_count(conn, "select count(*) from outbox.dead_letters"),
        replayed=query_count(conn, "select count(*) from outbox.dead_letters where closed_as = 'replayed'"),
        example=find_example(conn),
    )


def count_states(conn: Connection) -> dict[str, int]:
    """Payments by state, in the order of a payment's life."""
    rows = conn.execute(
        "select p.state, count(*) from surety.payments as p join surety.states as s on s.state = p.state"
        " group by p.state, s.position order by s.position"
    )
    return {str(state): int(count) for state, count in rows}


def count_payment_actions(conn: Connection) -> dict[str, int]:
    """Payments by what happened to them after they were accepted."""
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
    """From accepted to submitted to confirmed to settled, over all payments that reached the later state."""
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


def find_example(conn: Connection) -> str | None:
    """The id of a settled payment; preferably refunded in part, and confirmed by its webhook before the answer."""
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
