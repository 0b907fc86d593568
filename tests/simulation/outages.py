"""Provider outages of all calls or of writes only. Failures during an outage must not count against events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from app.sandbox.faults import RequestFault

if TYPE_CHECKING:
    from app.sandbox.connections import SandboxResponse
    from app.sandbox.stripe.requests import StripeRequest
    from tests.simulation.database import SimulatedDatabase
    from tests.simulation.schedule import Schedule

SECONDS = (30.0, 300.0, 7200.0)
LONG_SECONDS = (*SECONDS, 2 * 86_400.0, 12 * 86_400.0)
FORMS: tuple[RequestFault, ...] = (
    "timeout_before",
    "timeout_after",
    "reset",
    "error_500_before",
    "error_500_after",
    "garbage_200",
)
# Statements that may open a circuit.
CIRCUIT_STATEMENTS = frozenset({"surety.count_call_results", "surety.open_circuit"})


class Outage(Struct):
    """How every call fails until the provider recovers. Times are in the schedule's seconds."""

    form: RequestFault
    is_whole: bool
    """Whether reads fail as well."""
    silent_since: float
    """When the last answer before the outage arrived."""
    until: float
    first: StripeRequest
    """The first call that failed."""

    def answers(self, response: SandboxResponse) -> bool:
        """Whether a response is an answer: an outage of 500s still refuses requests and replays answers."""
        return self.form.startswith("error_500") and response.status < 500


class CircuitState(Struct, frozen=True):
    """The open circuits, and the retries that no other transaction has locked, before a circuit may open."""

    opened: frozenset[str]
    free: frozenset[tuple[str, str]]


def start_outage(schedule: Schedule, first: StripeRequest, answered_at: float) -> Outage:
    """An outage that begins now."""
    chance, now = schedule.chance, schedule.loop.seconds
    seconds = chance.choice(LONG_SECONDS if schedule.plan.days else SECONDS)
    return Outage(chance.choice(FORMS), chance.random() < 0.7, answered_at, now + seconds, first)


def find_open_circuits(database: SimulatedDatabase) -> CircuitState:
    """The present state."""
    rows = database.rows(
        "with free as"
        " (select handler, event_id from outbox.retries where blocked_by is not null for update skip locked)"
        " select surety.circuit_key(provider, account), null from surety.circuit_breakers where opened_at is not null"
        " union all select handler, event_id from free"
    )
    opened = frozenset(key for key, event_id in rows if event_id is None)
    return CircuitState(opened, frozenset((handler, event_id) for handler, event_id in rows if event_id is not None))


def check_failures_uncounted(schedule: Schedule, found: CircuitState) -> None:
    """Failures just before a circuit opened are not counted."""
    if not found.free:
        return
    rows = schedule.database.rows(
        "select r.handler, r.event_id from outbox.retries as r join surety.circuit_breakers as b"
        " on surety.circuit_key(b.provider, b.account) = r.blocked_by cross join jsonb_array_elements(r.attempts) as a"
        " where not r.blocked_by = any(%s) and a ->> 'outage' = r.blocked_by and not a ? 'counted'"
        " and (a ->> 'at')::timestamptz between b.opened_at - interval '119 seconds' and b.opened_at",
        list(found.opened),
    )
    if blamed := found.free.intersection(rows):
        schedule.report_violation("failures before a circuit opened are not counted", str(min(blamed)))


def check_outage_failures_uncounted(schedule: Schedule, outage: Outage) -> None:
    """A call that began and failed while the provider answered nothing is not counted."""
    # In months no worker runs between visits, so no probe finds such an outage within a minute.
    if not outage.is_whole or schedule.plan.days:
        return
    rows = schedule.database.rows(
        "select t.handler, t.event_id from (select handler, event_id, attempts from outbox.retries union all"
        " select handler, event_id, attempts from outbox.dead_letters) as t"
        " join outbox.events as e on e.id = t.event_id cross join jsonb_array_elements(t.attempts) as a"
        # Attempts are recorded in whole milliseconds.
        " cross join lateral (select (a ->> 'at')::timestamptz + interval '1 ms' as at) as failed"
        " cross join lateral (select max(c.at) as at from audit.entries as c"
        " where c.payment_id = e.aggregate_id and c.kind = 'call' and c.at <= failed.at"
        " and c.snapshot ->> 'operation' = case t.handler when 'submit' then 'create' else t.handler end) as begun"
        " where a ? 'outage' and not a ? 'counted' and failed.at < to_timestamp(%s) and begun.at > to_timestamp(%s)",
        schedule.started_at + outage.until,
        schedule.started_at + outage.silent_since,
    )
    if rows:
        schedule.report_violation("failures during an outage are not counted", str(min(rows)))
