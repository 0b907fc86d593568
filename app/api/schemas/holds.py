"""Payments on hold, as operators see them, and decisions about them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Limit, PaymentId, whole
from app.api.schemas.operators import DeadLetterPayment, Reason

HoldStatus = Literal["open", "released", "refused", "expired", "canceled", "overtaken"]
MerchantId = Annotated[
    str,
    Meta(
        pattern=whole("mer_[0-9a-f]{24}"),
        description="Only those of one merchant.",
        extra={"form": "must be a merchant's id"},
    ),
]


class HoldFinding(Struct):
    """The bound of a velocity rule that the payment exceeded: `count` of payments, or `amount` in minor units."""

    subject: Literal["card", "customer", "email"]
    exceeded: Literal["count", "amount"]
    maximum: int
    period_seconds: int
    currency: str | None


class HoldClosure(Struct):
    at: str
    by: str
    because: str | None


class HeldPayment(Struct):
    """A payment on hold, or one that was; `id` is the payment's."""

    id: str
    object: Literal["hold"]
    status: HoldStatus
    rule: str
    detail: HoldFinding
    payment: DeadLetterPayment
    opened_at: str
    expires_at: str
    closed: HoldClosure | None


class HeldPaymentList(Struct):
    """Oldest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[HeldPayment]
    has_more: bool


class HoldsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which holds to list."""

    status: HoldStatus = "open"
    merchant: MerchantId | None = None
    limit: Limit = 20
    starting_after: PaymentId | None = None


class HoldDecision(Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's decision about one payment on hold."""

    reason: Reason


class HoldDecisionResult(Struct):
    """The outcome. `unchanged`: the same decision was made before."""

    id: str
    outcome: Literal["released", "refused", "unchanged"]
    detail: str
