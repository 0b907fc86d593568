"""A batch's calls to a provider: what to send, all of them at once, their results recorded as they come.

begin_calls commits what will be sent before it is sent; record_results takes what came of it, whoever holds the lease by
then. A slow call keeps nobody's result waiting: whatever has come while one group was recorded makes the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from msgspec import Struct
from psycopg.types.json import Jsonb

from jobs.database import is_passing
from jobs.stripe_facts import Fact, Json, Origin, decline_facts, failure, intent_facts, redacted
from jobs.stripe_rail import Answer, Busy, Declined, Misfit, ProviderError, Refused, Unknown
from jobs.worker import Batch, Worker

log = logging.getLogger("surety.calls")

CALLS_AT_ONCE = 32

Result = dict[str, Any]


class Call(Struct):
    """A row of surety.begin_calls: what to do about one event's payment."""

    event_id: str
    payment_id: str
    todo: str
    idempotency_key: str | None
    request: Json | None
    account: str
    provider_id: str | None
    sends: int | None
    first_sent_at: datetime | None
    last_sent_at: datetime | None
    failures: int
    amount_minor: int
    currency: str
    livemode: bool
    state: str


Perform = Callable[[Worker, Call], Awaitable[Answer]]


async def make_calls(worker: Worker, batch: Batch, event_ids: list[str], operation: str, perform: Perform) -> None:
    """Make the calls of these events and record what comes of each."""
    calls = await worker.database.rows(
        Call,
        "select event_id, payment_id, todo, idempotency_key, request, account, provider_id, sends, first_sent_at,"
        " last_sent_at, failures, amount_minor, currency, livemode, state from surety.begin_calls(%s, %s, %s, %s, %s)",
        batch.batch_id, batch.fence, operation, worker.actor, event_ids,
    )  # fmt: skip
    results: asyncio.Queue[Result] = asyncio.Queue()
    places = asyncio.Semaphore(CALLS_AT_ONCE)

    async def make(call: Call) -> None:
        async with places:
            if call.todo == "skip":
                result: Result = {"event_id": call.event_id}
            elif batch.is_lost or worker.stopping.is_set():
                result = {"event_id": call.event_id, "release_seconds": 0, "error": "the worker stopped"}
            else:
                result = await outcome(worker, call, operation, perform)
            results.put_nowait(result)

    missing = set(event_ids) - {call.event_id for call in calls}
    for event_id in missing if calls else ():
        results.put_nowait({"event_id": event_id, "error": "its payment is not there"})
    async with asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(make(call))
        left = len(calls) + results.qsize()
        while left:
            group_of_results = [await results.get()]
            while not results.empty():
                group_of_results.append(results.get_nowait())
            left -= len(group_of_results)
            await record(worker, batch, group_of_results)


async def outcome(worker: Worker, call: Call, operation: str, perform: Perform) -> Result:
    """What came of one call, for surety.record_results."""
    began = time.monotonic()
    result: Result = {"event_id": call.event_id, "payment_id": call.payment_id, "operation": operation}
    origin = Origin(call.account, call.livemode, "response")
    try:
        answer = await perform(worker, call)
        result |= answered(call, answer)
    except (Refused, Declined) as error:
        told = {"outcome": error.outcome, "status": error.status, "snapshot": redacted(error.body)}
        if operation == "create":
            result |= told | {"refused": failure(error.error)}
        else:
            assert call.provider_id is not None
            facts = decline_facts(error.error, origin, call.payment_id, call.provider_id)
            result |= told | {"facts": facts}
    except Busy as error:
        result |= {"outcome": error.outcome, "status": error.status, "error": str(error)}
        result["release_seconds"] = error.seconds
    except ProviderError as error:
        result |= {"outcome": error.outcome, "status": error.status, "error": str(error)}
        if isinstance(error, Misfit):
            subject = f"{call.payment_id}:{operation}"
            result["discrepancy"] = {"kind": error.kind, "subject": subject, "detail": str(error)}
    except Exception as error:  # noqa: BLE001  # whatever went wrong about one call must not touch the others
        log.exception("%s of %s", operation, call.payment_id)
        result |= {"outcome": "error", "error": f"{type(error).__name__}: {error}"}
    result["duration_ms"] = round((time.monotonic() - began) * 1000, 3)
    return result


def answered(call: Call, answer: Answer) -> Result:
    """An intent that was answered, as facts; it must be the payment's own."""
    check_identity(call, answer.body)
    origin = Origin(call.account, bool(answer.body["livemode"]), "response", answer.request_id)
    told: Result = {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body)}
    if answer.body["amount"] == call.amount_minor:
        facts: list[Fact] = intent_facts(answer.body, origin)
        return told | {"facts": facts}
    detail = f"{answer.body['id']} is about {answer.body['amount']} instead of {call.amount_minor}"
    if call.provider_id is None:
        raise Misfit(detail, kind="amount")
    # Once it may have been charged, what happened is booked whatever was asked for.
    subject = {"kind": "amount", "subject": answer.body["id"], "detail": detail}
    return told | {"facts": intent_facts(answer.body, origin), "discrepancy": subject}


def check_identity(call: Call, intent: Json) -> None:
    """Raises Misfit unless the answer is the payment intent of this payment."""
    try:
        named = intent["metadata"].get("surety_payment")
        whole = intent["object"] == "payment_intent" and intent["id"].startswith("pi_") and intent["status"]
        if not whole or not isinstance(intent["amount"], int) or not isinstance(intent["currency"], str):
            raise Unknown("an answer that is no payment intent")
    except (KeyError, AttributeError, TypeError):
        raise Unknown("an answer that is no payment intent") from None
    if call.provider_id is not None and intent["id"] != call.provider_id:
        raise Misfit(f"{intent['id']} was answered about {call.provider_id}", kind="foreign")
    if named != call.payment_id:
        raise Misfit(f"{intent['id']} belongs to {named}", kind="foreign")
    if intent["currency"] != call.currency:
        raise Misfit(f"{intent['id']} is in {intent['currency']} instead of {call.currency}", kind="currency")
    if intent.get("livemode") != call.livemode:
        raise Misfit(f"{intent['id']} has livemode {intent.get('livemode')}", kind="livemode")


async def record(worker: Worker, batch: Batch, results: list[Result]) -> None:
    """Record a group of results; if that fails unforeseen, each half of it, down to the one that can't be recorded."""
    try:
        row = await worker.database.rows(
            Recorded, "select is_held, event_types from surety.record_results(%s, %s, %s, %s)",
            batch.batch_id, batch.fence, worker.actor, Jsonb(results),
        )  # fmt: skip
    except Exception as error:
        if is_passing(error):
            raise
        if len(results) == 1 and not (results[0].keys() & {"facts", "refused", "snapshot"}):
            raise
        if len(results) == 1:
            log.exception("a result of %s can't be recorded", results[0]["event_id"])
            kept = {name: results[0].get(name) for name in ("event_id", "payment_id", "operation", "status")}
            why = {"outcome": "unusable", "error": f"{type(error).__name__}: {error}"}
            await record(worker, batch, [kept | why])
            return
        middle = len(results) // 2
        await record(worker, batch, results[:middle])
        await record(worker, batch, results[middle:])
        return
    batch.is_lost = batch.is_lost or not row[0].is_held
    await worker.wake(row[0].event_types)


class Recorded(Struct):
    """The row of surety.record_results."""

    is_held: bool
    event_types: list[str]
