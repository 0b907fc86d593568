"""A refund's life: requested, pending or waiting for its payer, succeeded; it can fail after it succeeded.

Follows https://docs.stripe.com/refunds. The wording of refusals was seen in Stripe's test mode. Not verified: that the
amount of a refund leaves the balance at the request, whatever its status.
"""

from typing import Any

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import StripeError, invalid_request
from app.sandbox.stripe.events import emit
from app.sandbox.stripe.objects import balance, fraud_warnings, payloads
from app.sandbox.stripe.objects.currencies import check_step, format_amount
from app.sandbox.stripe.parameters import CreateRefund, Parameters, UpdateRefund, merge_metadata
from app.sandbox.stripe.queries import card_of, find_owned

EFFECTIVE_STATUSES = frozenset({"pending", "requires_action", "succeeded"})
"""Statuses in which the payer has the money or will get it."""

PAYER_ACTION_SECONDS = 45 * 86400


def create(sandbox: Sandbox, account: str, given: CreateRefund) -> StoredObject:
    """Refund a captured charge: the rest of it, or an amount in minor units."""
    charge = _charge(sandbox, account, given)
    if given.amount is not None and given.amount < 1:
        raise invalid_request(
            "This value must be greater than or equal to 1.", param="amount", code="parameter_invalid_integer"
        )
    left = charge.body["amount_captured"] - charge.body["amount_refunded"]
    _check_refundable(sandbox, charge, left, given.amount)
    amount = left if given.amount is None else given.amount
    check_step(amount, charge.body["currency"], "amount")
    memory, created = sandbox.memory, sandbox.unix_seconds()
    id = memory.unused_id("re", account, (sandbox.call and sandbox.call.key) or f"#{memory.next_seq()}")
    body = payloads.refund(id, charge.body, amount, given.reason, merge_metadata({}, given.metadata), created)
    refund = StoredObject(id, "refund", account, created, body, parent=charge.id)
    _begin(sandbox, refund, charge, given.instructions_email)
    line = balance.book_movement(sandbox, refund, -amount, type="refund", description=_description(charge))
    body["balance_transaction"] = line.id
    memory.save(refund)
    charge.body["amount_refunded"] += amount
    charge.body["refunded"] = charge.body["amount_refunded"] >= charge.body["amount_captured"]
    memory.save(charge)
    emit(sandbox, "refund.created", refund)
    emit(sandbox, "charge.refunded", charge)
    if charge.body["refunded"]:
        fraud_warnings.close_warnings(sandbox, charge)
    return refund


def _charge(sandbox: Sandbox, account: str, given: CreateRefund) -> StoredObject:
    """The captured charge to refund."""
    if given.charge:
        charge = find_owned(sandbox, "charge", account, given.charge)
        if given.payment_intent not in (None, charge.body["payment_intent"]):
            raise invalid_request("The charge does not belong to this PaymentIntent.", param="charge")
    elif given.payment_intent:
        intent = find_owned(sandbox, "payment_intent", account, given.payment_intent)
        if not intent.body["latest_charge"]:
            raise _nothing_to_refund(intent.id)
        charge = sandbox.memory.get(intent.body["latest_charge"])
    else:
        raise invalid_request(
            "One of the following params should be provided for this request: payment_intent or charge."
        )
    if not charge.body["captured"]:
        raise _nothing_to_refund(charge.body["payment_intent"])
    return charge


def _nothing_to_refund(intent_id: str) -> StripeError:
    return StripeError(
        400, f"This PaymentIntent ({intent_id}) does not have a successful charge to refund.", stored=True
    )


def _check_refundable(sandbox: Sandbox, charge: StoredObject, left: int, amount: int | None) -> None:
    if any(not dispute.body["is_charge_refundable"] for dispute in sandbox.memory.children(charge.id, "dispute")):
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
            f"Refund amount ({format_amount(amount, currency)}) is greater than unrefunded amount on charge"
            f" ({format_amount(left, currency)})",
            param="amount",
            stored=True,
        )


