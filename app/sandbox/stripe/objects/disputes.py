"""A dispute's life: an inquiry or a chargeback, evidence, the bank's decision, an appeal.

Follows https://docs.stripe.com/disputes. Amounts, fee, refusals and the order of events were seen in test mode.
Not verified: that submitted evidence can't be replaced; the form of a partial loss, a reinstatement, an appeal and a
prevented dispute; the category of an adjustment and that it has an event; that an inquiry without evidence stays open
for 120 days.
"""

from typing import Any

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import StripeError, invalid_request
from app.sandbox.stripe.events import emit
from app.sandbox.stripe.objects import balance, fraud_warnings, payloads, refunds
from app.sandbox.stripe.parameters import Parameters, UpdateDispute, merge_metadata
from app.sandbox.stripe.queries import card_of

FEE_MINOR = 1500
ENDED = frozenset({"won", "lost", "prevented", "warning_closed"})
SUBMITTED = {
    "needs_response": "under_review",
    "warning_needs_response": "warning_under_review",
    "appeal_needs_response": "appeal_under_review",
}
"""The status after evidence is submitted, by the status before."""

EVIDENCE_LENGTH_MAX = 150_000
WINNING, LOSING, ESCALATING = "winning_evidence", "losing_evidence", "escalate_inquiry_evidence"
"""The texts that decide a dispute in Stripe's test mode, as `uncategorized_text`."""


def schedule_dispute(sandbox: Sandbox, charge: StoredObject) -> None:
    """Schedule the dispute or the fraud warning of a captured charge, if its test card has one."""
    card = card_of(sandbox, charge.body["payment_method"])
    if card.dispute:
        sandbox.schedule(sandbox.settings.dispute_seconds, "holder_disputes", charge.id)
    if card.fraud_warning:
        sandbox.schedule(sandbox.settings.dispute_seconds, "issuer_warns", charge.id)


def open_after_charge(sandbox: Sandbox, charge: StoredObject) -> None:
    """Open the dispute that the charge's test card asks for."""
    what = card_of(sandbox, charge.body["payment_method"]).dispute
    if what == "inquiry":
        open_dispute(sandbox, charge, "fraudulent", inquiry=True)
    elif what:
        open_dispute(sandbox, charge, what)


def open_dispute(
    sandbox: Sandbox, charge: StoredObject, reason: str, *, inquiry: bool = False, amount: int | None = None
) -> StoredObject:
    """Open a dispute over an amount in minor units; the default is the charge less its refunds, or all of it."""
    captured = charge.body["amount_captured"]
    amount = amount or captured - charge.body["amount_refunded"] or captured
    if not captured or amount > captured:
        raise invalid_request(f"The charge has captured {captured}.", param="amount")
    id, created = sandbox.memory.unused_id("du", charge.id), sandbox.unix_seconds()
    due_by = int(created + sandbox.settings.response_seconds)
    body = payloads.dispute(id, charge.body, amount, reason, created, due_by, inquiry=inquiry)
    dispute = sandbox.memory.save(StoredObject(id, "dispute", charge.account, created, body, parent=charge.id))
    charge.body["disputed"] = True
    sandbox.memory.save(charge)
    if inquiry:
        emit(sandbox, "charge.dispute.created", dispute)
        sandbox.schedule(sandbox.settings.inquiry_seconds, "inquiry_ends", id)
    else:
        _withdraw(sandbox, dispute, FEE_MINOR)
        emit(sandbox, "charge.dispute.created", dispute)
        emit(sandbox, "charge.dispute.funds_withdrawn", dispute)
        refunds.fail_unfinished(sandbox, charge)
    sandbox.schedule(sandbox.settings.response_seconds, "dispute_past_due", id)
    fraud_warnings.close_warnings(sandbox, charge)
    return dispute


