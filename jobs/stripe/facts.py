"""Stripe's objects as facts, in the form that surety.record_facts takes. Pure functions.

An object is read in its present state: an intent by its status, a charge by its captured amount. Its past is in other
facts or has no effect. Client secrets are not read at all.

Stripe may leave out many fields, or send null. Such a field is read only where its absence has a meaning of its own. An
object that lacks a field that its facts need is no proof: `required` raises ObjectUnreadable, and it is read again.
"""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from typing import Any

from msgspec import Struct

from jobs.stripe.errors import ObjectUnreadable
from jobs.stripe.shown import FAILURE_UNKNOWN, action_facts, bounded_text, card_data, failure, refund_action, rfc3339

Json = dict[str, Any]
Fact = dict[str, Any]

INQUIRY_STATUSES = frozenset({"warning_needs_response", "warning_under_review", "warning_closed"})
REFUND_KINDS = {
    "pending": "refund_pending",
    "requires_action": "refund_action",
    "succeeded": "refund_succeeded",
    "failed": "refund_failed",
    "canceled": "refund_canceled",
}

RATE_TOLERANCE = 1e-5
"""The relative error that an exchange rate may have."""

RATE_MOVEMENT = Fraction(2, 100)
"""A dispute's amount that comes back without a named rate may differ this much from the withdrawn one, and is the
whole: rates move between the two days.
"""

SOURCE_CATEGORIES = frozenset(
    {
        *("charge", "charge_failure", "partial_capture_reversal", "refund", "refund_failure"),
        *("dispute", "dispute_reversal"),
    }
)
"""Categories of balance transactions that always stem from a charge, refund or dispute."""

COST_CATEGORIES = frozenset({"fee", "tax", "network_cost"})
"""Categories of a dispute's balance transactions that are the provider's costs, no part of the disputed amount."""


