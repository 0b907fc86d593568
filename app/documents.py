"""What goes in and out over HTTP, as structs: they decode requests, document them in OpenAPI, and mirror the database's
documents, which a test compares with them.

A rule that a type can tell stands in its Meta; app/rules.py reads the same types to tell all the rules that a request
breaks.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

State = Literal[
    "initiated",
    "submitting",
    "provider_submitted",
    "requires_action",
    "authorized",
    "processing",
    "confirmed",
    "settled",
    "partially_refunded",
    "refunded",
    "disputed",
    "reversed",
    "failed",
    "canceled",
]
Status = Literal["pending", "action_required", "succeeded", "failed", "canceled", "refunded", "disputed"]
CaptureMethod = Literal["automatic", "manual"]


def whole(pattern: str) -> str:
    """A pattern of the whole text: `$` alone would let a line's end follow."""
    return rf"^{pattern}$(?!\n)"


MinorUnits = Annotated[
    int,
    Meta(
        ge=1,
        le=999_999_999_999,
        description="In minor units of the currency (cents). Each currency has a smallest and a largest amount.",
        examples=[4999],
    ),
]
Currency = Annotated[
    str,
    Meta(
        pattern=whole("[A-Za-z]{3}"),
        description="ISO 4217; either case in, lower case out.",
        examples=["usd"],
        extra={"form": "must be a currency's three letters"},
    ),
]
Token = Annotated[
    str,
    Meta(
        pattern=whole("pm_[A-Za-z0-9_]{1,250}"),
        extra={"form": "must be the provider's token for a card, pm_…; card numbers must not be sent here"},
        description="The provider's token for the card. Card numbers must not be sent here.",
        examples=["pm_card_visa"],
    ),
]
Reference = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        description="Your own name for the payment, unique among yours that have neither failed nor been canceled.",
        examples=["order-1042"],
    ),
]
Suffix = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=22,
        pattern=whole(r"(?=.*[A-Za-z])[ !#-&()+-;=?-\[\]-~]*"),
        extra={"form": "must be printable ASCII with at least one letter and none of < > \\ ' \" *"},
        description="Added to the text on the payer's statement: printable ASCII with at least one letter and none "
        "of < > \\ ' \" *.",
        examples=["ACME"],
    ),
]
Url = Annotated[
    str,
    Meta(
        max_length=2048,
        pattern=whole(r"[Hh][Tt][Tt][Pp][Ss]?://[^\s/?#@]+([/?#]\S*)?"),
        extra={"form": "must be an absolute address that starts with https:// or http://"},
        description="Where the payer returns to after 3-D Secure: an absolute http(s) address.",
        examples=["https://shop.example/return"],
    ),
]
MetadataKey = Annotated[
    str, Meta(min_length=1, max_length=40, pattern=whole(r"[^\[\]]*"), extra={"form": "must not hold [ or ]"})
]
MetadataValue = Annotated[str, Meta(max_length=500)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Meta(max_length=50, description="Up to 50 texts of your own, kept and shown.", examples=[{"cart": "9"}]),
]
Email = Annotated[
    str, Meta(max_length=254, pattern=whole(r"[^@\s]+@[^@\s]+"), extra={"form": "must be an e-mail address"})
]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Description = Annotated[str, Meta(min_length=1, max_length=1000)]


class NewCard(Struct, frozen=True, forbid_unknown_fields=True):
    """A card, by the token that the provider gave for it."""

    type: Literal["card"]
    token: Token


