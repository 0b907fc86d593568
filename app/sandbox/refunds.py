"""A refund's life: asked for, pending or waiting for its payer, succeeded; it can fail after it succeeded.

Follows https://docs.stripe.com/refunds; the refusals' words were seen in Stripe's test mode. Not verified: that the
money of a refund leaves the balance when it is asked for, whatever its status.
"""

from typing import Any

from app.sandbox import fraud, money, shapes
from app.sandbox.currencies import written
from app.sandbox.errors import StripeError, invalid
from app.sandbox.memory import Record
from app.sandbox.parameters import CreateRefund, Parameters, UpdateRefund, merged
from app.sandbox.reading import owned
from app.sandbox.world import World

STANDING = frozenset({"pending", "requires_action", "succeeded"})
"""Statuses in which the money has gone, or is on its way, to the payer."""

ANSWER_SECONDS = 45 * 86400


def create(world: World, account: str, given: CreateRefund) -> Record:
    """Give a captured charge back, all that is left of it or an amount of minor units."""
    charge = _charge(world, account, given)
    if given.amount is not None and given.amount < 1:
        raise invalid(
            "This value must be greater than or equal to 1.", param="amount", code="parameter_invalid_integer"
        )
    left = charge.body["amount_captured"] - charge.body["amount_refunded"]
    _check_refundable(world, charge, left, given.amount)
    amount = left if given.amount is None else given.amount
    memory, created = world.memory, world.second()
    id = memory.unused_id("re", account, (world.call and world.call.key) or f"#{memory.next_seq()}")
    body = shapes.refund(id, charge.body, amount, given.reason, merged({}, given.metadata), created)
    refund = Record(id, "refund", account, created, body, parent=charge.id)
    _begin(world, refund, charge, given.instructions_email)
    line = money.move(world, refund, -amount, type="refund", description=_description(charge))
    body["balance_transaction"] = line.id
    memory.save(refund)
    charge.body["amount_refunded"] += amount
    charge.body["refunded"] = charge.body["amount_refunded"] >= charge.body["amount_captured"]
    memory.save(charge)
    world.emit("refund.created", refund)
    world.emit("charge.refunded", charge)
    if charge.body["refunded"]:
        fraud.too_late(world, charge)
    return refund


def _charge(world: World, account: str, given: CreateRefund) -> Record:
    """The captured charge that is to be refunded."""
    if given.charge:
        charge = owned(world, "charge", account, given.charge)
        if given.payment_intent not in (None, charge.body["payment_intent"]):
            raise invalid("The charge does not belong to this PaymentIntent.", param="charge")
    elif given.payment_intent:
        intent = owned(world, "payment_intent", account, given.payment_intent)
        if not intent.body["latest_charge"]:
            raise _nothing_to_refund(intent.id)
        charge = world.memory.get(intent.body["latest_charge"])
    else:
        raise invalid("One of the following params should be provided for this request: payment_intent or charge.")
    if not charge.body["captured"]:
        raise _nothing_to_refund(charge.body["payment_intent"])
    return charge


def _nothing_to_refund(intent_id: str) -> StripeError:
    return StripeError(
        400, f"This PaymentIntent ({intent_id}) does not have a successful charge to refund.", stored=True
    )


def _check_refundable(world: World, charge: Record, left: int, amount: int | None) -> None:
    if any(not dispute.body["is_charge_refundable"] for dispute in world.memory.children(charge.id, "dispute")):
        raise StripeError(
            400,
            f"Charge {charge.id} has been charged back; cannot issue a refund.",
            code="charge_disputed",
            stored=True,
        )
    if left == 0:
        raise StripeError(
            400, f"Charge {charge.id} has already been refunded.", code="charge_already_refunded", stored=True
        )
    if amount is not None and amount > left:
        currency = charge.body["currency"]
        raise StripeError(
            400,
            f"Refund amount ({written(amount, currency)}) is greater than unrefunded amount on charge"
            f" ({written(left, currency)})",
            param="amount",
            stored=True,
        )


