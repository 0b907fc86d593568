"""The loop for all calls to a provider: a batch's calls are committed, made concurrently, and their results recorded.

surety.begin_calls commits each call before it is sent. The worker's recorder (jobs/recorder.py) takes the results, also
after the lease was lost. A slow call delays no other result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Literal, Protocol, assert_never

from msgspec import Struct, field

from db.errors import error_text
from jobs.circuit_breaker import circuit_key
from jobs.recorder import CallResult
from jobs.stripe.client import ProviderResponse
from jobs.stripe.errors import (
    AccessRefused,
    CallRefused,
    ProviderBusy,
    ProviderError,
    ProviderOutage,
    ReleaseCause,
    RequestRejected,
    ResponseMismatch,
)
from jobs.stripe.facts import Fact, Json, redacted
from jobs.worker import Batch, Worker

log = logging.getLogger("surety.calls")

CONCURRENT_CALLS_MAX = 32
# How long an event waits for the outcome of an earlier call, or after a call was not sent.
WAIT_SECONDS = 1.0

CANCELED_BEFORE_CREATION = {"code": "canceled", "message": "canceled before the provider held it"}

Verdict = Literal["send", "ask", "replace_key", "find", "needs_customer", "wait", "skip"]
"""The rows of surety.call_verdicts, which explain each verdict."""


class AccountSubject(Protocol):
    """The subject of a call to an account of the provider."""

    @property
    def payment_id(self) -> str | None: ...

    @property
    def account(self) -> str: ...


class CallSubject(Struct, kw_only=True):
    """The payment of a call, with the values that a response must agree with. Amounts are in minor units."""

    payment_id: str
    account: str
    provider_id: str | None
    amount_minor: int
    currency: str
    livemode: bool


class ProviderCall(CallSubject, kw_only=True):
    """A row of surety.begin_calls: the call of one event, as it was committed."""

    event_id: str
    subject_id: str
    verdict: Verdict
    operation: str
    idempotency_key: str | None
    request: Json | None
    first_sent_at: datetime | None
    last_sent_at: datetime | None
    send_number: int | None
    begun_at: float = field(default_factory=time.monotonic)


class CallOperation(Struct, frozen=True, kw_only=True):
    """One kind of call. `read` turns its response into a result; `explain` turns its failure into one."""

    name: str
    """As surety.begin_calls takes it."""
    send: Callable[[Worker, ProviderCall, str, Json], Awaitable[ProviderResponse]]
    """Send the request (last) under the key (third)."""
    find: Callable[[Worker, ProviderCall], Awaitable[ProviderResponse | None]]
    """Return the effect of an earlier send; None if there is none, or if repeating the call does no harm."""
    read: Callable[[ProviderCall, ProviderResponse], CallResult]
    explain: Callable[[ProviderCall, ProviderError], CallResult]


CallWork = Callable[[], Awaitable[list[CallResult]]]


async def make_calls(operation: CallOperation, worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Make the calls of these events and record the result of each."""
    await begin_and_make_calls(operation, worker, batch, event_ids)


async def begin_and_make_calls(
    operation: CallOperation, worker: Worker, batch: Batch, event_ids: list[str]
) -> list[str]:
    """As make_calls; returns the events that are left, as the provider has not got their customers."""
    event_ids = await unblocked_events(worker, batch, event_ids)
    if not event_ids:
        return []
    calls = await worker.database.rows(
        ProviderCall,
        "select event_id, subject_id, payment_id, verdict, operation, idempotency_key, request, account, provider_id,"
        " first_sent_at, last_sent_at, send_number, amount_minor, currency, livemode"
        " from surety.begin_calls(%s, %s, %s, %s, %s)",
        batch.batch_id, batch.fence, operation.name, worker.actor, event_ids,
    )  # fmt: skip
    missing = await missing_subject_results(worker, batch, event_ids, {call.event_id for call in calls})
    if missing:
        await record_event_results(worker, batch, missing)
    left = [call.event_id for call in calls if call.verdict == "needs_customer"]
    ready = (call for call in calls if call.verdict != "needs_customer") if left else calls
    await record_as_completed(worker, batch, [partial(make_call, operation, worker, batch, call) for call in ready])
    return left


