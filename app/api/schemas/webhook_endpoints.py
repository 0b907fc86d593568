"""Webhook endpoints: the bodies that create, change and switch one; the endpoint, its deliveries and their lists."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from app.api.schemas.events import EVENT_FAMILIES, EVENT_TYPES
from app.api.schemas.fields import Description, Instant, Limit, whole

WEBHOOK_TYPES = "|".join(name.replace(".", r"\.").replace("*", r"\*") for name in (*EVENT_TYPES, *EVENT_FAMILIES, "*"))
WebhookUrl = Annotated[
    str,
    Meta(
        max_length=2048,
        pattern=whole(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?([/?][!-\"$-~]*)?"),
        extra={"form": "must be an absolute address, https://host/path, without user, password and fragment"},
        description="Where events are sent: `https://…`, in test mode also `http://…`. The host's addresses must be "
        "public. Redirects are not followed.",
        examples=["https://shop.example/webhooks"],
    ),
]
WantedType = Annotated[
    str,
    Meta(
        pattern=whole(f"({WEBHOOK_TYPES})"),
        extra={"form": f"must be a type of event, one of {', '.join(EVENT_FAMILIES)}, or * for all"},
        examples=["payment.*"],
    ),
]
WantedTypes = Annotated[
    list[WantedType],
    Meta(
        min_length=1,
        max_length=100,
        description="Types of events, families such as `refund.*`, or `*` for all.",
        examples=[["payment.*", "dispute.needs_response"]],
    ),
]
PayloadForm = Annotated[
    Literal["full", "thin"],
    Meta(description="`full` sends the object at the event's version, `thin` its id and version only."),
]
Concurrency = Annotated[int, Meta(ge=1, le=16, description="How many requests it gets at a time.")]
RateMax = Annotated[int, Meta(ge=1, le=1000, description="How many requests it gets a second; null: no bound.")]
EventId = Annotated[
    str,
    Meta(
        pattern=whole("evt_[0-9a-f]{24}"),
        extra={"form": "must be the id of an event"},
        examples=["evt_019ab1b6d2f1d1c8e4a7f035"],
    ),
]
DeliveryId = Annotated[
    str,
    Meta(
        pattern=whole("dat_[0-9a-f]{24}"),
        extra={"form": "must be the id of a delivery"},
        description="The last id of the page before.",
    ),
]


class NewWebhookEndpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """An endpoint. It gets the events that are committed from now on."""

    url: WebhookUrl
    event_types: WantedTypes
    payload: PayloadForm = "full"
    description: Description | None = None
    concurrency: Concurrency = 4
    rate_max: RateMax | None = None


class WebhookEndpointUpdate(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields to change. A new filter applies to events that were not sent yet."""

    url: WebhookUrl | UnsetType = UNSET
    event_types: WantedTypes | UnsetType = UNSET
    payload: PayloadForm | UnsetType = UNSET
    description: Description | UnsetType | None = UNSET
    concurrency: Concurrency | UnsetType = UNSET
    rate_max: RateMax | UnsetType | None = UNSET


class Enablement(Struct, frozen=True, forbid_unknown_fields=True, rename={"start": "from"}):
    """From where an endpoint goes on: `there`, where it stood; `hours`, with the last `hours` of what it missed; `now`.

    Skipped events are listed in the endpoint's `skipped`.
    """

    start: Literal["there", "hours", "now"]
    hours: Annotated[int, Meta(ge=1, le=8760)] | None = None


class Disablement(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Disable an endpoint. The body has no fields."""


class EndpointRemoval(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Delete an endpoint. The body has no fields."""


class SecretRotation(Struct, frozen=True, forbid_unknown_fields=True):
    """A new secret. For `overlap_hours`, requests are signed with those before as well."""

    overlap_hours: Annotated[int, Meta(ge=0, le=720)] = 24


class WebhookReplay(Struct, frozen=True, forbid_unknown_fields=True, rename={"start": "from"}):
    """Events to send again: by id, by the time at which they were made, or those that were given up.

    `count_only` (the default) sends nothing, and answers how many they are.
    """

    events: Annotated[list[EventId], Meta(min_length=1, max_length=100)] | None = None
    start: Instant | None = None
    before: Instant | None = None
    undelivered: bool = False
    count_only: bool = True


class SkippedRange(Struct, rename={"start": "from", "end": "to"}):
    """Events that were skipped by choice."""

    start: str | None
    end: str
    events: int
    chosen_at: str


class UndeliveredCounts(Struct):
    """Events that the endpoint has not taken: those that wait for another attempt, and those that were given up."""

    waiting: int
    given_up: int


class WebhookEndpoint(Struct):
    """An endpoint. `secret` is shown once: by the answer that made it."""

    id: str
    object: Literal["webhook_endpoint"]
    url: str
    description: str | None
    event_types: list[str]
    payload: Literal["full", "thin"]
    api_version: str
    concurrency: int
    rate_max: int | None
    status: Literal["enabled", "failing", "disabled", "deleted"]
    disabled_because: Literal["merchant", "operator", "failures", "gone", "deleted"] | None
    disabled_at: str | None
    failing_since: str | None
    failure_percent: int
    undelivered: UndeliveredCounts
    public_keys: list[str]
    skipped: list[SkippedRange]
    created_at: str
    updated_at: str
    deleted_at: str | None


class WebhookEndpointWithSecret(WebhookEndpoint, kw_only=True):
    """An endpoint with its new secret, `whsec_…`. A repeated request gets the answer without it."""

    secret: str | UnsetType = UNSET


class WebhookEndpointList(Struct):
    """All endpoints, newest first."""

    object: Literal["list"]
    data: list[WebhookEndpoint]
    has_more: bool


class WebhookReplayResult(Struct):
    """How many events are sent again, or would be."""

    object: Literal["webhook_replay"]
    webhook_endpoint: str
    events: int
    is_sent: bool


class Delivery(Struct):
    """A completed attempt to deliver an event. `answer` holds up to 1 kB of a failure's answer."""

    id: str
    object: Literal["delivery"]
    event: str
    outcome: Literal["delivered", "failed", "skipped", "late"]
    attempt: int
    status: int | None
    error: str | None
    answer: str | None
    duration_ms: int | None
    created_at: str


class DeliveryList(Struct):
    """Newest first, of the last 90 days. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Delivery]
    has_more: bool


class DeliveriesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which deliveries to list."""

    outcome: Literal["delivered", "failed", "skipped", "late"] | None = None
    event: EventId | None = None
    limit: Limit = 20
    starting_after: DeliveryId | None = None
