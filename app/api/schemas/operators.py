"""Dead letters, the decisions about them, and the status report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Limit, whole
from app.status_findings import FindingId

DeadLetterAction = Literal["replay", "discard"]
LetterStatus = Literal["open", "replayed", "discarded", "resolved"]
LetterId = Annotated[str, Meta(pattern=whole("dl_[0-9a-f]{32}"), extra={"form": "must be a dead letter's id"})]
HandlerName = Annotated[str, Meta(min_length=1, max_length=63, description="Only those of one handler.")]
ErrorText = Annotated[
    str, Meta(min_length=1, max_length=500, description="Only those whose last error contains this text.")
]
Reason = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"\S", description="Why; kept in the audit trail.")]
DryRun = Annotated[bool, Meta(description="Only report what would happen.")]


class DeadLetterEvent(Struct):
    id: str
    type: str


class Attempt(Struct):
    """One try. `counted` is false where the failure was not the event's: a busy provider, a stopped worker."""

    at: str
    worker: str
    error: str
    counted: bool = True


class DeadLetterPayment(Struct):
    """The payment that the event is about, as it stands now; `amount` is in minor units, `text` the same for people."""

    id: str
    merchant: str
    state: str
    amount: int
    currency: str
    text: str


class LastKnownProviderState(Struct):
    """The provider's state as last known, at `as_of`; the provider is not asked anew."""

    name: str
    id: str | None
    holds: Literal["object", "nothing", "unknown"]
    as_of: str | None


class DiscardEffect(Struct):
    """The effect of discarding, or the reason why it is refused."""

    verdict: Literal["fail", "cancel", "forget", "refuse"]
    detail: str


class DeadLetterClosure(Struct):
    at: str
    by: str | None
    because: str


class DeadLetter(Struct):
    """An event that was given up on, with all its errors and what can be done about it."""

    id: str
    object: Literal["dead_letter"]
    status: LetterStatus
    handler: str
    event: DeadLetterEvent
    reason: str
    attempts: list[Attempt]
    died_at: str
    payment: DeadLetterPayment | None
    provider: LastKnownProviderState | None
    on_replay: str | None
    on_discard: DiscardEffect | None
    closed: DeadLetterClosure | None


class DeadLetterList(Struct):
    """The oldest first. `starting_after` the last one's id brings the next page."""

    object: Literal["list"]
    data: list[DeadLetter]
    has_more: bool


class DeadLettersQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which dead letters to list."""

    status: LetterStatus = "open"
    handler: HandlerName | None = None
    error: ErrorText | None = None
    limit: Limit = 20
    starting_after: LetterId | None = None


class Decision(Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator decided about one letter."""

    reason: Reason
    dry_run: DryRun = False


class BulkDecision(Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator decided about all open letters that match; at least one of `handler` and `error` is needed."""

    reason: Reason
    handler: HandlerName | None = None
    error: ErrorText | None = None
    starting_after: LetterId | None = None
    dry_run: DryRun = False


class DecisionResult(Struct):
    """What became of one letter, and why."""

    id: str
    outcome: Literal["replayed", "discarded", "unchanged", "would_replay", "would_discard", "refused", "not_found"]
    detail: str


class DecisionResultList(Struct):
    """What became of up to 100 letters. Ask on with `starting_after` set to the last one's id."""

    object: Literal["list"]
    data: list[DecisionResult]
    has_more: bool


class FindingDocument(Struct):
    """A finding for an operator: `id`, its heading in docs/operations.md; `urgency` (1 look, 2 act); `what`, the
    problem; `next`, the next command or place to look.
    """

    id: FindingId
    urgency: Literal[1, 2]
    what: str
    next: str


class StatusReport(Struct):
    """The status of the service: the verdict, its findings, and `state`, the figures they are based on."""

    object: Literal["status"]
    verdict: Literal["good", "look", "act"]
    findings: list[FindingDocument]
    state: dict[str, Any]
