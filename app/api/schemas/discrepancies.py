"""Discrepancies, as operators see them, and decisions about them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Instant, Limit, PaymentId, whole
from app.api.schemas.holds import MerchantId
from app.api.schemas.operators import DryRun, Reason

DiscrepancyStatus = Literal["open", "snoozed", "closed"]
Severity = Literal["notice", "warning", "critical"]
Resolution = Literal["explained", "corrected", "written_off", "forced"]
DiscrepancyKind = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=40,
        pattern=whole("[a-z_]+"),
        description="Only those of one kind, such as `fee`.",
        extra={"form": "must be a kind of discrepancy"},
    ),
]
DiscrepancyId = Annotated[str, Meta(pattern=whole("dis_[0-9a-f]{24}"), extra={"form": "must be a discrepancy's id"})]
OperatorName = Annotated[
    str,
    Meta(pattern=whole("[A-Za-z0-9._@-]{1,100}"), extra={"form": "must be an operator's name"}),
]
Note = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=1000,
        pattern=whole(r"(?=.*\S)[^\x00-\x1f\x7f-\x9f]+"),
        extra={"form": "must be one line of text without control characters"},
    ),
]
MaxDelta = Annotated[
    int,
    Meta(ge=0, le=999_999_999_999, description="Only those whose fields are amounts that differ by at most so much."),
]
ExpectedCount = Annotated[int, Meta(ge=0, le=10_000, description="How many match. Otherwise none is resolved.")]


class DifferingField(Struct):
    """A field that differs: our value, the other side's, and for an amount the difference in minor units."""

    field: str
    here: str | int | None
    there: str | int | None
    delta_minor: int | None


class RecordIds(Struct):
    """The ids of our record and of the other side's."""

    here: str | None
    there: str | None


class FirstSeen(Struct):
    """The values at the opening."""

    detail: str
    fields: list[DifferingField]
    sources: RecordIds


class SeenAgain(Struct):
    """How often the cause was reported again while it was open; at most once an hour is counted."""

    count: int
    last_at: str | None


class DiscrepancyClosure(Struct):
    """How it was closed. `arrived_late`: a later fact resolved it."""

    at: str
    how: Literal["arrived_late", "explained", "corrected", "written_off", "forced"]
    by: str
    because: str


class Discrepancy(Struct):
    """A difference between our records and the provider's or the bank's."""

    id: str
    object: Literal["discrepancy"]
    status: DiscrepancyStatus
    kind: str
    severity: Severity
    subject: str
    occurrence: int
    payment: str | None
    merchant: str | None
    currency: str | None
    detail: str
    fields: list[DifferingField]
    sources: RecordIds
    first_seen: FirstSeen | None
    opened_at: str
    seen_again: SeenAgain
    assignee: str | None
    snoozed_until: str | None
    note: str | None
    closed: DiscrepancyClosure | None


class DiscrepancyList(Struct):
    """Oldest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Discrepancy]
    has_more: bool


class DiscrepanciesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which discrepancies to list."""

    status: DiscrepancyStatus = "open"
    kind: DiscrepancyKind | None = None
    severity: Severity | None = None
    merchant: MerchantId | None = None
    payment: PaymentId | None = None
    assignee: OperatorName | None = None
    opened_before: Instant | None = None
    max_delta: MaxDelta | None = None
    limit: Limit = 20
    starting_after: DiscrepancyId | None = None


class Assignment(Struct, frozen=True, forbid_unknown_fields=True):
    """The operator who is to deal with it; null for none."""

    assignee: OperatorName | None
    note: Note | None = None


class Snooze(Struct, frozen=True, forbid_unknown_fields=True):
    """Keeps it out of the status report until a time, at most 90 days from now."""

    until: Instant
    note: Note


class ResolutionRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's decision to close one discrepancy."""

    reason: Reason
    resolution: Resolution = "explained"
    dry_run: DryRun = False


class BulkResolution(Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's decision to close all open discrepancies that match; at least one filter is required."""

    reason: Reason
    expect: ExpectedCount
    resolution: Resolution = "explained"
    kind: DiscrepancyKind | None = None
    severity: Severity | None = None
    merchant: MerchantId | None = None
    payment: PaymentId | None = None
    assignee: OperatorName | None = None
    opened_before: Instant | None = None
    max_delta: MaxDelta | None = None
    dry_run: DryRun = False


class DiscrepancyOutcome(Struct):
    """The outcome for one discrepancy. `unchanged`: it was so before."""

    id: str
    outcome: Literal["assigned", "snoozed", "resolved", "would_resolve", "unchanged"]
    detail: str


class DiscrepancyOutcomeList(Struct):
    """One outcome for each discrepancy."""

    object: Literal["list"]
    data: list[DiscrepancyOutcome]
    has_more: bool
