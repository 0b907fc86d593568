"""What others do, on demand: refunds in the dashboard, a refund's later fate, disputes and how banks decide them."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

from app.sandbox import disputes, fraud, refunds
from app.sandbox.errors import invalid_request, not_found
from app.sandbox.memory import StoredObject
from app.sandbox.parameters import CreateRefund
from app.sandbox.reading import render_object
from app.sandbox.world import World


class ChargeReference(Struct, kw_only=True, forbid_unknown_fields=True):
    """Names a captured charge, by its own id or its intent's."""

    charge: str = ""
    payment_intent: str = ""


class DashboardRefund(ChargeReference, kw_only=True):
    """The body of `POST /sandbox/refunds`: somebody refunds in the dashboard."""

    amount: int | None = None
    reason: Literal["duplicate", "fraudulent", "requested_by_customer"] | None = None


class RefundOutcome(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/refunds/{id}`."""

    outcome: Literal["succeeded", "failed"]
    failure_reason: str = "expired_or_canceled_card"


class CardholderDispute(ChargeReference, kw_only=True):
    """The body of `POST /sandbox/disputes`."""

    amount: int | None = None
    reason: str = "fraudulent"
    inquiry: bool = False


class BankDecision(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/disputes/{id}`."""

    outcome: Literal["won", "lost", "partly_lost", "reinstated", "appealed", "escalated", "prevented", "closed"]
    returned: int = 0
    """Minor units that come back of a partly lost dispute."""


DecideDispute = Callable[[World, StoredObject], None]
OPEN = ("needs_response", "under_review", "appeal_needs_response", "appeal_under_review")
INQUIRY = ("warning_needs_response", "warning_under_review")
DECISIONS: dict[str, tuple[tuple[str, ...], DecideDispute]] = {
    "won": (OPEN, disputes.win),
    "lost": (OPEN, disputes.lose),
    "reinstated": (("lost",), disputes.win),
    "appealed": (("lost",), disputes.appeal),
    "escalated": (INQUIRY, disputes.escalate),
    "prevented": (INQUIRY, disputes.prevent),
    "closed": (INQUIRY, disputes.end_inquiry),
}
"""Outcomes by name: in which statuses a bank can decide so, and what comes of it."""


def refund_charge(world: World, given: DashboardRefund) -> dict[str, Any]:
    """A refund that we did not ask for: it carries no metadata, and its events name no request."""
    charge = _charge(world, given)
    asked = CreateRefund(charge=charge.id, amount=given.amount, reason=given.reason)
    return render_object(world, refunds.create(world, charge.account, asked))


def decide_refund(world: World, id: str, given: RefundOutcome) -> dict[str, Any]:
    """A refund succeeds, or fails although it had succeeded."""
    found = _found(world, "refund", id)
    if given.outcome == "succeeded":
        refunds.succeed(world, found)
    else:
        refunds.fail_refund(world, found, given.failure_reason)
    return render_object(world, found)


def dispute_charge(world: World, given: CardholderDispute) -> dict[str, Any]:
    """A holder disputes a charge."""
    charge = _charge(world, given)
    return render_object(
        world, disputes.open_dispute(world, charge, given.reason, inquiry=given.inquiry, amount=given.amount)
    )


def decide_dispute(world: World, id: str, given: BankDecision) -> dict[str, Any]:
    """A bank decides about a dispute, whatever its evidence."""
    found = _found(world, "dispute", id)
    status = found.body["status"]
    statuses, decide = (OPEN, None) if given.outcome == "partly_lost" else DECISIONS[given.outcome]
    if status not in statuses:
        raise invalid_request(f"A dispute that is {status} can't be {given.outcome}.", param="outcome")
    if decide:
        decide(world, found)
    elif 0 < given.returned < -found.net:
        disputes.lose_partly(world, found, given.returned)
    else:
        raise invalid_request(f"Of {-found.net} a part comes back.", param="returned")
    return render_object(world, found)


def warn_of_fraud(world: World, given: ChargeReference) -> dict[str, Any]:
    """An issuer warns of a charge."""
    return render_object(world, fraud.warn(world, _charge(world, given)))


def list_with_metadata(world: World, kind: str) -> list[dict[str, Any]]:
    """All refunds or disputes of all accounts, oldest first, with their payment's metadata and their account."""
    rows = []
    for record in world.memory.all_of_kind(kind):
        charge = world.memory.get(record.body["charge"])
        account = {"account": record.account, "payment_metadata": charge.body["metadata"]}
        rows.append({**render_object(world, record), **account})
    return rows


def refunds_summary(world: World, metadata_key: str) -> dict[str, Any]:
    """How many refunds stand, their sums in minor units, of how many payments, and what was refunded more than once.

    A demand is what the metadata key names on the refund; refunds without it, as those made in the dashboard, count as
    refunds only. One that failed or was canceled gave nothing back and may be made again.
    """
    demands: Counter[str] = Counter()
    standing = [
        record for record in world.memory.all_of_kind("refund") if record.body["status"] in refunds.EFFECTIVE_STATUSES
    ]
    for record in standing:
        if demand := record.body["metadata"].get(metadata_key):
            demands[demand] += 1
    amounts: Counter[str] = Counter()
    for record in standing:
        amounts[record.body["currency"]] += record.body["amount"]
    return {
        "refunds": len(standing),
        "amounts": dict(amounts),
        "payments": len({record.body["charge"] for record in standing}),
        "double": sorted(demand for demand, times in demands.items() if times > 1),
    }


def _charge(world: World, given: ChargeReference) -> StoredObject:
    for record in [world.memory.find(given.charge), *world.memory.children(given.payment_intent or "none", "charge")]:
        if record is not None and record.kind == "charge" and record.body["captured"]:
            return record
    raise not_found("charge", given.charge or given.payment_intent)


def _found(world: World, kind: str, id: str) -> StoredObject:
    record = world.memory.find(id)
    if record is None or record.kind != kind:
        raise not_found(kind, id)
    return record