def update(sandbox: Sandbox, dispute: StoredObject, given: UpdateDispute) -> StoredObject:
    """Save evidence and submit it, unless `submit` is false. It is submitted once."""
    body = dispute.body
    _check_evidence(given.evidence)
    if body["status"] in ENDED:
        raise _already_closed()
    if given.evidence and body["status"] not in SUBMITTED:
        raise StripeError(400, "This dispute's evidence has already been submitted.", stored=True)
    body["metadata"] = merge_metadata(body["metadata"], given.metadata)
    body["evidence"] = {**body["evidence"], **{name: text or None for name, text in given.evidence.items()}}
    details = {**body["evidence_details"], "has_evidence": any(body["evidence"][name] for name in payloads.EVIDENCE)}
    submits = given.submit if given.submit is not None else bool(given.evidence)
    if submits and details["has_evidence"] and body["status"] in SUBMITTED:
        details.update(submission_count=details["submission_count"] + 1, submission_method="manual")
        body["status"] = SUBMITTED[body["status"]]
        sandbox.schedule(sandbox.settings.decision_seconds, "dispute_decided", dispute.id)
    body["evidence_details"] = details
    sandbox.memory.save(dispute)
    emit(sandbox, "charge.dispute.updated", dispute)
    return dispute


def close(sandbox: Sandbox, dispute: StoredObject, given: Parameters) -> StoredObject:
    """The merchant accepts the dispute."""
    if dispute.body["status"] in ENDED:
        raise _already_closed()
    lose(sandbox, dispute)
    return dispute


