"""Answers and events as Stripe's description also permits them: with fewer fields, thin, of the other mode."""

import json
import random
from datetime import UTC, datetime
from typing import Any

from app.sandbox.faults import FaultInjector
from app.sandbox.memory import encode

ABSENCE = 0.4
"""The probability of each optional field to be left out of an answer or event."""

OPTIONAL_FIELDS: dict[str, tuple[str, ...]] = {
    "payment_intent": (
        *("amount", "amount_capturable", "amount_details", "amount_received", "capture_method", "confirmation_method"),
        *("currency", "metadata", "payment_method_types"),
    ),
    "charge": ("radar_options",),
    "refund": ("destination_details", "failure_balance_transaction", "failure_reason", "next_action", "pending_reason"),
    "dispute": ("payment_method_details",),
}
"""By object, the fields that may be absent and are never null."""

NULLABLE_FIELDS: dict[str, tuple[str, ...]] = {
    "payment_intent": (
        *("application", "application_fee_amount", "automatic_payment_methods", "canceled_at", "cancellation_reason"),
        *("client_secret", "customer", "description", "last_payment_error", "latest_charge", "next_action"),
        *("on_behalf_of", "payment_method", "payment_method_configuration_details", "payment_method_options"),
        *("processing", "receipt_email", "review", "setup_future_usage", "shipping", "statement_descriptor"),
        *("statement_descriptor_suffix", "transfer_data", "transfer_group"),
    ),
    "charge": (
        *("application", "application_fee", "application_fee_amount", "balance_transaction"),
        *("calculated_statement_descriptor", "customer", "description", "failure_balance_transaction", "failure_code"),
        *("failure_message", "fraud_details", "on_behalf_of", "outcome", "payment_method", "payment_method_details"),
        *("receipt_email", "receipt_number", "receipt_url", "review", "shipping", "source_transfer"),
        *("statement_descriptor", "statement_descriptor_suffix", "transfer_data", "transfer_group"),
    ),
    "refund": (
        *("balance_transaction", "charge", "metadata", "reason", "receipt_number", "source_transfer_reversal"),
        *("status", "transfer_reversal"),
    ),
    "balance_transaction": ("description", "exchange_rate"),
    "payout": (
        *("application_fee", "application_fee_amount", "balance_transaction", "description", "destination"),
        *("failure_balance_transaction", "failure_code", "failure_message", "metadata", "original_payout"),
        *("payout_method", "reversed_by", "statement_descriptor", "trace_id"),
    ),
    "event": ("api_version", "request"),
}
"""By object, the fields that may be null or absent."""

MEANINGFUL_NULLS = {
    "charge": ("payment_intent",),
    "refund": ("payment_intent",),
    "dispute": ("payment_intent",),
    "balance_transaction": ("source",),
}
"""Fields whose null says something: no intent was used, the line stems from no object. They are never left out."""


def leave_out_fields(value: Any, chance: random.Random) -> Any:
    """A value without some of the optional fields of its objects: null where that is allowed, or absent."""
    if isinstance(value, list):
        return [leave_out_fields(item, chance) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("object")
    optional = OPTIONAL_FIELDS.get(kind, ()) if isinstance(kind, str) else ()
    nullable = NULLABLE_FIELDS.get(kind, ()) if isinstance(kind, str) else ()
    left: dict[str, Any] = {}
    for name, part in value.items():
        if name in (*optional, *nullable) and chance.random() < ABSENCE:
            if name in nullable and chance.random() < 0.5:
                left[name] = None
            continue
        left[name] = leave_out_fields(part, chance)
    return left


def sparse_answer(body: bytes, chance: random.Random) -> bytes:
    """An answer without some of its optional fields."""
    return encode(leave_out_fields(json.loads(body), chance))


def sparse_event(payload: bytes, chance: random.Random) -> bytes:
    """An event without some of its optional fields."""
    event = leave_out_fields(json.loads(payload), chance)
    if "previous_attributes" in event["data"]:
        event["data"]["previous_attributes"] = None
    return encode(event)


def thin_event(payload: bytes) -> bytes:
    """The thin event of a change: it names the object and has no snapshot."""
    event = json.loads(payload)
    subject = event["data"]["object"]
    thin: dict[str, Any] = {
        "id": f"{event['id']}_thin",
        "object": "v2.core.event",
        "created": datetime.fromtimestamp(event["created"], UTC).isoformat().replace("+00:00", "Z"),
        "livemode": event["livemode"],
        "reason": None,
        "related_object": {
            "id": subject.get("id", ""),
            "type": subject["object"],
            "url": f"/v1/{subject['object']}s/{subject.get('id', '')}",
        },
        "type": f"v1.{event['type']}",
    }
    if "account" in event:
        thin["context"] = event["account"]
    return encode(thin)


def other_mode_event(payload: bytes) -> bytes:
    """An event of the other mode about an object of that mode, as an endpoint may get it."""
    event = json.loads(payload)
    subject = event["data"]["object"]
    event |= {"id": f"{event['id']}_other", "livemode": not event["livemode"]}
    if "livemode" in subject:
        subject["livemode"] = event["livemode"]
    return encode(event)


def changed_event(what: str, payload: bytes, faults: FaultInjector) -> bytes:
    """The payload of a delivery, `deliver_sparse` for example, as it is sent."""
    match what:
        case "deliver_sparse":
            return sparse_event(payload, faults.stream(json.loads(payload)["id"]))
        case "deliver_thin":
            return thin_event(payload)
        case "deliver_other_mode":
            return other_mode_event(payload)
    return payload