class Customer(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who pays, as far as you want to tell."""

    email: Email | None = None
    name: Name | None = None


class NewPayment(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A payment to be taken."""

    amount: MinorUnits
    currency: Currency
    payment_method: NewCard
    capture_method: CaptureMethod = "automatic"
    reference: Reference | None = None
    description: Description | None = None
    statement_descriptor_suffix: Suffix | None = None
    return_url: Url | None = None
    customer: Customer | None = None
    metadata: Metadata = {}


class NewCapture(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is held is to be taken: all of it, or `amount`; the rest is let go."""

    amount: MinorUnits | None = None


class NewCancellation(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A payment is to be called off. Nothing more needs to be said."""


RefundState = Literal["pending", "requires_action", "succeeded", "failed", "canceled"]
RefundReason = Literal["duplicate", "fraudulent", "requested_by_customer"]


class NewRefund(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A payment is to be given back: all that is left of it, or `amount`."""

    amount: MinorUnits | None = None
    reason: RefundReason | None = None
    metadata: Metadata = {}


class AskedPayment(Struct, omit_defaults=True):
    """A request as api.create_payments takes it."""

    n: int
    request_id: str
    key_hash: str
    address: str
    idempotency_key: str
    request_hash: str
    amount: int
    currency: str
    rail: str
    method_token: str
    capture_method: str
    reference: str | None
    description: str | None
    statement_descriptor_suffix: str | None
    return_url: str | None
    customer: Customer | None
    metadata: dict[str, str]


class PaymentMethod(Struct):
    type: Literal["card", "ach"]


class NextAction(Struct):
    """What the payer must do."""

    type: str
    url: str | None = None


class Failure(Struct):
    """Why it failed. A decline is a state of the payment, never an error of HTTP."""

    code: str
    decline_code: str | None = None
    message: str | None = None


class Provider(Struct):
    """Who takes the money, and the payment's id there."""

    name: str
    id: str


class Payment(Struct):
    """A payment. `status` is the coarse state, `state` the exact one; `version` counts its steps. Amounts are in minor
    units.
    """

    id: str
    object: Literal["payment"]
    status: Status
    state: State
    version: int
    amount: int
    amount_captured: int
    amount_refunded: int
    currency: str
    payment_method: PaymentMethod
    capture_method: CaptureMethod
    next_action: NextAction | None
    failure: Failure | None
    provider: Provider | None
    reference: str | None
    description: str | None
    statement_descriptor_suffix: str | None
    return_url: str | None
    customer: Customer | None
    metadata: dict[str, str]
    created_at: str
    updated_at: str


class PaymentList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Payment]
    has_more: bool


class RefundFailure(Struct):
    """Why it was refused, or came back."""

    code: str
    message: str | None = None


class Refund(Struct):
    """Money on its way back to the payer. The amount, in minor units, is taken up from the moment it is asked for."""

    id: str
    object: Literal["refund"]
    state: RefundState
    version: int
    payment: str
    amount: int
    currency: str
    reason: str | None
    failure: RefundFailure | None
    provider: Provider | None
    metadata: dict[str, str]
    created_at: str
    updated_at: str


class RefundList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Refund]
    has_more: bool


class Event(Struct):
    """A step of a payment or of a refund; `data` is what it was at that version, told apart by `object`."""

    id: str
    type: str
    created_at: str
    data: dict[str, Any]


class EventList(Struct):
    """Oldest first. Ask again with `after` set to `next`: nothing is skipped, however late it commits."""

    object: Literal["list"]
    data: list[Event]
    has_more: bool
    next: str


class Actor(Struct):
    type: str
    id: str | None


class TraceEntry(Struct, rename={"from_": "from"}):
    """Something that happened to a payment; `duration_ms` is told for calls to a provider."""

    at: str
    kind: Literal["request", "step", "refund", "call", "webhook", "poll", "file", "transfer", "retry", "operator"]
    actor: Actor
    summary: str
    from_: str | None
    to: str | None
    outcome: str | None
    duration_ms: float | None
    data: dict[str, Any]


class Trace(Struct):
    """A payment's whole story, oldest first."""

    payment: Payment
    entries: list[TraceEntry]


Limit = Annotated[int, Meta(ge=1, le=100, description="How many at most.")]
Instant = Annotated[datetime, Meta(tz=True, description="RFC 3339 with an offset.", examples=["2026-11-22T14:03:07Z"])]
PaymentId = Annotated[str, Meta(pattern=whole("pay_[0-9a-f]{32}"), extra={"form": "must be a payment's id"})]


class PaymentsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which payments to list."""

    state: State | None = None
    status: Status | None = None
    reference: Reference | None = None
    created_from: Instant | None = None
    created_before: Instant | None = None
    limit: Limit = 20
    starting_after: PaymentId | None = None


RefundId = Annotated[str, Meta(pattern=whole("ref_[0-9a-f]{32}"), extra={"form": "must be a refund's id"})]


class RefundsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which refunds to list."""

    payment: PaymentId | None = None
    limit: Limit = 20
    starting_after: RefundId | None = None


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which events to list."""

    after: Annotated[str, Meta(max_length=4000, description="`next` of the last answer.")] | None = None
    limit: Limit = 100


class BrokenRule(Struct, rename={"place": "in"}):
    """A rule that a request breaks. `field` is a JSON pointer into the body, or a header's or parameter's name."""

    field: str
    rule: str
    message: str
    limit: Any = None
    given: Any = None
    place: Literal["body", "query", "header"] = "body"


class ProblemDocument(Struct):
    """Why a request was refused, as in RFC 9457. `payment` names the payment that has the reference already, `state`
    the state that is in the way.
    """

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[BrokenRule] | None = None
    payment: str | None = None
    state: str | None = None


class ProblemType(Struct):
    """A type of problem, explained."""

    type: str
    title: str
    status: int
    explanation: str


class Health(Struct):
    status: Literal["ok"]