def decide_by_evidence(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Decide by the text of the evidence; other texts decide nothing."""
    said, status = dispute.body["evidence"]["uncategorized_text"], dispute.body["status"]
    if status == "warning_under_review":
        if said == ESCALATING:
            escalate(sandbox, dispute)
        elif said in (WINNING, LOSING):
            end_inquiry(sandbox, dispute)
    elif status in ("under_review", "appeal_under_review"):
        if said == WINNING:
            win(sandbox, dispute)
        elif said == LOSING:
            lose(sandbox, dispute)


def miss_deadline(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Lose the dispute at the deadline for evidence, unless the deadline has moved. An inquiry stays open."""
    if dispute.body["status"] in SUBMITTED and dispute.body["evidence_details"]["due_by"] <= sandbox.memory.now():
        dispute.body["evidence_details"] = {**dispute.body["evidence_details"], "past_due": True}
        if dispute.body["status"] == "warning_needs_response":
            sandbox.memory.save(dispute)
            emit(sandbox, "charge.dispute.updated", dispute)
        else:
            lose(sandbox, dispute)


def win(sandbox: Sandbox, dispute: StoredObject) -> None:
    """The bank decides for the merchant, or reinstates: the amount comes back, the fee does not."""
    _reinstate(sandbox, dispute, -dispute.net)
    _end(sandbox, dispute, "won")


def lose(sandbox: Sandbox, dispute: StoredObject) -> None:
    """The bank decides for the cardholder: no money moves."""
    _end(sandbox, dispute, "lost")


def lose_partly(sandbox: Sandbox, dispute: StoredObject, returned: int) -> None:
    """The bank decides for the cardholder in part: an amount in minor units comes back."""
    _reinstate(sandbox, dispute, returned)
    _end(sandbox, dispute, "lost")


def adjust(sandbox: Sandbox, dispute: StoredObject, returned: int) -> None:
    """A part of a lost dispute comes back later, as an adjustment; the dispute stays lost. An amount in minor units."""
    _move(sandbox, dispute, returned, "other_adjustment", f"Adjustment of lost dispute {dispute.id}", 0)
    emit(sandbox, "charge.dispute.updated", dispute)


def appeal(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Reopen a lost dispute."""
    if dispute.body["status"] != "lost":
        raise invalid_request("Only a lost dispute can be appealed.", param="outcome")
    _ask_again(sandbox, dispute)
    _set_status(sandbox, dispute, "appeal_needs_response")


def escalate(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Turn an inquiry into a chargeback."""
    body = dispute.body
    if not body["status"].startswith("warning_"):
        raise invalid_request("Only an inquiry can be escalated.", param="outcome")
    card = body["payment_method_details"]["card"]
    code = payloads.NETWORK_REASONS.get(body["reason"])
    body["payment_method_details"] = {
        "card": {**card, "case_type": "chargeback", "network_reason_code": code},
        "type": "card",
    }
    body["is_charge_refundable"] = False
    _withdraw(sandbox, dispute, FEE_MINOR)
    _ask_again(sandbox, dispute)
    _set_status(sandbox, dispute, "needs_response")
    emit(sandbox, "charge.dispute.funds_withdrawn", dispute)
    refunds.fail_unfinished(sandbox, sandbox.memory.get(body["charge"]))


def prevent(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Resolve an inquiry before it becomes a chargeback: the cardholder is repaid, without a fee."""
    _withdraw(sandbox, dispute, 0)
    dispute.body["is_charge_refundable"] = False
    sandbox.memory.save(dispute)
    emit(sandbox, "charge.dispute.funds_withdrawn", dispute)
    _end(sandbox, dispute, "prevented")


def end_inquiry(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Close an inquiry that was not escalated."""
    if dispute.body["status"].startswith("warning_") and dispute.body["status"] not in ENDED:
        _end(sandbox, dispute, "warning_closed")


def _ask_again(sandbox: Sandbox, dispute: StoredObject) -> None:
    """Set a new deadline for evidence."""
    due_by = int(sandbox.unix_seconds() + sandbox.settings.response_seconds)
    details = dispute.body["evidence_details"]
    dispute.body["evidence_details"] = {**details, "due_by": due_by, "past_due": False}
    sandbox.schedule(sandbox.settings.response_seconds, "dispute_past_due", dispute.id)


def _withdraw(sandbox: Sandbox, dispute: StoredObject, fee: int) -> None:
    said = f"Chargeback withdrawal for {dispute.body['charge']}"
    _move(sandbox, dispute, -dispute.body["amount"], "dispute", said, fee)


def _reinstate(sandbox: Sandbox, dispute: StoredObject, amount: int) -> None:
    if amount:
        _move(sandbox, dispute, amount, "dispute_reversal", f"Chargeback reversal for {dispute.body['charge']}", 0)
        emit(sandbox, "charge.dispute.funds_reinstated", dispute)


def _move(sandbox: Sandbox, dispute: StoredObject, amount: int, category: str, said: str, fee: int) -> None:
    line = balance.book_movement(
        sandbox, dispute, amount, type="adjustment", reporting_category=category, description=said, fee=fee
    )
    dispute.body["balance_transactions"] = [*dispute.body["balance_transactions"], line.body]
    dispute.net += amount
    sandbox.memory.save(dispute)


def _set_status(sandbox: Sandbox, dispute: StoredObject, status: str) -> None:
    before = {"status": dispute.body["status"]}
    dispute.body["status"] = status
    sandbox.memory.save(dispute)
    emit(sandbox, "charge.dispute.updated", dispute, before)


def _end(sandbox: Sandbox, dispute: StoredObject, status: str) -> None:
    before = {"status": dispute.body["status"]}
    dispute.body.update(status=status, is_charge_refundable=status in ("won", "warning_closed"))
    sandbox.memory.save(dispute)
    emit(sandbox, "charge.dispute.closed", dispute, before)


def _check_evidence(evidence: dict[str, Any]) -> None:
    for name in evidence:
        if name not in payloads.EVIDENCE:
            said = f"evidence[{name}]"
            raise invalid_request(f"Received unknown parameter: {said}", param=said, code="parameter_unknown")
    if sum(map(len, evidence.values())) > EVIDENCE_LENGTH_MAX:
        raise invalid_request(f"Evidence has at most {EVIDENCE_LENGTH_MAX} characters.", param="evidence")


def _already_closed() -> StripeError:
    return StripeError(400, "This dispute is already closed", stored=True)
