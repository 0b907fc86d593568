"""Payments: the bodies that create, capture or cancel one; the payment, its list and its trace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import (
    Currency,
    CustomerId,
    Description,
    Email,
    Instant,
    IpAddress,
    Limit,
    Metadata,
    MetadataUpdate,
    MinorUnits,
    Name,
    OffSession,
    PaymentId,
    Provider,
    Reference,
    ReturnUrl,
    SavedMethodId,
    SoughtEmail,
    SoughtMetadata,
    SoughtMetadataTexts,
    Suffix,
    Token,
)

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
Status = Literal[
    "pending",
    "requires_action",
    "requires_capture",
    "succeeded",
    "failed",
    "canceled",
    "partially_refunded",
    "refunded",
    "disputed",
    "lost",
    "returned",
]
CaptureMethod = Literal["automatic", "manual"]
MethodUsage = Literal["off_session"]
Authentication = Literal["redirect", "script"]


class NewCard(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A card: by the token that the provider gave for it, or a saved one."""

    type: Literal["card"]
    token: Token | None = None
    saved: SavedMethodId | None = None


class Mandate(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payer's consent to later payments without it: when, from where, and to which text it agreed."""

    accepted_at: Instant
    ip_address: IpAddress
    user_agent: Annotated[str, Meta(min_length=1, max_length=1000)]
    text: Annotated[str, Meta(min_length=1, max_length=5000)] | None = None


class PayerDetails(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payer of one payment; all fields are optional."""

    email: Email | None = None
    name: Name | None = None


class NewPayment(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A payment to take. A payer who must act is sent to the bank and back to `return_url`, or acts by a script on your
    page if `authentication` is `script`. No payer is present if `off_session` is true.
    """

    amount: MinorUnits
    currency: Currency
    payment_method: NewCard
    capture_method: CaptureMethod = "automatic"
    reference: Reference | None = None
    description: Description | None = None
    statement_descriptor_suffix: Suffix | None = None
    return_url: ReturnUrl | None = None
    off_session: OffSession = False
    authentication: Authentication = "redirect"
    customer: PayerDetails | None = None
    customer_id: CustomerId | None = None
    save_payment_method: MethodUsage | None = None
    mandate: Mandate | None = None
    metadata: Metadata = {}


class NewCapture(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Capture the authorized amount, or `amount` of it; the rest is released."""

    amount: MinorUnits | None = None


class NewCancellation(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Cancel a payment. The body has no fields."""


class NewClientSecret(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Get a client secret. The body has no fields."""


class ClientSecret(Struct):
    """What Stripe's script on the payer's page needs for the payer's action. Store and log it nowhere."""

    object: Literal["client_secret"]
    payment: str
    client_secret: str
    provider_account: str | None


class PaymentUpdate(Struct, frozen=True, forbid_unknown_fields=True):
    """New metadata of a payment."""

    metadata: MetadataUpdate


class MethodToSave(Struct):
    """What becomes of a payment method once its payment has succeeded."""

    usage: MethodUsage
    mandate: Mandate


class PaymentRequest(Struct, omit_defaults=True):
    """A request as api.create_payments takes it."""

    n: int
    request_id: str
    key_hash: str
    address: str
    api_version: str
    idempotency_key: str
    request_hash: str
    amount: int
    currency: str
    rail: str
    method_token: str | None
    capture_method: str
    reference: str | None
    description: str | None
    statement_descriptor_suffix: str | None
    return_url: str | None
    off_session: bool
    customer: PayerDetails | None
    metadata: dict[str, str]
    customer_id: str | None = None
    saved_method: str | None = None
    save_method: MethodToSave | None = None
    authentication: str = "redirect"
    traceparent: str | None = None


class PaymentMethod(Struct):
    """How the payer pays. Brand, last digits and country of a card are known once it was charged.

    `saved` is the saved payment method that is charged, or that this payment has saved.
    """

    type: Literal["card", "ach"]
    brand: str | None
    last4: str | None
    country: str | None
    saved: str | None


class NextAction(Struct):
    """The action that the payer must take: `redirect`, to `url`, or `script`, by the client secret. Any other type
    asks nothing of your page.
    """

    type: str
    url: str | None = None


class Failure(Struct):
    """The reason why the payment failed. A decline is a state of the payment, not an HTTP error."""

    code: str
    decline_code: str | None = None
    message: str | None = None


class FraudWarning(Struct):
    """The card's issuer suspects that the payment is fraudulent, before any dispute."""

    type: str
    actionable: bool
    at: str


class Hold(Struct):
    """A hold of the operator: while its status is `open`, nothing is sent to the provider and nothing is charged.

    `released`: the payment went on. `refused`, `expired` (without a decision until `expires_at`): it has ended, and
    `failure` says so. `canceled`: it ended otherwise. `overtaken`: the provider turned out to hold it already.
    """

    status: Literal["open", "released", "refused", "expired", "canceled", "overtaken"]
    opened_at: str
    expires_at: str
    closed_at: str | None


class Payment(Struct):
    """A payment. `status` is the coarse state, `state` the exact one; `version` counts its steps. Amounts are in minor
    units.

    `amount_capturable` can be captured until `capture_before`. `fee` is the sum of our fees, those of disputes
    included, `net` the captured amount without it. Both are null before a capture. Neither counts refunds or losses.
    """

    id: str
    object: Literal["payment"]
    livemode: bool
    status: Status
    state: State
    version: int
    amount: int
    amount_capturable: int
    amount_captured: int
    amount_refunded: int
    amount_reversed: int
    fee: int | None
    net: int | None
    currency: str
    payment_method: PaymentMethod
    capture_method: CaptureMethod
    capture_before: str | None
    cancel_requested: bool
    hold: Hold | None
    next_action: NextAction | None
    failure: Failure | None
    fraud_warning: FraudWarning | None
    provider: Provider | None
    reference: str | None
    description: str | None
    statement_descriptor_suffix: str | None
    return_url: str | None
    off_session: bool
    authentication: Authentication
    customer: PayerDetails | None
    customer_id: str | None
    save_payment_method: MethodUsage | None
    metadata: dict[str, str]
    created_at: str
    updated_at: str


class PaymentList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Payment]
    has_more: bool


class Actor(Struct):
    type: str
    id: str | None


class TraceEntry(Struct, rename={"from_": "from"}):
    """An entry of a payment's history; calls to a provider have a `duration_ms`."""

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
    """A payment's history, oldest first."""

    payment: Payment
    entries: list[TraceEntry]


class PaymentsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which payments to list."""

    state: State | None = None
    status: Status | None = None
    reference: Reference | None = None
    created_from: Instant | None = None
    created_before: Instant | None = None
    customer_email: (
        Annotated[SoughtEmail, Meta(description="That of `customer`, in upper or lower case; see also `customer_id`.")]
        | None
    ) = None
    customer_id: CustomerId | None = None
    metadata: SoughtMetadata = {}
    metadata_is: SoughtMetadataTexts = []
    limit: Limit = 20
    starting_after: PaymentId | None = None
