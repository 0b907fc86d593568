"""What goes in and out over HTTP, as structs: they decode requests, document them in OpenAPI, and mirror the database's
documents, which a test compares with them.

A rule that a type can tell stands in its Meta; app/web/validation.py reads the same types to tell
all the rules that a request breaks.
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


Text = Annotated[str, Meta(min_length=1, max_length=5000)]
LongText = Annotated[str, Meta(min_length=1, max_length=20000)]
RefundState = Literal["pending", "requires_action", "succeeded", "failed", "canceled"]
RefundReason = Literal["duplicate", "fraudulent", "requested_by_customer"]


class NewRefund(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A payment is to be given back: all that is left of it, or `amount`."""

    amount: MinorUnits | None = None
    reason: RefundReason | None = None
    metadata: Metadata = {}


class PaymentRequest(Struct, omit_defaults=True):
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


class NewEvidence(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What speaks against a dispute, as texts; up to 150,000 characters in all."""

    access_activity_log: LongText | None = None
    billing_address: Text | None = None
    cancellation_policy_disclosure: LongText | None = None
    cancellation_rebuttal: LongText | None = None
    customer_email_address: Text | None = None
    customer_name: Text | None = None
    customer_purchase_ip: Text | None = None
    duplicate_charge_explanation: LongText | None = None
    duplicate_charge_id: Text | None = None
    product_description: LongText | None = None
    refund_policy_disclosure: LongText | None = None
    refund_refusal_explanation: LongText | None = None
    service_date: Text | None = None
    shipping_address: Text | None = None
    shipping_carrier: Text | None = None
    shipping_date: Text | None = None
    shipping_tracking_number: Text | None = None
    uncategorized_text: LongText | None = None


class SubmittedEvidence(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Evidence, kept for later, or submitted to the network: that can be done once."""

    evidence: NewEvidence
    submit: bool = False


class EvidenceGiven(Struct):
    """By when evidence is due, which fields were given, and when it was to be submitted."""

    due_at: str | None
    given: list[str]
    submit_asked_at: str | None


class Dispute(Struct):
    """Money that the network asks back, or an inquiry before it does. `status` is the provider's."""

    id: str
    object: Literal["dispute"]
    status: str
    payment: str
    amount: int
    amount_withdrawn: int
    currency: str
    reason: str | None
    evidence: EvidenceGiven
    provider: Provider
    created_at: str
    updated_at: str


class DisputeList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Dispute]
    has_more: bool


class CurrencyBalance(Struct):
    """What you are owed in one currency, in minor units: not settled yet, settled (it may be negative), held back in
    disputes, on its way back to payers.
    """

    currency: str
    pending: int
    available: int
    held: int
    refunding: int


class Balance(Struct):
    object: Literal["balance"]
    data: list[CurrencyBalance]


class BalanceChange(Struct):
    account: Literal["pending", "available", "held", "refunding"]
    amount: int
    currency: str


class BalanceTransaction(Struct):
    """Something that changed what you are owed; `type` says what."""

    id: str
    object: Literal["balance_transaction"]
    type: str
    payment: str | None
    changes: list[BalanceChange]
    created_at: str


class BalanceTransactionList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[BalanceTransaction]
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
    """A step of a payment, a refund or a dispute; `data` is what it was at that version, told apart by `object`."""

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
    kind: Literal[
        "request", "step", "refund", "dispute", "call", "webhook", "poll", "file", "transfer", "retry", "operator"
    ]
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


DisputeId = Annotated[str, Meta(pattern=whole("dp_[0-9a-f]{32}"), extra={"form": "must be a dispute's id"})]
PostingId = Annotated[
    str, Meta(pattern=whole("pst_[0-9a-f]{32}"), extra={"form": "must be a balance transaction's id"})
]


class DisputesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which disputes to list."""

    payment: PaymentId | None = None
    limit: Limit = 20
    starting_after: DisputeId | None = None


class BalanceTransactionsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which balance transactions to list."""

    payment: PaymentId | None = None
    limit: Limit = 20
    starting_after: PostingId | None = None


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
