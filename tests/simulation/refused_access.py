"""Refusals of our access by the provider: a key is revoked and replaced, an account is cut off and restored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.sandbox.state import KeyState
from app.sandbox.stripe.permissions import Connection, connect_account

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

CONNECTED_ACCOUNT = "acct_simulated"
# The last ones are longer than surety.refused_payment_lifetime().
SECONDS = (30.0, 7200.0, 200_000.0)
LONG_SECONDS = (900.0, 90_000.0, 8 * 86_400.0)
REFUSED_KEYS: tuple[KeyState, ...] = ("revoked", "expired")


def begin_refusal(schedule: Schedule) -> float:
    """Refuse the key or the account of one merchant; returns until when, in the schedule's seconds."""
    chance, sandbox = schedule.chance, schedule.provider.sandbox
    seconds = chance.choice(LONG_SECONDS if schedule.plan.days else SECONDS)
    if chance.random() < 0.5:
        sandbox.key_state = chance.choice(REFUSED_KEYS)
    else:
        connect_account(sandbox, Connection(CONNECTED_ACCOUNT, connected=False))
    schedule.note("access is refused")
    return schedule.loop.seconds + seconds


def end_refusal(schedule: Schedule) -> None:
    """The key is replaced, the account connected again."""
    check_refusals_uncounted(schedule)
    sandbox = schedule.provider.sandbox
    sandbox.key_state = "valid"
    connect_account(sandbox, Connection(CONNECTED_ACCOUNT, connected=True))
    schedule.note("access is given back")


def check_refusals_uncounted(schedule: Schedule) -> None:
    """A refused call is never a failure of its event."""
    rows = schedule.database.rows(
        "select t.handler, t.event_id from (select handler, event_id, attempts from outbox.retries union all"
        " select handler, event_id, attempts from outbox.dead_letters) as t"
        " cross join jsonb_array_elements(t.attempts) as a where a ->> 'error' ~ '^Stripe 40[13]' and not a ? 'counted'"
    )
    if rows:
        schedule.report_violation("refusals of access are not counted", str(min(rows)))


def check_refused_payments(schedule: Schedule) -> None:
    """A payment that ended because the provider has surely not executed it is not there."""
    at_provider = {
        intent.body["metadata"].get("surety_payment")
        for intent in schedule.provider.memory.all_of_kind("payment_intent")
    }
    rows = schedule.database.rows(
        "select p.id from surety.payments as p join surety.steps as s on s.payment_id = p.id"
        " where s.from_state in ('initiated', 'submitting') and s.to_state = 'canceled'"
        " or p.failure ->> 'code' = 'provider_account_refused'"
    )
    if executed := sorted({payment_id for (payment_id,) in rows} & at_provider):
        schedule.report_violation("what ended as never executed is not at the provider", executed[0])
