"""Calls about customers: creating one before its first payment, passing its data on, saving and detaching its methods.

surety.begin_customer_calls commits each call before it is sent (db/sql/customers/calls.sql).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

from msgspec import Struct, field

from jobs.handlers.calls import (
    Verdict,
    begin_and_make_calls,
    call_result,
    error_fields,
    failed_call_result,
    missing_subject_results,
    prevented_result,
    record_as_completed,
    record_event_results,
    released_result,
    unblocked_events,
)
from jobs.handlers.payments import CREATE
from jobs.recorder import CallResult
from jobs.stripe.client import ProviderResponse
from jobs.stripe.errors import (
    CallRefused,
    ObjectUnreadable,
    OutcomeUnknown,
    ProviderError,
    RequestRejected,
    ResponseMismatch,
)
from jobs.stripe.facts import Json, id_of, required
from jobs.stripe.shown import failure, saved_card
from jobs.worker import Batch, Worker

WAIT_SECONDS = 1.0


class CustomerCall(Struct, kw_only=True):
    """A row of surety.begin_customer_calls: the call of one event, as it was committed."""

    event_id: str
    customer_id: str
    payment_id: str | None
    verdict: Verdict
    operation: str
    idempotency_key: str | None
    request: Json
    customer_version: int
    account: str
    customer_provider_id: str | None
    object_id: str | None
    livemode: bool
    first_sent_at: datetime | None
    last_sent_at: datetime
    begun_at: float = field(default_factory=time.monotonic)


class CustomerOperation(Struct, frozen=True, kw_only=True):
    """One kind of call. `send` returns the response; `read` what surety.record_customer_results takes of it.

    `wait` is the result of a call that must wait.
    """

    name: str
    send: Callable[[Worker, CustomerCall], Awaitable[ProviderResponse]]
    read: Callable[[CustomerCall, ProviderResponse], Json]
    wait: CallResult = field(default_factory=dict)


async def submit_payments(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Create the intents of payments, and before them those customers that the provider has not got."""
    waiting = await begin_and_make_calls(CREATE, worker, batch, event_ids)
    if not waiting or batch.is_lost:
        return
    ready = await create_customers(worker, batch, waiting)
    if not ready or batch.is_lost:
        return
    left = await begin_and_make_calls(CREATE, worker, batch, ready)
    released = released_result("earlier_call", WAIT_SECONDS) | {"error": "its customer is not at the provider"}
    if left:
        await record_event_results(worker, batch, [{"event_id": event_id} | released for event_id in left])


async def create_customers(worker: Worker, batch: Batch, event_ids: list[str]) -> list[str]:
    """Create the customers of payments at the provider; returns the events whose customer is there.

    The other events are finished: as failed, or given back.
    """
    calls = await begin(CREATE_CUSTOMER, worker, batch, event_ids)
    events_of: dict[str, list[str]] = {}
    for call in calls:
        events_of.setdefault(call.customer_id, []).append(call.event_id)
    ready = [event_id for call in calls if call.verdict == "skip" for event_id in [call.event_id]]

    async def create(call: CustomerCall) -> list[CallResult]:
        result = await make_customer_call(CREATE_CUSTOMER, worker, batch, call)
        if "error" not in result:
            ready.append(call.event_id)
            return [result]
        for event_id in events_of[call.customer_id]:
            if event_id in ready:
                ready.remove(event_id)
        about = {
            name: result[name] for name in ("error", "outage", "release_seconds", "release_cause") if name in result
        }
        others = [event_id for event_id in events_of[call.customer_id] if event_id != call.event_id]
        return [result | {"event_id": call.event_id}, *({"event_id": event_id} | about for event_id in others)]

    await record_as_completed(worker, batch, [partial(create, call) for call in calls if call.verdict != "skip"])
    return ready


