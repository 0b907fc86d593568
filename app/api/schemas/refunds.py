"""Refunds: the body that creates one, the refund, its list."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from app.api.schemas.fields import Limit, Metadata, MinorUnits, PaymentId, Provider, RefundId

RefundStatus = Literal["pending", "requires_action", "succeeded", "failed", "canceled"]
RefundReason = Literal["duplicate", "fraudulent", "requested_by_customer"]


class NewRefund(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Refund a payment: the amount that is left, or `amount`."""

    amount: MinorUnits | None = None
    reason: RefundReason | None = None
    metadata: Metadata = {}


class RefundFailure(Struct):
    """The reason why the refund failed."""

    code: str
    message: str | None = None


class RefundAction(Struct):
    """What the payer must do to get the refund, such as to answer an e-mail."""

    type: str
    expires_at: str | None = None


class Refund(Struct):
    """Money on its way back to the payer. The amount, in minor units, is reserved from the moment of the request."""

    id: str
    object: Literal["refund"]
    status: RefundStatus
    version: int
    payment: str
    amount: int
    currency: str
    reason: str | None
    next_action: RefundAction | None
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


class RefundsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which refunds to list."""

    payment: PaymentId | None = None
    limit: Limit = 20
    starting_after: RefundId | None = None
