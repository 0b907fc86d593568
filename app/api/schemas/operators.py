"""Dead letters, the decisions about them, and the status report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Limit, whole
from app.finding import FindingId

DeadLetterAction = Literal["replay", "discard"]
LetterStatus = Literal["open", "replayed", "discarded", "resolved"]
LetterId = Annotated[str, Meta(pattern=whole("dl_[0-9a-f]{24}"), extra={"form": "must be a dead letter's id"})]
HandlerName = Annotated[str, Meta(min_length=1, max_length=63, description="Only those of one handler.")]
ErrorText = Annotated[
    str, Meta(min_length=1, max_length=500, description="Only dead letters whose last error contains this text.")
]
Reason = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=1000,
        pattern=whole(r"(?=.*\S)[^\x00-\x1f\x7f-\x9f]+"),
        description="The reason, for the audit trail.",
        extra={"form": "must be one line of text without control characters"},
    ),
]
DryRun = Annotated[bool, Meta(description="Only report what would happen.")]


class DeadLetterEvent(Struct):
    id: str
    type: str


class Attempt(Struct):
    """One attempt. `counted` is false if the event did not cause the failure: a busy provider, a stopped worker."""

    at: str
    worker: str
    error: str
    counted: bool = True


class DeadLetterPayment(Struct):
    """The event's payment in its present state; `amount` is in minor units, `text` is the amount for people."""

    id: str
    merchant: str
    state: str
    amount: int
    currency: str
    text: str


class LastKnownProviderState(Struct):
    """The provider's state as last known, at `as_of`; no new call is made."""

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
    """An event whose handler gave up, with all its errors and the effects of a replay and a discard."""

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
    """Oldest first. The next page starts after the last id: `starting_after`."""

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
    """An operator's decision about one letter."""

    reason: Reason
    dry_run: DryRun = False


class BulkDecision(Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's decision about all open letters that match; at least one of `handler` and `error` is required."""

    reason: Reason
    handler: HandlerName | None = None
    error: ErrorText | None = None
    starting_after: LetterId | None = None
    dry_run: DryRun = False


class DecisionResult(Struct):
    """The outcome for one letter, and its reason."""

    id: str
    outcome: Literal["replayed", "discarded", "unchanged", "would_replay", "would_discard", "refused", "not_found"]
    detail: str


class DecisionResultList(Struct):
    """The outcomes for up to 100 letters. Continue with `starting_after` set to the last id."""

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