async def make_customer_calls(operation: CustomerOperation, worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Make the calls of these events and record the result of each."""
    event_ids = await unblocked_events(worker, batch, event_ids)
    if not event_ids:
        return

    async def make(call: CustomerCall) -> list[CallResult]:
        event: CallResult = {"event_id": call.event_id}
        if call.verdict == "skip":
            return [event]
        if call.verdict == "wait":
            return [event | operation.wait]
        return [event | await make_customer_call(operation, worker, batch, call)]

    calls = await begin(operation, worker, batch, event_ids)
    await record_as_completed(worker, batch, [partial(make, call) for call in calls])


async def begin(operation: CustomerOperation, worker: Worker, batch: Batch, event_ids: list[str]) -> list[CustomerCall]:
    """Commit the calls of these events. Events without a customer are failed."""
    calls = await worker.database.rows(
        CustomerCall,
        "select event_id, customer_id, payment_id, verdict, operation, idempotency_key, request, customer_version,"
        " account, customer_provider_id, object_id, livemode, first_sent_at, last_sent_at"
        " from surety.begin_customer_calls(%s, %s, %s, %s, %s)",
        batch.batch_id, batch.fence, operation.name, worker.actor, event_ids,
    )  # fmt: skip
    missing = await missing_subject_results(worker, batch, event_ids, {call.event_id for call in calls})
    if missing:
        await record_event_results(worker, batch, missing)
    return calls


async def make_customer_call(
    operation: CustomerOperation, worker: Worker, batch: Batch, call: CustomerCall
) -> CallResult:
    """The result of one call, without its event."""
    prevented = prevented_result(worker, batch, call, call.operation, livemode=call.livemode)
    if prevented is not None:
        return prevented
    about = {"id": call.customer_id, "version": call.customer_version}

    def read(answer: ProviderResponse) -> CallResult:
        said = operation.read(call, answer)
        # Nothing of the answer is kept: it holds personal data.
        snapshot = {"customer": call.customer_id}
        return {"outcome": "answered", "status": answer.status, "snapshot": snapshot, "customer": about | said}

    def explain(error: ProviderError) -> CallResult:
        if isinstance(error, CallRefused) and operation is UPDATE_CUSTOMER:
            return error_fields(error) | {"customer": about | {"failure": failure(error.error)}}
        result = failed_call_result(call.account, error) | {"customer": about}
        if isinstance(error, ObjectUnreadable):
            result |= released_result("provider_busy", WAIT_SECONDS)
        return result

    return await call_result(call, call.operation, operation.send(worker, call), read=read, explain=explain)


async def send_new_customer(worker: Worker, call: CustomerCall) -> ProviderResponse:
    """The new customer, or the one that an earlier send created."""
    key = call.idempotency_key
    if call.verdict == "replace_key":
        assert call.first_sent_at is not None
        sent = call.first_sent_at, call.last_sent_at
        found = await worker.stripe.find_customer(call.account, call.customer_id, *sent, call.begun_at)
        if found is not None:
            return found
        query = "select surety.replace_customer_call_key(%s, %s)"
        key = await worker.database.value(query, call.customer_id, call.operation)
    assert key is not None
    return await worker.stripe.create_customer(call.account, key, call.request)


def read_new_customer(call: CustomerCall, answer: ProviderResponse) -> Json:
    """The customer's id at the provider. Raises OutcomeUnknown or ResponseMismatch if it isn't this one."""
    check_object(answer.body, "customer")
    owner = required(answer.body, "metadata").get("surety_customer")
    if owner != call.customer_id:
        raise ResponseMismatch(
            f"{answer.body['id']} belongs to {owner}",
            kind="foreign",
            differs=("customer", call.customer_id, owner),
            object_id=answer.body["id"],
        )
    return {"provider_id": answer.body["id"]}


async def send_update(worker: Worker, call: CustomerCall) -> ProviderResponse:
    """The customer with its present data."""
    assert call.customer_provider_id is not None
    assert call.idempotency_key is not None
    return await worker.stripe.update_customer(
        call.account, call.idempotency_key, call.customer_provider_id, call.request
    )


def read_update(call: CustomerCall, answer: ProviderResponse) -> Json:
    """Nothing: the answer is the customer as it was sent."""
    check_object(answer.body, "customer")
    if answer.body["id"] != call.customer_provider_id:
        answered = answer.body["id"]
        raise ResponseMismatch(
            f"{answered} was answered about {call.customer_provider_id}",
            kind="foreign",
            differs=("customer", call.customer_provider_id, answered),
            object_id=answered,
        )
    return {}


async def fetch_method_of_payment(worker: Worker, call: CustomerCall) -> ProviderResponse:
    """The payment's intent with its payment method."""
    assert call.object_id is not None
    return await worker.stripe.fetch_intent_with_method(call.account, call.object_id)


def read_saved_method(call: CustomerCall, answer: ProviderResponse) -> Json:
    """The payment method, if the provider has attached it to the customer. Raises ObjectUnreadable without one."""
    check_object(answer.body, "payment_intent")
    method = required(answer.body, "payment_method")
    if not isinstance(method, dict) or "customer" not in method:
        raise ObjectUnreadable(f"{call.object_id} does not show its payment method")
    owner = id_of(method["customer"])
    if answer.body["id"] != call.object_id or owner not in (None, call.customer_provider_id):
        raise ResponseMismatch(
            f"{required(method, 'id')} is of {owner}, not {call.customer_provider_id}",
            kind="foreign",
            differs=("customer", call.customer_provider_id, owner),
            object_id=required(method, "id"),
        )
    return {"method": saved_card(method)} if owner is not None else {}


async def send_detachment(worker: Worker, call: CustomerCall) -> ProviderResponse:
    """The payment method, detached."""
    assert call.object_id is not None
    assert call.idempotency_key is not None
    if call.verdict == "ask":
        found = await fetch_method(worker, call.account, call.object_id)
        if found is None or found.body["customer"] is None:
            return found or ProviderResponse({"id": call.object_id, "object": "payment_method"}, 200, None)
    try:
        return await worker.stripe.detach_method(call.account, call.idempotency_key, call.object_id)
    except (CallRefused, RequestRejected):
        found = await fetch_method(worker, call.account, call.object_id)
        if found is not None and found.body["customer"] is not None:
            raise
        return found or ProviderResponse({"id": call.object_id, "object": "payment_method"}, 200, None)


async def fetch_method(worker: Worker, account: str, method_id: str) -> ProviderResponse | None:
    """A payment method as it is at the provider; None if it is gone. Raises ObjectUnreadable without its customer."""
    try:
        found = await worker.stripe.fetch(account, "payment_methods", method_id)
    except RequestRejected as error:
        if error.error.get("code") != "resource_missing":
            raise
        return None
    check_object(found.body, "payment_method")
    if "customer" not in found.body:
        raise ObjectUnreadable(f"{method_id} has no customer")
    return found


def read_detachment(call: CustomerCall, answer: ProviderResponse) -> Json:
    """Nothing: the payment method is detached."""
    check_object(answer.body, "payment_method")
    return {}


def check_object(body: Json, kind: str) -> None:
    """Raises OutcomeUnknown unless a response is an object of that kind, and ObjectUnreadable without its id."""
    if body.get("object") != kind:
        raise OutcomeUnknown(f"an answer that is no {kind.replace('_', ' ')}")
    required(body, "id")


CREATE_CUSTOMER = CustomerOperation(name="create_customer", send=send_new_customer, read=read_new_customer)
UPDATE_CUSTOMER = CustomerOperation(
    name="update_customer",
    send=send_update,
    read=read_update,
    wait=released_result("earlier_call", WAIT_SECONDS) | {"error": "an earlier call is under way"},
)
SAVE_METHOD = CustomerOperation(name="save_method", send=fetch_method_of_payment, read=read_saved_method)
DETACH_METHOD = CustomerOperation(
    name="detach_method",
    send=send_detachment,
    read=read_detachment,
    wait=released_result("method_needed", WAIT_SECONDS) | {"error": "a payment that was accepted needs it"},
)
