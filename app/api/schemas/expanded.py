"""Single objects with related ones in them, as `expand` asks."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from app.api.schemas.disputes import Dispute, DisputeList
from app.api.schemas.fields import whole
from app.api.schemas.payments import Payment
from app.api.schemas.refunds import Refund, RefundList


class ExpandedPayment(Payment, kw_only=True):
    """A payment, with the newest hundred of its refunds and disputes where `expand` names them."""

    refunds: RefundList | UnsetType = UNSET
    disputes: DisputeList | UnsetType = UNSET


class ExpandedRefund(Refund, kw_only=True):
    """A refund, with its payment in `payment` where `expand` names it."""

    payment: str | Payment  # type: ignore[assignment]  # ty: ignore[incompatible-attribute-override]


class ExpandedDispute(Dispute, kw_only=True):
    """A dispute, with its payment in `payment` where `expand` names it."""

    payment: str | Payment  # type: ignore[assignment]  # ty: ignore[incompatible-attribute-override]


class PaymentQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What to show with a payment."""

    expand: (
        Annotated[
            str,
            Meta(
                pattern=whole("(refunds|disputes|refunds,disputes|disputes,refunds)"),
                extra={"form": "must be refunds, disputes or refunds,disputes"},
                description="Objects to show with it, separated by a comma.",
                examples=["refunds,disputes"],
            ),
        ]
        | None
    ) = None


class PartQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What to show with a refund or a dispute."""

    expand: (
        Annotated[
            str,
            Meta(
                pattern=whole("payment"),
                extra={"form": "must be payment"},
                description="Show the payment in place of its id.",
                examples=["payment"],
            ),
        ]
        | None
    ) = None
