"""Stripe's events: the facts that each type proves, and the objects to fetch because of it. Pure functions.

A signed snapshot counts as proof if its object can only advance, as an intent or a captured charge does, and if it has
our API version and all fields that its facts need. Any other object is fetched: failures, disputes, snapshots that
prove nothing, and objects that an event only refers to, unless their facts are known. A thin event (`v2.core.event`)
has no snapshot, so the object that it names is fetched. Events of other types are ignored unread.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct, field

from jobs.stripe.client import API_VERSION
from jobs.stripe.errors import ObjectUnreadable
from jobs.stripe.facts import (
    Fact,
    FactOrigin,
    Json,
    charge_facts,
    fraud_warning_facts,
    id_of,
    intent_facts,
    payout_facts,
    refund_facts,
    required,
    uncaptured_card_facts,
)

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
    "payout.reconciliation_completed": payout_facts,
    "radar.early_fraud_warning.created": fraud_warning_facts,
    "radar.early_fraud_warning.updated": fraud_warning_facts,
}

# Events that refer to an intent, each with the kinds of facts any of which makes fetching unnecessary.
MONEY_KNOWN = ("money",)
FETCH_UNLESS_KNOWN: dict[str, tuple[str, ...]] = {
    "payment_intent.payment_failed": ("attempt_failed", "failed", "canceled"),
    "charge.failed": ("attempt_failed", "failed", "canceled"),
    "charge.expired": ("failed", "canceled"),
    "charge.pending": ("processing",),
    "charge.succeeded": ("authorized", "captured"),
    "charge.captured": ("captured",),
    "charge.updated": MONEY_KNOWN,
}
LATEST_CREATED = 253_402_300_800
"""The year 10000, in seconds since 1970."""
CHARGE_EVENTS = frozenset({"charge.succeeded", "charge.captured"})

# A saved payment method was removed in the dashboard, or its card was replaced by the network.
METHOD_EVENTS = frozenset({"payment_method.automatically_updated", "payment_method.detached", "payment_method.updated"})

FETCH_ALWAYS = METHOD_EVENTS | frozenset(
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
    "radar.early_fraud_warning.created",
    "radar.early_fraud_warning.updated",
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
    """An object at Stripe; `kind` is its own name for itself, such as `payment_intent`.

    An event's type begins with it, except for disputes: `charge.dispute.created`.
    """

    account: str
    livemode: bool
    kind: str
    id: str


class ObjectToFetch(Struct):
    """An object to fetch because of a webhook, unless one of these facts is known by then.

    If the facts are about money, `created` is when its charge was made (seconds since 1970, by the provider's clock):
    the list of balance transactions since then has them too. `facts` are those that the event proves by itself: they
    are recorded if nothing is fetched.
    """

    source: ProviderObject
    unless_object: str = ""
    unless_kinds: tuple[str, ...] = ()
    created: int | None = None
    facts: list[Fact] = field(default_factory=list)


def about_access(webhook: StoredWebhook) -> bool:
    """Whether a webhook says that our access to its account has changed."""
    return webhook.type.removeprefix(THIN_EVENT_PREFIX) in ACCESS_EVENTS


def interpret_webhook(webhook: StoredWebhook) -> list[Fact] | ObjectToFetch:
    """The facts that a webhook proves, or the object to fetch for it; no facts for a type without meaning here.

    Raises MsgspecError, ObjectUnreadable, TypeError or AttributeError if the body names no object.
    """
    type = webhook.type.removeprefix(THIN_EVENT_PREFIX)
    if type not in RELEVANT_EVENTS:
        return []
    envelope = msgspec.json.decode(webhook.body, type=EventEnvelope)
    prefix = type.rpartition(".")[0]
    kind = "dispute" if prefix == "charge.dispute" else prefix
    if envelope.related_object is not None:
        return ObjectToFetch(ProviderObject(webhook.account, webhook.livemode, kind, envelope.related_object.id))
    if envelope.data is None:
        raise ObjectUnreadable(f"{webhook.provider_event_id} has no data")
    subject = envelope.data.object
    whole = ObjectToFetch(ProviderObject(webhook.account, webhook.livemode, kind, required(subject, "id")))
    origin = FactOrigin(webhook.account, webhook.livemode, webhook.source, webhook.provider_event_id)
    if envelope.api_version == API_VERSION and (type in SNAPSHOT_EVENTS or type in CHARGE_EVENTS):
        try:
            return charge_facts(subject, origin) if type in CHARGE_EVENTS else SNAPSHOT_EVENTS[type](subject, origin)
        except ObjectUnreadable:
            pass
    if type in SNAPSHOT_EVENTS or type in FETCH_ALWAYS:
        return whole
    meant = referenced_intent(type, subject, whole)
    if isinstance(meant, ObjectToFetch) and envelope.api_version == API_VERSION and type in CHARGE_EVENTS:
        meant.facts = uncaptured_card_facts(subject, origin)
    return meant


def referenced_intent(type: str, subject: Json, whole: ObjectToFetch) -> list[Fact] | ObjectToFetch:
    """The intent that an event refers to, or the event's whole object, if the event leaves out which intent it is.

    No facts for a charge whose intent is null, which another system may have made.
    """
    intent: str | None = whole.source.id
    about: str | None = whole.source.id
    if whole.source.kind != "payment_intent":
        if "payment_intent" not in subject or (type == "charge.updated" and "balance_transaction" not in subject):
            return whole
        intent = about = id_of(subject["payment_intent"])
        if type in CHARGE_EVENTS:
            about = whole.source.id
        elif type == "charge.updated":
            about = id_of(subject["balance_transaction"])
    if intent is None or about is None:
        return []
    source = ProviderObject(whole.source.account, whole.source.livemode, "payment_intent", intent)
    created = subject.get("created") if type == "charge.updated" else None
    is_time = isinstance(created, int) and 0 < created < LATEST_CREATED
    return ObjectToFetch(source, about, FETCH_UNLESS_KNOWN[type], created if is_time else None)