async def make_call(operation: CallOperation, worker: Worker, batch: Batch, call: ProviderCall) -> list[CallResult]:
    """The result of one event's call. An unknown verdict sends nothing."""
    event: CallResult = {"event_id": call.event_id}
    match call.verdict:
        case "skip":
            return [event]
        case "wait":
            reason = "an earlier call's outcome is unknown yet"
            return [event | released_result("earlier_call", WAIT_SECONDS) | {"error": reason}]
        case "send" | "ask" | "replace_key" | "find":
            undone = {"undone_send": call.send_number}
            prevented = prevented_result(worker, batch, call, call.operation, livemode=call.livemode)
            if prevented is not None:
                return [event | prevented | undone]
            response = provider_response(operation, worker, call)
            read, explain = partial(operation.read, call), partial(operation.explain, call)
            result = await call_result(call, call.operation, response, read=read, explain=explain)
            return [event | result | (undone if "access_refused" in result else {})]
        case "needs_customer":
            raise AssertionError("the customer of a payment is created before its call is made")
        case _:
            assert_never(call.verdict)


def prevented_result(
    worker: Worker, batch: Batch, subject: AccountSubject, operation: str, *, livemode: bool
) -> CallResult | None:
    """The result of a committed call that must not be sent; None if it may be sent."""
    about = {"payment_id": subject.payment_id, "operation": operation}
    if batch.is_lost or worker.stopping.is_set():
        return released_result("worker_stopped", 0) | about | {"error": "its worker stopped"}
    if livemode != worker.stripe.livemode:
        # The dump of another database was restored beneath this worker, which ends soon (jobs/mode.py).
        released = released_result("worker_stopped", WAIT_SECONDS) | about
        return released | {"error": "its worker's key is of the other mode"}
    if subject.account in worker.circuit_breaker.blocked:
        return not_sent_result(subject, operation) | released_result("circuit_open", WAIT_SECONDS)
    return None


async def provider_response(operation: CallOperation, worker: Worker, call: ProviderCall) -> ProviderResponse:
    """The response to a call, or the effect of an earlier send. surety.call_verdicts describes the verdicts."""
    assert call.request is not None
    assert call.idempotency_key is not None
    key = call.idempotency_key
    if call.verdict != "send":
        try:
            found = await operation.find(worker, call)
        except ProviderError as error:
            # The call keeps the status of its last send: 4xx would say that nothing was executed.
            error.status = None
            raise
        if found is not None:
            return found
        if call.verdict == "find":
            raise CallRefused("canceled before the provider held it", body={"error": CANCELED_BEFORE_CREATION})
        if call.verdict == "replace_key":
            query = "select surety.replace_call_key(%s, %s)"
            key = await worker.database.value(query, call.payment_id, call.operation)
    return await operation.send(worker, call, key, call.request)


async def unblocked_events(worker: Worker, batch: Batch, event_ids: list[str]) -> list[str]:
    """The events that may be handled now; those whose account's circuit is open are given back."""
    if not worker.circuit_breaker.blocked:
        return event_ids
    query = "select surety.hold_blocked_events(%s, %s, %s)"
    held = set(await worker.database.value(query, batch.batch_id, batch.fence, event_ids))
    return [event_id for event_id in event_ids if event_id not in held]


def not_sent_result(subject: AccountSubject, operation: str) -> CallResult:
    """The result of a committed call that was not sent, because its account's circuit has opened."""
    return {
        "payment_id": subject.payment_id,
        "operation": operation,
        "outcome": "not_sent",
        "error": "not sent: the account's circuit is open",
        "outage": circuit_key(subject.account),
    }


async def missing_subject_results(
    worker: Worker, batch: Batch, event_ids: list[str], found: set[str]
) -> list[CallResult]:
    """Failures of events whose payment, refund, dispute or webhook is missing; none if the lease is lost."""
    missing = [event_id for event_id in event_ids if event_id not in found]
    if missing and not found:
        held = await worker.database.value("select outbox.renew_lease(%s, %s)", batch.batch_id, batch.fence)
        batch.is_lost = not held
    return (
        [] if batch.is_lost else [{"event_id": event_id, "error": "what it is about is gone"} for event_id in missing]
    )


