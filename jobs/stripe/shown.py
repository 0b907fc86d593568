"""What merchants see of Stripe's objects: times, failures, the payer's next action, the card. Pure functions.

Each value may be absent, null or of another type at Stripe. It is then left out.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from db.redaction import without_addresses
from jobs.stripe.errors import ObjectUnreadable

Json = dict[str, Any]

FAILURE_CHARACTERS_MAX = 500
FAILURE_UNKNOWN = {"code": "processing_error"}
"""The failure of an attempt without an error: Stripe may have cleared it."""

METHOD_UNKNOWN = (
    "payment_method must be one of the merchant's own account at the provider, made in the same mode, test or live; the"
    " provider knows none of this id there."
)
"""The message about a token of another account, in our words: the provider's own name its parameters."""

NO_RETURN = {
    "code": "authentication_required",
    "message": "The payer would have to act by a script of the provider, which this payment did not ask for.",
}
"""The failure of an attempt that asks for Stripe's script although its payment did not: its payer can't act."""
SCRIPT_ACTION: Json = {"type": "script"}


def rfc3339(seconds: int | None) -> str | None:
    """Stripe's time, seconds since 1970, as RFC 3339. Raises ObjectUnreadable for a number beyond the year 9999."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        raise ObjectUnreadable(f"{seconds} is no time") from None


def failure(error: Any) -> Json | None:
    """Why an attempt failed, as merchants see it: texts of bounded length. An error without a code has its type's."""
    if not isinstance(error, dict):
        return None
    shown = {name: bounded_text(error.get(name)) for name in ("code", "decline_code", "message")}
    if error.get("code") == "resource_missing" and error.get("param") == "payment_method":
        shown["message"] = METHOD_UNKNOWN
    elif shown["message"] is not None:
        shown["message"] = without_addresses(shown["message"])
    shown["code"] = shown["code"] or bounded_text(error.get("type")) or "processing_error"
    return {name: value for name, value in shown.items() if value is not None}


def bounded_text(value: Any) -> str | None:
    """A text of the provider's, cut to FAILURE_CHARACTERS_MAX; None for anything else."""
    return value[:FAILURE_CHARACTERS_MAX] if isinstance(value, str) else None


def next_action(action: Json | None) -> Json | None:
    """The payer's next action, as merchants see it: a redirect with its URL, Stripe's script, or another type.

    None if the answer does not say it, so that the intent is asked for again.
    """
    kind = (action or {}).get("type")
    if kind == "use_stripe_sdk":
        return SCRIPT_ACTION
    if kind != "redirect_to_url":
        return {"type": kind} if kind is not None else None
    url = ((action or {}).get("redirect_to_url") or {}).get("url")
    return {"type": "redirect", "url": url} if url is not None else None


def action_facts(action: Json | None, metadata: Json) -> list[tuple[str, Json]]:
    """The kind and data of the fact that an intent's next action proves; none if the answer does not say it.

    The intent's metadata show whether its payment lets the payer act by script.
    """
    shown = next_action(action)
    if shown == SCRIPT_ACTION and metadata.get("surety_authentication") != "script":
        return [("attempt_failed", {"failure": NO_RETURN})]
    return [("action", {"next_action": shown})] if shown is not None else []


def card_data(charge: Any) -> Json:
    """The data of a charge's fact: its card as merchants see it, where the charge is an object that shows one."""
    details = charge.get("payment_method_details") if isinstance(charge, dict) else None
    card = details.get("card") if isinstance(details, dict) else None
    if not isinstance(card, dict):
        return {}
    shown = {name: bounded_text(card.get(name)) for name in ("brand", "last4", "country")}
    shown["capture_before"] = instant_text(card.get("capture_before"))
    shown = {name: value for name, value in shown.items() if value is not None}
    return {"card": shown} if shown else {}


def saved_card(method: Json) -> Json:
    """A payment method as it is saved: its id, and its card where it shows one."""
    card = method.get("card")
    if not isinstance(card, dict):
        card = {}
    shown: Json = {name: bounded_text(card.get(name)) for name in ("brand", "last4", "country", "fingerprint")}
    shown |= {name: card.get(name) for name in ("exp_month", "exp_year") if type(card.get(name)) is int}
    return {"id": method["id"]} | {name: value for name, value in shown.items() if value is not None}


def instant_text(seconds: Any) -> str | None:
    """Stripe's time as documents of the API show times: RFC 3339 in UTC with milliseconds; None for anything else."""
    if type(seconds) is not int:
        return None
    try:
        return f"{str(rfc3339(seconds))[:19]}.000Z"
    except ObjectUnreadable:
        return None


def refund_action(action: Any) -> Json | None:
    """What the payer must do about a refund, as merchants see it: {type, expires_at?}. No address of the payer."""
    if not isinstance(action, dict):
        return None
    details = action.get("display_details")
    shown = {
        "type": bounded_text(action.get("type")),
        "expires_at": instant_text(details.get("expires_at")) if isinstance(details, dict) else None,
    }
    return {name: value for name, value in shown.items() if value is not None} or None
