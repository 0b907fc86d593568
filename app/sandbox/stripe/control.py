"""The control API's part about Stripe's objects: summaries, dashboard actions, decisions of cardholders and banks."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

from msgspec import Struct, to_builtins

from app.sandbox.memory import StoredObject, encode
from app.sandbox.settings import PLATFORM_ACCOUNT
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import invalid_request, not_found
from app.sandbox.stripe.objects import balance, disputes, fraud_warnings, intents, methods, refunds
from app.sandbox.stripe.parameters import AutomaticMethods, CreateIntent, CreateRefund
from app.sandbox.stripe.queries import render_object

CHUNK_RECORDS = 500


class ChargeReference(Struct, kw_only=True, forbid_unknown_fields=True):
    """Names a captured charge, by its own id or its intent's."""

    charge: str = ""
    payment_intent: str = ""


class DashboardRefund(ChargeReference, kw_only=True):
    """The body of `POST /sandbox/refunds`: a refund made in the dashboard."""

    amount: int | None = None
    reason: Literal["duplicate", "fraudulent", "requested_by_customer"] | None = None


class ForeignCharge(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/foreign-charge`."""

    amount: int = 1234
    currency: str = "usd"
    account: str = PLATFORM_ACCOUNT
    metadata: dict[str, str] = {}


class RefundOutcome(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/refunds/{id}`."""

    outcome: Literal["succeeded", "failed"]
    failure_reason: str = "expired_or_canceled_card"


class PayoutsNow(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/payouts`: all available money is paid out at once."""


class PayoutOutcome(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/payouts/{id}`: a payout arrives, or fails, even after it arrived."""

    outcome: Literal["paid", "failed"]
    failure_code: str = "account_closed"


class ReplacedCard(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/payment-methods/{id}`: what the network says of the card that replaces the old one."""

    exp_month: int
    exp_year: int
    last4: str


class CardholderDispute(ChargeReference, kw_only=True):
    """The body of `POST /sandbox/disputes`."""

    amount: int | None = None
    reason: str = "fraudulent"
    inquiry: bool = False


class BankDecision(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/disputes/{id}`."""

    outcome: Literal[
        "won", "lost", "partly_lost", "adjusted", "reinstated", "appealed", "escalated", "prevented", "closed"
    ]
    returned: int = 0
    """Minor units that come back: of a partly lost dispute, or by an adjustment of a lost one."""


DecideDispute = Callable[[Sandbox, StoredObject], None]
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
"""By outcome, the statuses in which a bank can decide so, and the function that applies it."""

PARTS: dict[str, tuple[tuple[str, ...], Callable[[Sandbox, StoredObject, int], None]]] = {
    "partly_lost": (OPEN, disputes.lose_partly),
    "adjusted": (("lost",), disputes.adjust),
}
"""The same for outcomes that return a part."""


def create_foreign_charge(sandbox: Sandbox, given: ForeignCharge) -> dict[str, Any]:
    """A charge that another system made on the same account."""
    intent = intents.create(
        sandbox,
        given.account,
        CreateIntent(
            amount=given.amount,
            currency=given.currency,
            payment_method="pm_card_visa",
            automatic_payment_methods=AutomaticMethods(enabled=True, allow_redirects="never"),
            metadata=given.metadata,
            confirm=True,
        ),
    )
    return {"payment_intent": intent.id, "charge": intent.body["latest_charge"]}


def refund_charge(sandbox: Sandbox, given: DashboardRefund) -> dict[str, Any]:
    """A refund that Surety did not request: it has no metadata, and its events name no request."""
    charge = _charge(sandbox, given)
    asked = CreateRefund(charge=charge.id, amount=given.amount, reason=given.reason)
    return render_object(sandbox, refunds.create(sandbox, charge.account, asked))


def replace_card(sandbox: Sandbox, id: str, given: ReplacedCard) -> dict[str, Any]:
    """The card of a payment method was replaced: its number or its expiry is another one."""
    found = _found(sandbox, "payment_method", id)
    methods.replace_card(sandbox, found, to_builtins(given))
    return render_object(sandbox, found)


def decide_refund(sandbox: Sandbox, id: str, given: RefundOutcome) -> dict[str, Any]:
    """A refund succeeds, or fails even after it succeeded."""
    found = _found(sandbox, "refund", id)
    if given.outcome == "succeeded":
        refunds.succeed(sandbox, found)
    else:
        refunds.fail_refund(sandbox, found, given.failure_reason)
    return render_object(sandbox, found)


def pay_out_now(sandbox: Sandbox, given: PayoutsNow) -> dict[str, Any]:
    """Automatic payouts of all available money, of all accounts: their ids."""
    del given
    return {"payouts": balance.create_payouts(sandbox)}


def decide_payout(sandbox: Sandbox, id: str, given: PayoutOutcome) -> dict[str, Any]:
    """A payout arrives at the bank, or the bank refuses it."""
    found = _found(sandbox, "payout", id)
    if found.body["status"] == "failed":
        raise invalid_request("A payout that failed stays so.", param="outcome")
    if given.outcome == "paid":
        balance.complete_payout(sandbox, found)
    else:
        balance.fail_payout(sandbox, found, given.failure_code)
    return render_object(sandbox, found)


def dispute_charge(sandbox: Sandbox, given: CardholderDispute) -> dict[str, Any]:
    """A cardholder disputes a charge."""
    charge = _charge(sandbox, given)
    return render_object(
        sandbox, disputes.open_dispute(sandbox, charge, given.reason, inquiry=given.inquiry, amount=given.amount)
    )


def decide_dispute(sandbox: Sandbox, id: str, given: BankDecision) -> dict[str, Any]:
    """A bank decides a dispute, whatever the evidence."""
    found = _found(sandbox, "dispute", id)
    status = found.body["status"]
    statuses = (PARTS if given.outcome in PARTS else DECISIONS)[given.outcome][0]
    if status not in statuses:
        raise invalid_request(f"A dispute that is {status} can't be {given.outcome}.", param="outcome")
    if given.outcome in DECISIONS:
        DECISIONS[given.outcome][1](sandbox, found)
    elif 0 < given.returned < -found.net:
        PARTS[given.outcome][1](sandbox, found, given.returned)
    else:
        raise invalid_request(f"`returned` must be between 1 and {-found.net - 1}.", param="returned")
    return render_object(sandbox, found)


def warn_of_fraud(sandbox: Sandbox, given: ChargeReference) -> dict[str, Any]:
    """An issuer warns of a charge."""
    return render_object(sandbox, fraud_warnings.warn(sandbox, _charge(sandbox, given)))


def took_money(record: StoredObject) -> bool:
    """Whether money was taken: a charge that was only authorized, or failed, took none."""
    return bool(record.body["status"] == "succeeded" and record.body["captured"])


def charges_summary(sandbox: Sandbox, metadata_key: str) -> dict[str, Any]:
    """The number of charges that took money, of their payments, and the payments charged more than once.

    The value under the metadata key identifies a payment; charges without it are only counted.
    """
    payments: Counter[str] = Counter()
    charges = 0
    for record in sandbox.memory.all_of_kind("charge"):
        if took_money(record):
            charges += 1
            if payment := record.body["metadata"].get(metadata_key):
                payments[payment] += 1
    double = sorted(payment for payment, times in payments.items() if times > 1)
    return {"charges": charges, "payments": len(payments), "double": double}


def stream_charges(sandbox: Sandbox) -> Iterator[bytes]:
    """Every successful charge of every account, oldest first, as one JSON array in chunks."""
    chunk, separator = [], b"["
    for record in sandbox.memory.all_of_kind("charge"):
        if not took_money(record):
            continue
        body = record.body
        result = {
            "payment_intent": body["payment_intent"],
            "charge": record.id,
            "amount": body["amount_captured"],
            "currency": body["currency"],
            "metadata": body["metadata"],
            "account": record.account,
        }
        chunk.append(separator + encode(result))
        separator = b","
        if len(chunk) == CHUNK_RECORDS:
            yield b"".join(chunk)
            chunk.clear()
    yield b"".join(chunk) + (b"]" if separator == b"," else b"[]")


def list_with_metadata(sandbox: Sandbox, kind: str) -> list[dict[str, Any]]:
    """All refunds or disputes of all accounts, oldest first, with their payment's metadata and their account."""
    rows = []
    for record in sandbox.memory.all_of_kind(kind):
        charge = sandbox.memory.get(record.body["charge"])
        account = {"account": record.account, "payment_metadata": charge.body["metadata"]}
        rows.append({**render_object(sandbox, record), **account})
    return rows


def refunds_summary(sandbox: Sandbox, metadata_key: str) -> dict[str, Any]:
    """The number of effective refunds, their sums in minor units, their payments, and the doubles.

    The value under the metadata key identifies a refund; the same value on two effective refunds is a double. Refunds
    without it, such as those of the dashboard, are only counted. A failed or canceled refund may be made again.
    """
    identities: Counter[str] = Counter()
    effective = [
        record for record in sandbox.memory.all_of_kind("refund") if record.body["status"] in refunds.EFFECTIVE_STATUSES
    ]
    for record in effective:
        if identity := record.body["metadata"].get(metadata_key):
            identities[identity] += 1
    amounts: Counter[str] = Counter()
    for record in effective:
        amounts[record.body["currency"]] += record.body["amount"]
    return {
        "refunds": len(effective),
        "amounts": dict(amounts),
        "payments": len({record.body["charge"] for record in effective}),
        "double": sorted(identity for identity, times in identities.items() if times > 1),
    }


def _charge(sandbox: Sandbox, given: ChargeReference) -> StoredObject:
    for record in [
        sandbox.memory.find(given.charge),
        *sandbox.memory.children(given.payment_intent or "none", "charge"),
    ]:
        if record is not None and record.kind == "charge" and record.body["captured"]:
            return record
    raise not_found("charge", given.charge or given.payment_intent)


def _found(sandbox: Sandbox, kind: str, id: str) -> StoredObject:
    record = sandbox.memory.find(id)
    if record is None or record.kind != kind:
        raise not_found(kind, id)
    return record
