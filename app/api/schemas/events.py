"""Events: the steps of payments, refunds and disputes, and changes of customers, in the order of a cursor."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from app.api.schemas.balance import MerchantPayout
from app.api.schemas.customers import Customer, SavedPaymentMethod
from app.api.schemas.disputes import Dispute
from app.api.schemas.fields import Limit, whole
from app.api.schemas.payments import Payment
from app.api.schemas.refunds import Refund

ObjectId = Annotated[
    str,
    Meta(
        pattern=whole("(pay|ref|dp|cus|mpo)_[0-9a-f]{24}"),
        description="Events about this payment, refund, dispute, customer or payout to you only.",
        extra={"form": "must be the id of a payment, a refund, a dispute, a customer or a payout to you"},
    ),
]


PaymentEventType = Literal[
    "payment.initiated",
    "payment.submitting",
    "payment.provider_submitted",
    "payment.requires_action",
    "payment.authorized",
    "payment.processing",
    "payment.confirmed",
    "payment.settled",
    "payment.partially_refunded",
    "payment.refunded",
    "payment.disputed",
    "payment.reversed",
    "payment.failed",
    "payment.canceled",
    "payment.held",
    "payment.released",
    "payment.fraud_warning",
]
RefundEventType = Literal[
    "refund.pending",
    "refund.requires_action",
    "refund.succeeded",
    "refund.failed",
    "refund.canceled",
]
DisputeEventType = Literal[
    "dispute.warning_needs_response",
    "dispute.warning_under_review",
    "dispute.warning_closed",
    "dispute.needs_response",
    "dispute.under_review",
    "dispute.won",
    "dispute.lost",
    "dispute.prevented",
    "dispute.appeal_needs_response",
    "dispute.appeal_under_review",
    "dispute.evidence_due",
    "dispute.evidence_refused",
]
CustomerEventType = Literal[
    "customer.created",
    "customer.updated",
]
PaymentMethodEventType = Literal[
    "customer.payment_method_saved",
    "customer.payment_method_detached",
    "customer.payment_method_updated",
]


MerchantPayoutEventType = Literal[
    "merchant_payout.asked",
    "merchant_payout.left",
    "merchant_payout.returned",
    "merchant_payout.canceled",
]


EVENT_TYPES: tuple[str, ...] = tuple(
    name
    for types in (
        PaymentEventType,
        RefundEventType,
        DisputeEventType,
        CustomerEventType,
        PaymentMethodEventType,
        MerchantPayoutEventType,
    )
    for name in get_args(types)
)
EVENT_FAMILIES = sorted({f"{name.partition('.')[0]}.*" for name in EVENT_TYPES})
EventType = Annotated[
    str,
    Meta(
        pattern=whole(f"({'|'.join(re.escape(name) for name in (*EVENT_TYPES, *EVENT_FAMILIES))})"),
        description="One type, or all of a family: `refund.*`.",
        extra={"form": f"must be a type of event, such as payment.confirmed, or one of {', '.join(EVENT_FAMILIES)}"},
        examples=["payment.confirmed"],
    ),
]


class Event(Struct):
    """A step of a payment, a refund or a dispute, or news about it, or a change of a customer.

    `data` is the object at that version; its `object` names the kind. Of a customer, only the version is that of the
    event, and the other fields are as they are.
    """

    id: str
    object: Literal["event"]
    type: str
    created_at: str
    data: dict[str, Any]


class PaymentEvent(Struct):
    """A step of a payment, or a warning of fraud. `data` is the payment at that version."""

    id: str
    object: Literal["event"]
    type: PaymentEventType
    created_at: str
    data: Payment


class RefundEvent(Struct):
    """A step of a refund. `data` is the refund at that version."""

    id: str
    object: Literal["event"]
    type: RefundEventType
    created_at: str
    data: Refund


class DisputeEvent(Struct):
    """A step of a dispute, or news of its evidence. `data` is the dispute at that version."""

    id: str
    object: Literal["event"]
    type: DisputeEventType
    created_at: str
    data: Dispute


class CustomerEvent(Struct):
    """A change of a customer. `data` is the customer as it is, with the version and time of the event."""

    id: str
    object: Literal["event"]
    type: CustomerEventType
    created_at: str
    data: Customer


class PaymentMethodEvent(Struct):
    """A payment method of a customer was saved, changed or removed. `data` is the saved payment method."""

    id: str
    object: Literal["event"]
    type: PaymentMethodEventType
    created_at: str
    data: SavedPaymentMethod


class MerchantPayoutEvent(Struct):
    """A payout to you was made, left, came back or was canceled. `data` is the payout at that time."""

    id: str
    object: Literal["event"]
    type: MerchantPayoutEventType
    created_at: str
    data: MerchantPayout


KINDS_OF_EVENTS: dict[type[Struct], Any] = {
    PaymentEvent: PaymentEventType,
    RefundEvent: RefundEventType,
    DisputeEvent: DisputeEventType,
    CustomerEvent: CustomerEventType,
    PaymentMethodEvent: PaymentMethodEventType,
    MerchantPayoutEvent: MerchantPayoutEventType,
}
"""The OpenAPI document shows an Event as one of these, by its `type`."""


class EventList(Struct):
    """Oldest first. Read on with `starting_after` set to `next`: no event is skipped, however late its transaction
    commits. With a filter, a page may be empty although `has_more` is true.
    """

    object: Literal["list"]
    data: list[Event]
    has_more: bool
    next: str


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which events to list."""

    type: EventType | None = None
    object: ObjectId | None = None
    starting_after: Annotated[str, Meta(max_length=4000, description="`next` of the last answer.")] | None = None
    limit: Limit = 100
