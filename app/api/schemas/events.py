"""Events: the steps of payments, refunds and disputes, in the order of a cursor."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Limit


class Event(Struct):
    """A step of a payment, a refund or a dispute. `data` is the object at that version; its `object` names the kind."""

    id: str
    type: str
    created_at: str
    data: dict[str, Any]


class EventList(Struct):
    """Oldest first. Read on with `after` set to `next`: no event is skipped, however late its transaction commits."""

    object: Literal["list"]
    data: list[Event]
    has_more: bool
    next: str


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which events to list."""

    after: Annotated[str, Meta(max_length=4000, description="`next` of the last answer.")] | None = None
    limit: Limit = 100
