"""The handlers of the outbox: their events, their writes to the database, their calls to the provider.

A handler takes a batch and the ids of the events to handle. It finishes them or raises; after an error, each half of
them is tried again. outbox.handler_events holds the events for the database; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from msgspec import Struct

from jobs.handlers.calls import make_calls
from jobs.handlers.client_secrets import seal_secrets
from jobs.handlers.customers import (
    DETACH_METHOD,
    SAVE_METHOD,
    UPDATE_CUSTOMER,
    make_customer_calls,
    submit_payments,
)
from jobs.handlers.disputes import EVIDENCE
from jobs.handlers.payments import CANCEL, CAPTURE, CONFIRM, expect_settlement, meet_expected_settlement
from jobs.handlers.refunds import REFUND
from jobs.handlers.webhooks import apply_webhooks
from jobs.worker import Batch, Worker

HandleEvents = Callable[[Worker, Batch, list[str]], Awaitable[None]]


class Handler(Struct, frozen=True):
    """One handler. `function` is the SQL function that does its work or writes its calls before they are sent."""

    name: str
    events: tuple[str, ...]
    function: str
    provider_call: str | None
    leads_to: str
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
        "submit", ("payment.initiated", "payment.released"),
        "surety.begin_calls", "create PaymentIntent, unconfirmed", "provider_submitted, failed",
        submit_payments,
    ),
    Handler(
        "confirm", ("payment.provider_submitted",),
        "surety.begin_calls", "confirm it, by id", "confirmed, authorized, requires_action, processing, failed",
        partial(make_calls, CONFIRM),
    ),
    Handler(
        "capture", ("payment.capture_requested",),
        "surety.begin_calls", "capture it", "confirmed",
        partial(make_calls, CAPTURE),
    ),
    Handler(
        "cancel", CANCEL_EVENTS,
        "surety.begin_calls", "cancel it", "canceled, failed",
        partial(make_calls, CANCEL),
    ),
    Handler(
        "refund", ("refund.pending",),
        "surety.begin_calls", "create refund", "refund.succeeded, refund.failed",
        partial(make_calls, REFUND),
    ),
    Handler(
        "evidence", ("dispute.evidence_given",),
        "surety.begin_calls", "update dispute",
        "dispute.under_review, dispute.warning_under_review, dispute.appeal_under_review",
        partial(make_calls, EVIDENCE),
    ),
    Handler(
        "update_customer", ("customer.out_of_date",),
        "surety.begin_customer_calls", "update customer", "its data at the provider",
        partial(make_customer_calls, UPDATE_CUSTOMER),
    ),
    Handler(
        "save_method", ("payment.method_usable",),
        "surety.begin_customer_calls", "read PaymentIntent with its method", "customer.payment_method_saved",
        partial(make_customer_calls, SAVE_METHOD),
    ),
    Handler(
        "detach_method", ("customer.payment_method_detached",),
        "surety.begin_customer_calls", "detach payment method", "nothing is charged by it any more",
        partial(make_customer_calls, DETACH_METHOD),
    ),
    Handler(
        "seal_secret", ("payment.client_secret_requested",),
        "surety.answer_secret_requests", "read PaymentIntent", "a sealed client secret for the process that asked",
        seal_secrets,
    ),
    Handler(
        "apply_webhooks", ("webhook.received",),
        "surety.record_results", "fetch, where an event is no proof", "facts",
        apply_webhooks,
    ),
    Handler(
        "expect_settlement", ("payment.confirmed",),
        "surety.expect_settlement", None, "an expected settlement",
        expect_settlement,
    ),
    Handler(
        "meet_settlement", ("payment.settled", "payment.money_available"),
        "surety.meet_expected_settlement", None, "a settlement met",
        meet_expected_settlement,
    ),
)  # fmt: skip

HANDLERS: dict[str, HandleEvents] = {handler.name: handler.handle for handler in HANDLER_TABLE}
