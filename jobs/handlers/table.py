"""The handlers of the outbox: their events, what they write in the database, what they call at the provider.

A handler takes a batch and those of its event ids that it is to handle. It finishes them, or raises; then each half of
them is tried again. outbox.handlers holds the same table for the database; a test compares them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from msgspec import Struct

from jobs.handlers.calls import make_calls
from jobs.handlers.disputes import EVIDENCE
from jobs.handlers.payments import CANCEL, CAPTURE, CONFIRM, CREATE, close, settle
from jobs.handlers.refunds import REFUND
from jobs.handlers.webhooks import apply
from jobs.worker import Batch, Worker

HandleEvents = Callable[[Worker, Batch, list[str]], Awaitable[None]]


class Handler(Struct, frozen=True):
    """One handler. `function` is the SQL function that does its work or commits its calls before they are sent."""

    name: str
    events: tuple[str, ...]
    function: str
    provider_call: str | None
    handle: HandleEvents


CANCEL_EVENTS = (
    "payment.action_overdue",
    "payment.attempt_failed",
    "payment.authorized_late",
    "payment.cancel_requested",
    "payment.orphan_found",
)

HANDLER_TABLE: tuple[Handler, ...] = (
    Handler(
        "submit", ("payment.initiated",),
        "surety.begin_calls", "create PaymentIntent, unconfirmed", partial(make_calls, CREATE),
    ),
    Handler(
        "confirm", ("payment.provider_submitted",),
        "surety.begin_calls", "confirm PaymentIntent", partial(make_calls, CONFIRM),
    ),
    Handler(
        "capture", ("payment.capture_requested",),
        "surety.begin_calls", "capture PaymentIntent", partial(make_calls, CAPTURE),
    ),
    Handler(
        "cancel", CANCEL_EVENTS,
        "surety.begin_calls", "cancel PaymentIntent", partial(make_calls, CANCEL),
    ),
    Handler(
        "refund", ("refund.pending",),
        "surety.begin_calls", "create Refund", partial(make_calls, REFUND),
    ),
    Handler(
        "evidence", ("dispute.evidence_given",),
        "surety.begin_calls", "update Dispute, then fetch it", partial(make_calls, EVIDENCE),
    ),
    Handler(
        "settle", ("payment.confirmed",),
        "surety.open_settlement_expectation", None, settle,
    ),
    Handler(
        "close", ("payment.settled",),
        "surety.close_settlement_expectation", None, close,
    ),
    Handler(
        "apply", ("webhook.received",),
        "surety.record_event_results", "fetch what a webhook does not prove", apply,
    ),
)  # fmt: skip

HANDLERS: dict[str, HandleEvents] = {handler.name: handler.handle for handler in HANDLER_TABLE}