def _begin(world: World, refund: Record, charge: Record, email: str | None) -> None:
    """The status that it begins with, and what is to become of it."""
    delay_seconds = world.settings.refund_seconds
    match world.card_of(charge.body["payment_method"]).refunds:
        case "succeed":
            world.plan(delay_seconds, "refund_referenced", refund.id)
        case "pend":
            refund.body.update(status="pending", pending_reason="processing")
            world.plan(delay_seconds, "refund_succeeds", refund.id)
        case "fail_late":
            world.plan(delay_seconds, "refund_fails", refund.id)
        case "need_action":
            sent = {"email_sent_at": world.second(), "email_sent_to": email or "payer@example.com"}
            expires_at = world.second() + ANSWER_SECONDS
            refund.body.update(
                status="requires_action",
                next_action={
                    "type": "display_details",
                    "display_details": {"email_sent": sent, "expires_at": expires_at},
                },
            )
            world.plan(ANSWER_SECONDS, "refund_unanswered", refund.id)


def _description(charge: Record) -> str:
    said = charge.body["description"]
    return f"REFUND FOR CHARGE ({said})" if said else "REFUND FOR CHARGE"


def update(world: World, refund: Record, given: UpdateRefund) -> Record:
    """Change a refund's metadata: nothing else of it can be changed."""
    before = refund.body["metadata"]
    _change(world, refund, {"metadata": before}, metadata=merged(before, given.metadata))
    return refund


def cancel(world: World, refund: Record, given: Parameters) -> Record:
    """Call a refund back that waits for its payer; no other can be."""
    if refund.body["status"] != "requires_action":
        raise StripeError(400, "Canceling this refund is unsupported.", stored=True)
    _give_back(world, refund, "canceled", "merchant_request")
    return refund


def refer(world: World, refund: Record) -> None:
    """The payer's bank can now find it by a reference."""
    details = {**refund.body["destination_details"]["card"], "reference": refund.id[-23:].upper()}
    before = {"destination_details": refund.body["destination_details"]}
    details["reference_status"] = "available"
    _change(world, refund, before, destination_details={"card": details, "type": "card"})


def succeed(world: World, refund: Record) -> None:
    """What was pending, or waited for the payer, has arrived."""
    status = refund.body["status"]
    if status in ("pending", "requires_action"):
        refund.body.pop("pending_reason", None)
        refund.body.pop("next_action", None)
        _change(world, refund, {"status": status}, status="succeeded")


def fail(world: World, refund: Record, reason: str = "expired_or_canceled_card") -> None:
    """It can't reach the payer, even if it was thought to have: the money comes back."""
    if refund.body["status"] in STANDING:
        _give_back(world, refund, "failed", reason)
        world.emit("refund.failed", refund)


def give_up(world: World, refund: Record) -> None:
    """The payer was asked what to do with the money and has not answered."""
    if refund.body["status"] == "requires_action":
        fail(world, refund, "unknown")


def fail_unfinished(world: World, charge: Record) -> None:
    """A chargeback takes the money; refunds of the charge that are still under way must not give it a second time."""
    for refund in world.memory.children(charge.id, "refund"):
        if refund.body["status"] in ("pending", "requires_action"):
            fail(world, refund, "charge_for_pending_refund_disputed")


def _give_back(world: World, refund: Record, status: str, reason: str) -> None:
    amount, was = refund.body["amount"], refund.body["status"]
    charge = world.memory.get(refund.body["charge"])
    charge.body.update(amount_refunded=charge.body["amount_refunded"] - amount, refunded=False)
    world.memory.save(charge)
    line = money.move(world, refund, amount, type="refund_failure", description="REFUND FAILURE")
    refund.body.pop("pending_reason", None)
    refund.body.pop("next_action", None)
    before = {"status": was, "failure_reason": None, "failure_balance_transaction": None}
    _change(world, refund, before, status=status, failure_reason=reason, failure_balance_transaction=line.id)


def _change(world: World, refund: Record, before: dict[str, Any], **changed: Any) -> None:
    refund.body.update(changed)
    world.memory.save(refund)
    world.emit("refund.updated", refund, before)
    world.emit("charge.refund.updated", refund, before)
