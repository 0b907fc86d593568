"""The faults of a run, each with its count and the counted consequence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from app.local.demo.checks import Connection, query_count
from app.local.demo.sandbox_record import SandboxRecord


@dataclass(slots=True)
class KilledWorker:
    """A killed worker, and the events that it held at its death, by handler."""

    name: str
    held: dict[str, list[str]] = field(default_factory=dict)

    @property
    def held_count(self) -> int:
        """The number of events it held."""
        return sum(map(len, self.held.values()))


def count_taken_over(conn: Connection, kill: KilledWorker) -> int:
    """Events of a killed worker that another one has finished since."""
    unfinished = sum(
        query_count(
            conn,
            """
            select count(*) from unnest(%s::text[]) as held (event_id)
            where exists (
                select from outbox.batches as b where b.handler = %s and held.event_id = any(b.event_ids)
            ) or exists (
                select from outbox.retries as r where r.handler = %s and r.event_id = held.event_id
            ) or exists (
                select from outbox.dead_letters as d
                where d.handler = %s and d.event_id = held.event_id and d.closed_at is null
            )
            """,
            event_ids,
            *(handler,) * 3,
        )
        for handler, event_ids in kill.held.items()
    )
    return kill.held_count - unfinished


def describe_faults(conn: Connection, record: SandboxRecord, kill: KilledWorker | None) -> list[dict[str, Any]]:
    """Rows of `count`, `what` and `became`, without faults that did not happen. Every number in a row is counted."""
    injected, effects = Counter[str](), Counter[str]()
    for row in record.faults["injected"]:
        injected[row["fault"]] += row["count"]
        effects[row["fault"]] += row["took_effect"]

    def calls(what: str, *faults: str) -> tuple[int, str]:
        took_effect = sum(effects[fault] for fault in faults)
        return sum(injected[fault] for fault in faults), f"{what} ({took_effect} took effect)"

    webhooks = record.webhooks
    second_charges, second_refunds = len(record.charges_summary["double"]), len(record.refunds_summary["double"])
    repeated_calls = query_count(conn, "select count(*) from surety.calls where sends > 1")
    stored = query_count(conn, "select count(*) from surety.provider_events")
    rejected = query_count(conn, "select count(*) from surety.rejected_webhooks")
    ignored = query_count(conn, "select count(*) from audit.entries where kind = 'answer' and outcome = 'ignored'")
    rows = [
        (
            *calls("provider timeouts", "timeout_before", "timeout_after"),
            f"{second_charges} second charges, {second_refunds} second refunds",
        ),
        (
            *calls("errors 500 of the provider", "error_500_before", "error_500_after"),
            f"{repeated_calls} calls in all were sent more than once",
        ),
        (*calls("answers cut off or garbled", "reset", "garbage_200"), ""),
        (*calls("answers without optional fields", "sparse_200"), ""),
        (*calls("answers 429 and 409", "rate_limit_429", "conflict_409"), ""),
        (
            webhooks["repeated"],
            "webhooks repeated",
            f"{webhooks['delivered']} deliveries accepted, {stored} events stored",
        ),
        (webhooks["reordered"], "webhooks held back", f"{webhooks['overtaken']} delivered after a newer one"),
        (webhooks["lost"], "webhooks lost", describe_polling(conn)),
        (webhooks["forged"], "webhooks with a wrong signature", f"{rejected} rejected and stored as evidence"),
        (
            webhooks["sparse"] + webhooks["thin"],
            "webhooks without optional fields, or thin",
            "their objects were fetched",
        ),
        (webhooks["other_mode"], "webhooks of the other mode", f"{ignored} ignored"),
        *describe_kill(conn, kill),
        *describe_dead_letters(conn),
    ]
    return [{"count": count, "what": what, "became": became} for count, what, became in rows if count]


def describe_polling(conn: Connection) -> str:
    """How many payments learned their outcome by polling, and the longest time that took."""
    row = conn.execute(
        """
        select count(distinct f.payment_id), max(extract(epoch from f.recorded_at - s.at))
        from surety.facts as f
        join surety.steps as s on s.payment_id = f.payment_id and s.to_state = 'provider_submitted'
        where f.kind in ('captured', 'failed', 'canceled') and f.source = 'poll'
        """
    ).fetchone()
    assert row is not None
    polled, seconds = row
    found = f"{polled} payment outcomes found by polling"
    return found if seconds is None else f"{found}, {seconds:.1f} s after submission at most"


def describe_kill(conn: Connection, kill: KilledWorker | None) -> list[tuple[int, str, str]]:
    """A row about the killed worker, if there was one."""
    if kill is None:
        return []
    taken_over = count_taken_over(conn, kill)
    return [(1, f"worker killed, {kill.held_count} events held", f"{taken_over} finished by another worker")]


def describe_dead_letters(conn: Connection) -> list[tuple[int, str, str]]:
    """A row about events that failed until they became dead letters."""
    row = conn.execute(
        "select count(*), count(*) filter (where closed_as = 'replayed'), count(*) filter (where closed_at is null)"
        " from outbox.dead_letters"
    ).fetchone()
    assert row is not None
    total, replayed, still_open = row
    return [(total, "dead letters", f"{replayed} replayed, {still_open} open")]