UNREADABLE = (ObjectUnreadable, KeyError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What the reading of an object raises that is not as Stripe describes such objects."""


class FactOrigin(Struct, frozen=True):
    """The origin of an object: account, mode, and the source that it was read from."""

    account: str
    livemode: bool
    source: str
    source_id: str | None = None


def fact(origin: FactOrigin, object_id: str, kind: str, *, metadata_of: Json | None = None, **more: Any) -> Fact:
    """One fact; `metadata_of` is the object whose metadata name the payment."""
    metadata = (metadata_of or {}).get("metadata") or {}
    fields = {
        "provider": "stripe",
        "account": origin.account,
        "livemode": origin.livemode,
        "object_id": object_id,
        "kind": kind,
        "metadata_payment": metadata.get("surety_payment"),
        "metadata_environment": metadata.get("surety_environment"),
        "source": origin.source,
        "source_id": origin.source_id,
        **more,
    }
    return {name: value for name, value in fields.items() if value is not None}


def required(source: Json, name: str) -> Any:
    """A field that the facts need. Raises ObjectUnreadable if it is absent or null."""
    value = source.get(name)
    if value is None:
        raise ObjectUnreadable(f"{source.get('id') or 'an object'} has no {name}")
    return value


def id_of(reference: str | Json | None) -> str | None:
    """The id of a reference, which is an id or, expanded, an object."""
    return str(required(reference, "id")) if isinstance(reference, dict) else reference


def intent_facts(intent: Json, origin: FactOrigin) -> list[Fact]:
    """A payment intent's facts, and those of its charge and balance transaction where they are expanded."""
    pi, status, currency = (required(intent, name) for name in ("id", "status", "currency"))
    charge, ch = intent.get("latest_charge"), id_of(intent.get("latest_charge"))
    objects = [pi, ch] if ch else [pi]
    metadata = required(intent, "metadata")

    def about(object_id: str, kind: str, **more: Any) -> Fact:
        return fact(origin, object_id, kind, metadata_of=intent, intent=pi, objects=objects, currency=currency, **more)

    facts = [about(pi, "submitted", amount_minor=required(intent, "amount"))]
    error = failure(intent.get("last_payment_error"))
    match status:
        case "requires_payment_method":
            # Our intents are created with a payment method, so they lose it by a failed attempt only.
            facts.append(about(pi, "attempt_failed", data={"failure": error or FAILURE_UNKNOWN}))
        case "requires_action":
            facts += [about(pi, kind, data=data) for kind, data in action_facts(intent.get("next_action"), metadata)]
        case "processing":
            facts.append(about(pi, "processing"))
        case "requires_capture":
            held = required(intent, "amount_capturable")
            id = ch or required(intent, "latest_charge")
            facts.append(about(id, "authorized", amount_minor=held, data=card_data(charge)))
        case "succeeded":
            received = required(intent, "amount_received")
            id = ch or required(intent, "latest_charge")
            facts.append(about(id, "captured", amount_minor=received, data=card_data(charge)))
        case "canceled" if error is not None:
            facts.append(about(pi, "failed", data={"failure": error}))
        case "canceled":
            facts.append(about(pi, "canceled"))
    if isinstance(charge, dict) and isinstance(charge.get("balance_transaction"), dict):
        facts += balance_transaction_facts(charge["balance_transaction"], origin, source=charge)
    return facts


def charge_facts(charge: Json, origin: FactOrigin) -> list[Fact]:
    """The fact of a captured charge, as its intent would prove it; none of a charge that another system made alone.

    Raises ObjectUnreadable for a charge that is not captured: what it holds is read from its intent.
    """
    if "payment_intent" in charge and charge["payment_intent"] is None:
        return []
    if required(charge, "status") != "succeeded" or not required(charge, "captured"):
        raise ObjectUnreadable(f"{charge.get('id')} is not captured")
    pi, ch = id_of(required(charge, "payment_intent")), required(charge, "id")
    required(charge, "metadata")
    return [
        fact(
            origin,
            ch,
            "captured",
            metadata_of=charge,
            intent=pi,
            objects=[pi, ch],
            amount_minor=required(charge, "amount_captured"),
            currency=required(charge, "currency"),
            data=card_data(charge),
        )
    ]


def uncaptured_card_facts(charge: Json, origin: FactOrigin) -> list[Fact]:
    """The fact of an uncaptured charge's card, if its snapshot shows one: the held amount is read from its intent."""
    intent, data = charge.get("payment_intent"), card_data(charge)
    if intent is None or not data:
        return []
    return [fact(origin, required(charge, "id"), "card", metadata_of=charge, intent=id_of(intent), data=data)]


def decline_fact(error: Json, origin: FactOrigin, intent_id: str, currency: str) -> Fact:
    """The fact of a declined confirmation: the attempt failed, the intent lives."""
    data = {"failure": failure(error)}
    return fact(origin, intent_id, "attempt_failed", intent=intent_id, currency=currency, data=data)


def balance_transaction_facts(line: Json, origin: FactOrigin, source: Json | None = None) -> list[Fact]:
    """A balance transaction's facts; `source` is the object that it stems from, where that is known.

    A line in another currency than its source was exchanged: other_gross is the amount before the exchange. The
    provider's `exchange_rate` may be null then, and is not needed. A line that takes a charge back means that the
    charge was returned.
    """
    named = line.get("source")
    source = source or (named if isinstance(named, dict) else None)
    category = category_of(line, source)
    if source is None and category in SOURCE_CATEGORIES:
        raise ObjectUnreadable(f"{line.get('id')}, a {category}, has no source that is expanded")
    amount, currency = required(line, "amount"), required(line, "currency")
    data: Json = {
        "category": category,
        "source": id_of(named),
        "fee": required(line, "fee"),
        "net": required(line, "net"),
        "available_at": rfc3339(required(line, "available_on")),
    }
    if source is not None and (source.get("currency") or currency) != currency:
        amount, currency = amount_of_source(line, source), source["currency"]
        data |= {"other_currency": currency, "other_gross": amount}
        if line.get("exchange_rate") is not None:
            data["rate"] = line["exchange_rate"]
    common: Json = {
        "metadata_of": source,
        "intent": id_of((source or {}).get("payment_intent")),
        "amount_minor": line["amount"],
        "currency": line["currency"],
        "occurred_at": rfc3339(required(line, "created")),
        "data": data,
    }
    id = required(line, "id")
    facts = [fact(origin, id, "money", **common)]
    if required(line, "status") == "available":
        facts.append(fact(origin, id, "available", **common))
    if category == "charge_failure":
        common |= {"amount_minor": -amount, "currency": currency, "data": {"source": data["source"]}}
        facts.append(fact(origin, id, "returned", **common))
    return facts


def listed_transaction_facts(line: Json, origin: FactOrigin) -> list[Fact]:
    """The facts of a listed balance transaction, and those of the refund that it moves, if that is readable.

    Events are listed for thirty days only. After them the line is the only news of a refund that was made or came back.
    """
    facts, refund = balance_transaction_facts(line, origin), line.get("source")
    if isinstance(refund, dict) and refund.get("object") == "refund":
        with suppress(*UNREADABLE):
            facts += refund_facts(refund, origin)
    return facts


def category_of(line: Json, source: Json | None) -> str:
    """A line's category. An adjustment of a dispute withdraws or returns a part of it, like the lines before it."""
    category: str = required(line, "reporting_category")
    if category == "other_adjustment" and source is not None and source.get("object") == "dispute":
        return "dispute" if required(line, "amount") < 0 else "dispute_reversal"
    return category


def amount_of_source(line: Json, source: Json) -> int:
    """A line's amount, in minor units of its source's currency.

    Of an exchanged line it is the amount of the source that fits the rate best, because rates have few digits: the
    whole amount, or of a charge captured in part either part. A part of a dispute is computed by the rate, or, where
    the line names none, by the rate that the dispute's withdrawal implies.
    """
    if required(line, "currency") == required(source, "currency"):
        return int(required(line, "amount"))
    size, rate = abs(required(line, "amount")), line.get("exchange_rate")
    whole: int = required(source, "amount")
    # Only a charge has one.
    captured: int = source.get("amount_captured", whole)
    if rate is not None:
        nearest = min((captured, whole, whole - captured), key=lambda amount: abs(amount * rate - size))
        if abs(nearest * rate - size) > 1 + size * RATE_TOLERANCE:
            nearest = round(size / rate)
    elif line["reporting_category"] == "partial_capture_reversal":
        nearest = whole - captured
    else:
        nearest = part_of_dispute(size, line["currency"], source) if source.get("object") == "dispute" else captured
    return nearest if line["amount"] > 0 else -nearest


def part_of_dispute(size: int, currency: str, dispute: Json) -> int:
    """An exchanged part of a dispute in minor units of the dispute's currency, without a rate of its own.

    The largest withdrawal is the whole disputed amount: both together imply the rate.
    """
    whole: int = required(dispute, "amount")
    withdrawals = [
        -amount
        for amount, of, category in (
            (required(line, "amount"), required(line, "currency"), required(line, "reporting_category"))
            for line in required(dispute, "balance_transactions")
        )
        if of == currency and amount < 0 and category not in COST_CATEGORIES
    ]
    withdrawn = max(withdrawals, default=size)
    if abs(size - withdrawn) <= withdrawn * RATE_MOVEMENT:
        return whole
    return round(Fraction(size * whole, withdrawn))


def refund_facts(refund: Json, origin: FactOrigin) -> list[Fact]:
    """A refund's fact; `refund` in its data is our id, if it was requested here."""
    # A refund without metadata may be ours. One that was made in the dashboard has empty metadata.
    data = {
        "refund": required(refund, "metadata").get("surety_refund"),
        "reason": refund.get("reason"),
        "failure": {"code": refund["failure_reason"]} if refund.get("failure_reason") else None,
        "next_action": refund_action(refund.get("next_action")),
    }
    return [
        fact(
            origin,
            required(refund, "id"),
            # A refund's status is an open set: an unknown one is undecided, so the refund is polled. An absent one says
            # nothing: the refund may have failed after it succeeded, and only unfinished refunds are polled.
            REFUND_KINDS.get(required(refund, "status"), "refund_pending"),
            metadata_of=refund,
            intent=id_of(refund.get("payment_intent")),
            amount_minor=required(refund, "amount"),
            currency=required(refund, "currency"),
            objects=[refund["id"]],
            data={name: value for name, value in data.items() if value is not None},
        )
    ]


def dispute_facts(dispute: Json, origin: FactOrigin, revision: int) -> list[Fact]:
    """A dispute's facts at its n-th fetch. The amount is the one withdrawn, or the one disputed if none is withdrawn.

    Whether an amount is withdrawn follows from the dispute's balance transactions, not from its status alone.
    """
    lines, amount = required(dispute, "balance_transactions"), required(dispute, "amount")
    withdrawn = -sum(
        amount_of_source(line, dispute) for line in lines if required(line, "reporting_category") not in COST_CATEGORIES
    )
    match required(dispute, "status"):
        case status if status in INQUIRY_STATUSES:
            kind = "dispute_flagged"
        case "lost":
            kind = "dispute_lost"
        case "prevented" if withdrawn > 0:
            # The network repaid the cardholder before a dispute was filed (Visa's Rapid Dispute Resolution).
            kind = "dispute_lost"
        case "won" | "prevented":
            kind = "dispute_won"
        case _ if withdrawn > 0:
            kind = "dispute_opened"
        case _:
            kind = "dispute_flagged"
    # 0 means that the network takes no evidence.
    due = (dispute.get("evidence_details") or {}).get("due_by") or None
    data = {
        "reason": dispute.get("reason"),
        "status": dispute["status"],
        "amount": amount,
        "evidence_due_at": rfc3339(due),
    }
    dispute_fact = fact(
        origin,
        required(dispute, "id"),
        kind,
        metadata_of=dispute,
        revision=revision,
        intent=id_of(dispute.get("payment_intent")),
        amount_minor=max(0, withdrawn) if kind in {"dispute_opened", "dispute_lost"} else amount,
        currency=required(dispute, "currency"),
        objects=[dispute["id"]],
        data={name: value for name, value in data.items() if value is not None},
    )
    return [
        dispute_fact,
        *(money for line in lines for money in balance_transaction_facts(line, origin, source=dispute)),
    ]


def fraud_warning_facts(warning: Json, origin: FactOrigin) -> list[Fact]:
    """An early fraud warning's fact. It can be acted on until its charge is disputed or refunded completely."""
    is_actionable, charge = required(warning, "actionable"), id_of(required(warning, "charge"))
    if not isinstance(is_actionable, bool):
        raise ObjectUnreadable(f"{warning.get('id')} is neither actionable nor not")
    return [
        fact(
            origin,
            required(warning, "id"),
            "fraud_warning" if is_actionable else "fraud_warning_closed",
            intent=id_of(warning.get("payment_intent")),
            objects=[warning["id"]],
            occurred_at=rfc3339(required(warning, "created")),
            data={"type": bounded_text(required(warning, "fraud_type")), "source": charge},
        )
    ]


def payout_facts(payout: Json, origin: FactOrigin) -> list[Fact]:
    """A payout's fact, which belongs to no payment. Its trace id comes after its arrival, if the bank has one."""
    failed = required(payout, "status") in {"failed", "canceled"}
    names = ("status", "arrival_date", "automatic", "failure_code", "reconciliation_status")
    data = {name: payout.get(name) for name in names}
    data["trace_id"] = (payout.get("trace_id") or {}).get("value")
    return [
        fact(
            origin,
            required(payout, "id"),
            "payout_failed" if failed else "payout",
            amount_minor=required(payout, "amount"),
            currency=required(payout, "currency"),
            occurred_at=rfc3339(required(payout, "created")),
            data=data,
        )
    ]


def redacted(body: Json) -> Json:
    """The fields of a response that the audit trail keeps, never a secret."""
    kept = (
        "id", "object", "status", "amount", "amount_received", "amount_capturable", "currency", "latest_charge",
        "cancellation_reason", "capture_method", "created", "livemode", "has_more",
    )  # fmt: skip
    snapshot = {name: body[name] for name in kept if body.get(name) is not None}
    if isinstance(snapshot.get("latest_charge"), dict):
        snapshot["latest_charge"] = snapshot["latest_charge"].get("id")
    error = failure(body.get("error") or body.get("last_payment_error"))
    if error:
        snapshot["failure"] = error
    return snapshot