def _begin(sandbox: Sandbox, refund: StoredObject, charge: StoredObject, email: str | None) -> None:
    """Set the initial status and schedule the later one, by the test card."""
    delay_seconds = sandbox.settings.refund_seconds
    match card_of(sandbox, charge.body["payment_method"]).refunds:
        case "succeed":
            sandbox.schedule(delay_seconds, "refund_referenced", refund.id)
        case "pend":
            refund.body.update(status="pending", pending_reason="processing")
            sandbox.schedule(delay_seconds, "refund_succeeds", refund.id)
        case "fail_late":
            sandbox.schedule(delay_seconds, "refund_fails", refund.id)
        case "need_action":
            sent = {"email_sent_at": sandbox.unix_seconds(), "email_sent_to": email or "payer@example.com"}
            expires_at = sandbox.unix_seconds() + PAYER_ACTION_SECONDS
            refund.body.update(
                status="requires_action",
                next_action={
                    "type": "display_details",
                    "display_details": {"email_sent": sent, "expires_at": expires_at},
                },
            )
            sandbox.schedule(PAYER_ACTION_SECONDS, "refund_unanswered", refund.id)


def _description(charge: StoredObject) -> str:
    said = charge.body["description"]
    return f"REFUND FOR CHARGE ({said})" if said else "REFUND FOR CHARGE"


def update(sandbox: Sandbox, refund: StoredObject, given: UpdateRefund) -> StoredObject:
    """Change a refund's metadata, the only thing that can be changed."""
    before = refund.body["metadata"]
    _change(sandbox, refund, {"metadata": before}, metadata=merge_metadata(before, given.metadata))
    return refund


def cancel(sandbox: Sandbox, refund: StoredObject, given: Parameters) -> StoredObject:
    """Cancel a refund that waits for its payer; no other can be canceled."""
    if refund.body["status"] != "requires_action":
        raise StripeError(400, "Canceling this refund is unsupported.", stored=True)
    _give_back(sandbox, refund, "canceled", "merchant_request")
    return refund


def add_reference(sandbox: Sandbox, refund: StoredObject) -> None:
    """The reference for the payer's bank becomes available."""
    details = {**refund.body["destination_details"]["card"], "reference": refund.id[-23:].upper()}
    before = {"destination_details": refund.body["destination_details"]}
    details["reference_status"] = "available"
    _change(sandbox, refund, before, destination_details={"card": details, "type": "card"})


def succeed(sandbox: Sandbox, refund: StoredObject) -> None:
    """A pending refund, or one that waited for its payer, succeeds."""
    status = refund.body["status"]
    if status in ("pending", "requires_action"):
        refund.body.pop("pending_reason", None)
        refund.body.pop("next_action", None)
        _change(sandbox, refund, {"status": status}, status="succeeded")


def fail_refund(sandbox: Sandbox, refund: StoredObject, reason: str = "expired_or_canceled_card") -> None:
    """A refund fails, possibly after it succeeded: the money comes back."""
    if refund.body["status"] in EFFECTIVE_STATUSES:
        _give_back(sandbox, refund, "failed", reason)
        emit(sandbox, "refund.failed", refund)


def expire_action(sandbox: Sandbox, refund: StoredObject) -> None:
    """Fail a refund whose payer did not act in time."""
    if refund.body["status"] == "requires_action":
        fail_refund(sandbox, refund, "unknown")


def fail_unfinished(sandbox: Sandbox, charge: StoredObject) -> None:
    """Fail the unfinished refunds of a charge whose chargeback withdrew the money."""
    for refund in sandbox.memory.children(charge.id, "refund"):
        if refund.body["status"] in ("pending", "requires_action"):
            fail_refund(sandbox, refund, "charge_for_pending_refund_disputed")


def _give_back(sandbox: Sandbox, refund: StoredObject, status: str, reason: str) -> None:
    amount, was = refund.body["amount"], refund.body["status"]
    charge = sandbox.memory.get(refund.body["charge"])
    charge.body.update(amount_refunded=charge.body["amount_refunded"] - amount, refunded=False)
    sandbox.memory.save(charge)
    line = balance.book_movement(sandbox, refund, amount, type="refund_failure", description="REFUND FAILURE")
    refund.body.pop("pending_reason", None)
    refund.body.pop("next_action", None)
    before = {"status": was, "failure_reason": None, "failure_balance_transaction": None}
    _change(sandbox, refund, before, status=status, failure_reason=reason, failure_balance_transaction=line.id)


def _change(sandbox: Sandbox, refund: StoredObject, before: dict[str, Any], **changed: Any) -> None:
    refund.body.update(changed)
    sandbox.memory.save(refund)
    emit(sandbox, "refund.updated", refund, before)
    emit(sandbox, "charge.refund.updated", refund, before)
