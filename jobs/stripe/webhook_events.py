"""Stripe's events: the facts that each type proves, and the objects to fetch because of it. Pure functions.

A signed snapshot counts as proof if its object can only advance and the snapshot has our API version. Failures and
disputes are fetched, and so are objects that an event only refers to, unless their facts are known. A thin event
(`v2.core.event`) has no snapshot, so the object that it names is fetched. Events of other types are ignored unread.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from jobs.stripe.client import API_VERSION
from jobs.stripe.facts import Fact, FactOrigin, Json, id_of, intent_facts, payout_facts, refund_facts

FactReader = Callable[[Json, FactOrigin], list[Fact]]

SNAPSHOT_EVENTS: dict[str, FactReader] = {
    "payment_intent.created": intent_facts,
    "payment_intent.requires_action": intent_facts,
    "payment_intent.processing": intent_facts,
    "payment_intent.amount_capturable_updated": intent_facts,
    "payment_intent.succeeded": intent_facts,
    "payment_intent.canceled": intent_facts,
    "refund.created": refund_facts,
    "refund.updated": refund_facts,
    "payout.created": payout_facts,
    "payout.updated": payout_facts,
    "payout.paid": payout_facts,
    "payout.failed": payout_facts,
    "payout.canceled": payout_facts,
}

# Events that refer to an intent, each with the kinds of facts any of which makes fetching unnecessary.
FETCH_UNLESS_KNOWN: dict[str, tuple[str, ...]] = {
    "payment_intent.payment_failed": ("attempt_failed", "failed", "canceled"),
    "charge.failed": ("attempt_failed", "failed", "canceled"),
    "charge.expired": ("failed", "canceled"),
    "charge.pending": ("processing",),
    "charge.succeeded": ("authorized", "captured"),
    "charge.captured": ("captured",),
    "charge.updated": ("money",),
}
CHARGE_EVENTS = frozenset({"charge.succeeded", "charge.captured"})

FETCH_ALWAYS = frozenset(
    {
        "refund.failed",
        "charge.dispute.created",
        "charge.dispute.updated",
        "charge.dispute.closed",
        "charge.dispute.funds_withdrawn",
        "charge.dispute.funds_reinstated",
    }
)

# Events that only the list of events shows if their webhook is lost: changes of payments that have ended here, actions
# in the dashboard, actions of the network.
POLLED_EVENTS = FETCH_ALWAYS | {
    "payment_intent.created",
    "payment_intent.succeeded",
    "payment_intent.canceled",
    "charge.expired",
    "refund.created",
    "refund.updated",
}


# Our access to a connected account has ended, or was given again. They prove nothing: the account is probed.
ACCESS_EVENTS = frozenset({"account.application.deauthorized", "account.application.authorized"})


class StoredWebhook(Struct):
    """A row of surety.read_provider_events."""

    event_id: str
    provider_event_id: str
    source: str
    account: str
    livemode: bool
    type: str
    body: str


RELEVANT_EVENTS = frozenset(SNAPSHOT_EVENTS) | frozenset(FETCH_UNLESS_KNOWN) | FETCH_ALWAYS

THIN_EVENT_PREFIX = "v1."
"""Before the type of a thin event about an object of the API's first version: `v1.payment_intent.succeeded`."""
THIN_EVENT_OBJECTS = {"payment_intent": "payment_intent", "charge": "charge", "refund": "refund", "payout": "payout"}
"""What a thin event's type begins with, and the kind of object that is fetched for it; disputes begin with `charge`."""


class EventData(Struct):
    """The snapshot in an event."""

    object: Json


class RelatedObject(Struct):
    """The object that a thin event names."""

    id: str


class EventEnvelope(Struct):
    """The fields of an event that are read. A thin event has a related object in place of version and data."""

    object: str = "event"
    api_version: str | None = None
    data: EventData | None = None
    related_object: RelatedObject | None = None


class ProviderObject(Struct, frozen=True):
    """An object at Stripe; `kind` is its own name for itself, such as `payment_intent`."""

    account: str
    livemode: bool
    kind: str
    id: str


class ObjectToFetch(Struct):
    """An object to fetch because of a webhook, unless one of these facts is known by then."""

    source: ProviderObject
    unless_object: str = ""
    unless_kinds: tuple[str, ...] = ()


def about_access(webhook: StoredWebhook) -> bool:
    """Whether a webhook says that our access to its account has changed."""
    return webhook.type.removeprefix(THIN_EVENT_PREFIX) in ACCESS_EVENTS


def interpret_webhook(webhook: StoredWebhook) -> list[Fact] | ObjectToFetch:
    """The facts that a webhook proves, or the object to fetch for it; no facts for a type without meaning here.

    Raises MsgspecError, KeyError, TypeError or AttributeError if the body isn't as Stripe sends it.
    """
    type = webhook.type.removeprefix(THIN_EVENT_PREFIX)
    if type not in RELEVANT_EVENTS:
        return []
    envelope = msgspec.json.decode(webhook.body, type=EventEnvelope)
    if envelope.related_object is not None:
        kind = "dispute" if type.startswith("charge.dispute.") else THIN_EVENT_OBJECTS[type.partition(".")[0]]
        return ObjectToFetch(ProviderObject(webhook.account, webhook.livemode, kind, envelope.related_object.id))
    if envelope.data is None:
        raise KeyError("data")
    subject = envelope.data.object
    if webhook.type in SNAPSHOT_EVENTS and envelope.api_version == API_VERSION:
        origin = FactOrigin(webhook.account, webhook.livemode, webhook.source, webhook.provider_event_id)
        return SNAPSHOT_EVENTS[webhook.type](subject, origin)
    if webhook.type in SNAPSHOT_EVENTS or webhook.type in FETCH_ALWAYS:
        return ObjectToFetch(ProviderObject(webhook.account, webhook.livemode, subject["object"], subject["id"]))
    return referenced_intent(webhook, subject)


def referenced_intent(webhook: StoredWebhook, subject: Json) -> list[Fact] | ObjectToFetch:
    """The intent that an event refers to; no facts for a charge without one, which another system may have made."""
    intent = subject["id"] if subject["object"] == "payment_intent" else id_of(subject.get("payment_intent"))
    about = intent
    if webhook.type in CHARGE_EVENTS:
        about = subject["id"]
    elif webhook.type == "charge.updated":
        about = id_of(subject.get("balance_transaction"))
    if intent is None or about is None:
        return []
    source = ProviderObject(webhook.account, webhook.livemode, "payment_intent", intent)
    return ObjectToFetch(source, about, FETCH_UNLESS_KNOWN[webhook.type])
