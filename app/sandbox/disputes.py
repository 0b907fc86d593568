"""A dispute's life: an inquiry or a chargeback, evidence, the bank's decision, and what may come after it.

Follows https://docs.stripe.com/disputes; amounts, fee, refusals and the order of events were seen in Stripe's test
mode. Not verified: that evidence is refused after it was submitted, what a partial loss, a reinstatement, an appeal
and a prevented dispute look like, and that no evidence for an inquiry keeps it open for 120 days.
"""

from typing import Any

from app.sandbox import fraud, money, refunds, shapes
from app.sandbox.errors import StripeError, invalid_request
from app.sandbox.memory import StoredObject
from app.sandbox.parameters import Parameters, UpdateDispute, merge_metadata
from app.sandbox.world import World

FEE_MINOR = 1500
ENDED = frozenset({"won", "lost", "prevented", "warning_closed"})
SUBMITTED = {
    "needs_response": "under_review",
    "warning_needs_response": "warning_under_review",
    "appeal_needs_response": "appeal_under_review",
}
"""What becomes of a status when evidence is submitted."""

EVIDENCE_LENGTH_MAX = 150_000
WINNING, LOSING, ESCALATING = "winning_evidence", "losing_evidence", "escalate_inquiry_evidence"
"""What Stripe's test mode takes for a decision, as `uncategorized_text`."""


def schedule_dispute(world: World, charge: StoredObject) -> None:
    """Let the holder of a captured charge's card dispute it later, if the card is one of those."""
    card = world.card_of(charge.body["payment_method"])
    if card.dispute:
        world.plan(world.settings.dispute_seconds, "holder_disputes", charge.id)
    if card.fraud_warning:
        world.plan(world.settings.dispute_seconds, "issuer_warns", charge.id)


def open_after_charge(world: World, charge: StoredObject) -> None:
    """The holder of a test card disputes the charge, in the card's way."""
    what = world.card_of(charge.body["payment_method"]).dispute
    if what == "inquiry":
        open_dispute(world, charge, "fraudulent", inquiry=True)
    elif what:
        open_dispute(world, charge, what)


def open_dispute(
    world: World, charge: StoredObject, reason: str, *, inquiry: bool = False, amount: int | None = None
) -> StoredObject:
    """A holder disputes a charge: what is left of it after refunds, else all of it, or an amount of minor units."""
    captured = charge.body["amount_captured"]
    amount = amount or captured - charge.body["amount_refunded"] or captured
    if not captured or amount > captured:
        raise invalid_request(f"The charge has captured {captured}.", param="amount")
    id, created = world.memory.unused_id("du", charge.id), world.unix_seconds()
    due_by = int(created + world.settings.response_seconds)
    body = shapes.dispute(id, charge.body, amount, reason, created, due_by, inquiry=inquiry)
    dispute = world.memory.save(StoredObject(id, "dispute", charge.account, created, body, parent=charge.id))
    charge.body["disputed"] = True
    world.memory.save(charge)
    if inquiry:
        world.emit("charge.dispute.created", dispute)
        world.plan(world.settings.inquiry_seconds, "inquiry_ends", id)
    else:
        _withdraw(world, dispute, FEE_MINOR)
        world.emit("charge.dispute.created", dispute)
        world.emit("charge.dispute.funds_withdrawn", dispute)
        refunds.fail_unfinished(world, charge)
    world.plan(world.settings.response_seconds, "dispute_past_due", id)
    fraud.close_warnings(world, charge)
    return dispute


def update(world: World, dispute: StoredObject, given: UpdateDispute) -> StoredObject:
    """Keep evidence; unless it says otherwise it goes to the bank at once, and that only once."""
    body = dispute.body
    _check_evidence(given.evidence)
    if body["status"] in ENDED:
        raise _already_closed()
    if given.evidence and body["status"] not in SUBMITTED:
        raise StripeError(400, "This dispute's evidence has already been submitted.", stored=True)
    body["metadata"] = merge_metadata(body["metadata"], given.metadata)
    body["evidence"] = {**body["evidence"], **{name: text or None for name, text in given.evidence.items()}}
    details = {**body["evidence_details"], "has_evidence": any(body["evidence"][name] for name in shapes.EVIDENCE)}
    submits = given.submit if given.submit is not None else bool(given.evidence)
    if submits and details["has_evidence"] and body["status"] in SUBMITTED:
        details.update(submission_count=details["submission_count"] + 1, submission_method="manual")
        body["status"] = SUBMITTED[body["status"]]
        world.plan(world.settings.decision_seconds, "dispute_decided", dispute.id)
    body["evidence_details"] = details
    world.memory.save(dispute)
    world.emit("charge.dispute.updated", dispute)
    return dispute


def close(world: World, dispute: StoredObject, given: Parameters) -> StoredObject:
    """The merchant gives in."""
    if dispute.body["status"] in ENDED:
        raise _already_closed()
    lose(world, dispute)
    return dispute


def decide_by_evidence(world: World, dispute: StoredObject) -> None:
    """The bank has read the evidence; it knows what to make of three texts only."""
    said, status = dispute.body["evidence"]["uncategorized_text"], dispute.body["status"]
    if status == "warning_under_review":
        if said == ESCALATING:
            escalate(world, dispute)
        elif said in (WINNING, LOSING):
            end_inquiry(world, dispute)
    elif status in ("under_review", "appeal_under_review"):
        if said == WINNING:
            win(world, dispute)
        elif said == LOSING:
            lose(world, dispute)


