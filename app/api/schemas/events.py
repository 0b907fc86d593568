"""Events: the steps of payments, refunds and disputes, in the order of a cursor."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Limit, whole

EventType = Annotated[
    str,
    Meta(
        pattern=whole(r"(payment|refund|dispute)\.([a-z_]{1,60}|\*)"),
        description="One type, or all of a family: `refund.*`.",
        extra={"form": "must be a type of event, such as payment.confirmed, or a family, such as refund.*"},
        examples=["payment.confirmed"],
    ),
]
ObjectId = Annotated[
    str,
    Meta(
        pattern=whole("(pay|ref|dp)_[0-9a-f]{24}"),
        description="Events about this payment, refund or dispute only.",
        extra={"form": "must be the id of a payment, a refund or a dispute"},
    ),
]


class Event(Struct):
    """A step of a payment, a refund or a dispute. `data` is the object at that version; its `object` names the kind."""

    id: str
    object: Literal["event"]
    type: str
    created_at: str
    data: dict[str, Any]


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