async def record_as_completed(worker: Worker, batch: Batch, works: Iterable[CallWork]) -> None:
    """Run the calls of a batch, and record each one's results."""

    async def record(results: list[CallResult]) -> None:
        await record_event_results(worker, batch, results)

    await run_calls(works, record)


async def run_calls(works: Iterable[CallWork], record: Callable[[list[CallResult]], Awaitable[None]]) -> None:
    """Run calls, CONCURRENT_CALLS_MAX at once, and record the results of each when it ends. Raises the first error."""
    places = asyncio.Semaphore(CONCURRENT_CALLS_MAX)

    async def run(work: CallWork) -> None:
        async with places:
            results = await work()
        await record(results)

    tasks = [asyncio.create_task(run(work)) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def call_result(
    subject: AccountSubject,
    operation: str,
    response: Awaitable[ProviderResponse],
    *,
    read: Callable[[ProviderResponse], CallResult],
    explain: Callable[[ProviderError], CallResult],
) -> CallResult:
    """The result of one call: its response as `read` understands it, or its failure as `explain` does."""
    began = time.monotonic()
    try:
        result = read(await response)
    except ProviderError as error:
        result = explain(error)
    except Exception as error:  # An unforeseen failure of one call must not touch the others.
        log.exception("%s of %s", operation, subject.payment_id)
        result = {"outcome": "error", "error": error_text(error)}
    if "outage" in result:
        result["failed_call"] = (subject.account, began)
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    return {"payment_id": subject.payment_id, "operation": operation, "duration_ms": duration_ms, **result}


def answered_result(answer: ProviderResponse, facts: list[Fact]) -> CallResult:
    """The result of a call with a response that was understood."""
    return {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body), "facts": facts}


def released_result(cause: ReleaseCause, seconds: float) -> CallResult:
    """The fields of a result whose event is given back uncounted."""
    return {"release_seconds": seconds, "release_cause": cause}


def error_fields(error: ProviderError) -> CallResult:
    """The fields of every failed call's result."""
    return {"outcome": error.outcome, "status": error.status, "snapshot": redacted(error.body)}


def failed_call_result(account: str, error: ProviderError) -> CallResult:
    """The result of a failed call: released if the provider is busy, counted by the circuit in an outage."""
    result = error_fields(error) | {"error": str(error)}
    if isinstance(error, ProviderOutage):
        result["outage"] = circuit_key(account)
    elif isinstance(error, AccessRefused):
        result |= {"outage": circuit_key(account), "access_refused": True}
    elif isinstance(error, ProviderBusy):
        result |= released_result(error.cause, error.seconds)
    return result


def discrepancy_result(subject: CallSubject, operation: str, error: ProviderError) -> CallResult:
    """As failed_call_result, with a discrepancy where the provider's records differ from ours."""
    result = failed_call_result(subject.account, error)
    if isinstance(error, ResponseMismatch):
        result["discrepancy"] = {
            "kind": error.kind,
            "subject": f"{subject.payment_id}:{operation}",
            "detail": str(error),
            "fields": [error.field],
            "source_there": error.object_id,
        }
    elif isinstance(error, RequestRejected) and error.error.get("code") == "resource_missing":
        result["discrepancy"] = {
            "kind": "missing_at_provider",
            "subject": subject.provider_id or subject.payment_id,
            "detail": str(error),
            "fields": [{"field": "object", "here": subject.provider_id or subject.payment_id, "there": None}],
        }
    return result


async def record_event_results(worker: Worker, batch: Batch, results: list[CallResult]) -> None:
    """Record results of a batch's events, which finishes the events."""
    failed = [result.pop("failed_call") for result in results if "failed_call" in result]
    await worker.circuit_breaker.check_accounts(failed)
    held = {"batch_id": batch.batch_id, "fence": batch.fence}
    lost = await worker.recorder.record([result | held for result in results])
    batch.is_lost = batch.is_lost or batch.batch_id in lost