def miss_deadline(world: World, dispute: StoredObject) -> None:
    """No evidence was submitted in time, unless it is due later by now."""
    if dispute.body["status"] in SUBMITTED and dispute.body["evidence_details"]["due_by"] <= world.memory.now():
        dispute.body["evidence_details"] = {**dispute.body["evidence_details"], "past_due": True}
        if dispute.body["status"] == "warning_needs_response":
            world.memory.save(dispute)
            world.emit("charge.dispute.updated", dispute)
        else:
            lose(world, dispute)


def win(world: World, dispute: StoredObject) -> None:
    """The bank decides for the merchant: the money comes back, the fee doesn't. Also what a reinstatement is."""
    _reinstate(world, dispute, -dispute.net)
    _end(world, dispute, "won")


def lose(world: World, dispute: StoredObject) -> None:
    """The bank decides for the holder: the money stays where it is."""
    _end(world, dispute, "lost")


def lose_partly(world: World, dispute: StoredObject, returned: int) -> None:
    """The bank decides for both: so many minor units come back."""
    _reinstate(world, dispute, returned)
    _end(world, dispute, "lost")


def appeal(world: World, dispute: StoredObject) -> None:
    """A lost dispute is opened once more."""
    if dispute.body["status"] != "lost":
        raise invalid_request("Only a lost dispute can be appealed.", param="outcome")
    _ask_again(world, dispute)
    _set_status(world, dispute, "appeal_needs_response")


def escalate(world: World, dispute: StoredObject) -> None:
    """An inquiry becomes a chargeback."""
    body = dispute.body
    if not body["status"].startswith("warning_"):
        raise invalid_request("Only an inquiry can be escalated.", param="outcome")
    card = body["payment_method_details"]["card"]
    code = shapes.NETWORK_REASONS.get(body["reason"])
    body["payment_method_details"] = {
        "card": {**card, "case_type": "chargeback", "network_reason_code": code},
        "type": "card",
    }
    body["is_charge_refundable"] = False
    _withdraw(world, dispute, FEE_MINOR)
    _ask_again(world, dispute)
    _set_status(world, dispute, "needs_response")
    world.emit("charge.dispute.funds_withdrawn", dispute)
    refunds.fail_unfinished(world, world.memory.get(body["charge"]))


def prevent(world: World, dispute: StoredObject) -> None:
    """An inquiry is resolved before it becomes a chargeback: the holder has his money, there is no fee."""
    _withdraw(world, dispute, 0)
    dispute.body["is_charge_refundable"] = False
    world.memory.save(dispute)
    world.emit("charge.dispute.funds_withdrawn", dispute)
    _end(world, dispute, "prevented")


def end_inquiry(world: World, dispute: StoredObject) -> None:
    """Nobody escalated it."""
    if dispute.body["status"].startswith("warning_") and dispute.body["status"] not in ENDED:
        _end(world, dispute, "warning_closed")


def _ask_again(world: World, dispute: StoredObject) -> None:
    """Evidence is due anew."""
    due_by = int(world.unix_seconds() + world.settings.response_seconds)
    details = dispute.body["evidence_details"]
    dispute.body["evidence_details"] = {**details, "due_by": due_by, "past_due": False}
    world.plan(world.settings.response_seconds, "dispute_past_due", dispute.id)


def _withdraw(world: World, dispute: StoredObject, fee: int) -> None:
    said = f"Chargeback withdrawal for {dispute.body['charge']}"
    _move(world, dispute, -dispute.body["amount"], "dispute", said, fee)


def _reinstate(world: World, dispute: StoredObject, amount: int) -> None:
    if amount:
        _move(world, dispute, amount, "dispute_reversal", f"Chargeback reversal for {dispute.body['charge']}", 0)
        world.emit("charge.dispute.funds_reinstated", dispute)


def _move(world: World, dispute: StoredObject, amount: int, category: str, said: str, fee: int) -> None:
    line = money.book_movement(
        world, dispute, amount, type="adjustment", reporting_category=category, description=said, fee=fee
    )
    dispute.body["balance_transactions"] = [*dispute.body["balance_transactions"], line.body]
    dispute.net += amount
    world.memory.save(dispute)


def _set_status(world: World, dispute: StoredObject, status: str) -> None:
    before = {"status": dispute.body["status"]}
    dispute.body["status"] = status
    world.memory.save(dispute)
    world.emit("charge.dispute.updated", dispute, before)


def _end(world: World, dispute: StoredObject, status: str) -> None:
    before = {"status": dispute.body["status"]}
    dispute.body.update(status=status, is_charge_refundable=status in ("won", "warning_closed"))
    world.memory.save(dispute)
    world.emit("charge.dispute.closed", dispute, before)


def _check_evidence(evidence: dict[str, Any]) -> None:
    for name in evidence:
        if name not in shapes.EVIDENCE:
            said = f"evidence[{name}]"
            raise invalid_request(f"Received unknown parameter: {said}", param=said, code="parameter_unknown")
    if sum(map(len, evidence.values())) > EVIDENCE_LENGTH_MAX:
        raise invalid_request(f"Evidence has at most {EVIDENCE_LENGTH_MAX} characters.", param="evidence")


def _already_closed() -> StripeError:
    return StripeError(400, "This dispute is already closed", stored=True)
