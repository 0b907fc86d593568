"""webhook.received: records the facts that Stripe's events prove, and fetches the objects of all other events.

jobs/stripe/webhook_events.py says what each type of event proves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from itertools import chain

import msgspec
from psycopg.types.json import Jsonb

from db.errors import error_text
from db.redaction import without_secrets
from jobs.circuit_breaker import circuit_key
from jobs.handlers.calls import (
    WAIT_SECONDS,
    CallWork,
    failed_call_result,
    missing_subject_results,
    record_as_completed,
    record_event_results,
    released_result,
)
from jobs.handlers.customers import fetch_method
from jobs.recorder import CallResult, unreadable_object
from jobs.stripe.client import ProviderResponse
from jobs.stripe.errors import ObjectUnreadable, OutcomeUnknown, ProviderBusy, ProviderError
from jobs.stripe.facts import (
    UNREADABLE,
    Fact,
    FactOrigin,
    Json,
    dispute_facts,
    fraud_warning_facts,
    id_of,
    intent_facts,
    listed_transaction_facts,
    payout_facts,
    redacted,
    refund_facts,
)
from jobs.stripe.shown import saved_card
from jobs.stripe.webhook_events import (
    MONEY_KNOWN,
    FactReader,
    ObjectToFetch,
    ProviderObject,
    StoredWebhook,
    about_access,
    interpret_webhook,
)
from jobs.worker import Batch, Worker

log = logging.getLogger("surety.webhooks")

FETCH_PAUSE_SECONDS = 1.0
FIELDS_OF_EVENTS = ("error", "release_seconds", "release_cause", "outage", "access_refused")
"""The fields of a fetch's result that concern each event that wanted it."""

LIST_OPERATION = "list balance transactions"
LISTED_MIN = 2
"""Of so many balance transactions of one account, one list costs less than a fetch of each."""

WantedObject = tuple[StoredWebhook, ObjectToFetch]
Fetches = dict[ProviderObject, list[StoredWebhook]]

FACT_READERS: dict[str, FactReader] = {
    "payment_intent": intent_facts,
    "refund": refund_facts,
    "payout": payout_facts,
    "radar.early_fraud_warning": fraud_warning_facts,
}


async def apply_webhooks(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """Handle webhook.received: first record the proven facts, in one group; then fetch the other objects."""
    webhooks = await worker.database.rows(
        StoredWebhook,
        "select event_id, provider_event_id, source, account, livemode, type, body"
        " from surety.read_provider_events(%s, %s)"
        " where event_id = any(%s)",
        batch.batch_id, batch.fence, event_ids,
    )  # fmt: skip
    results = await missing_subject_results(worker, batch, event_ids, {webhook.event_id for webhook in webhooks})
    wanted: list[WantedObject] = []
    ignored = [webhook for webhook in webhooks if webhook.livemode != worker.stripe.livemode]
    await audit_ignored(worker, ignored)
    results += [{"event_id": webhook.event_id} for webhook in ignored]
    for webhook in webhooks:
        if webhook in ignored:
            continue
        try:
            meant = interpret_webhook(webhook)
        except (msgspec.MsgspecError, *UNREADABLE) as error:
            reason = f"no {webhook.type} as Stripe sends it: {error_text(error)}"
            results.append({"event_id": webhook.event_id, "error": reason})
            continue
        if isinstance(meant, ObjectToFetch):
            wanted.append((webhook, meant))
        else:
            results.append({"event_id": webhook.event_id, "facts": meant})
    await probe_changed_accounts(worker, [webhook for webhook in webhooks if webhook not in ignored])
    foreign = await methods_not_saved(worker, [want.source for _, want in wanted])
    results += [{"event_id": webhook.event_id} for webhook, want in wanted if want.source in foreign]
    wanted = [(webhook, want) for webhook, want in wanted if want.source not in foreign]
    unknown = await unknown_objects(worker, [want for _, want in wanted])
    results += [
        {"event_id": webhook.event_id, "facts": want.facts}
        for webhook, want in wanted
        if want.unless_object not in unknown
    ]
    wanted = [(webhook, want) for webhook, want in wanted if want.unless_object in unknown]
    blocked = worker.circuit_breaker.blocked
    for account in {want.source.account for _, want in wanted} & blocked:
        held = {
            "error": "not asked: the account's circuit is open",
            "outage": circuit_key(account),
        } | released_result("circuit_open", WAIT_SECONDS)
        results += [held | {"event_id": webhook.event_id} for webhook, want in wanted if want.source.account == account]
    if results:
        await record_event_results(worker, batch, results)
    to_list, to_fetch = group_by_call(
        [(webhook, want) for webhook, want in wanted if want.source.account not in blocked]
    )
    await audit_calls(worker, to_list, to_fetch)
    works: list[CallWork] = [partial(list_for_webhooks, worker, *one) for one in to_list.items()]
    works.extend(partial(fetch_for_webhooks, worker, *one) for one in to_fetch.items())
    await record_as_completed(worker, batch, works)


async def probe_changed_accounts(worker: Worker, webhooks: list[StoredWebhook]) -> None:
    """Probe the merchants' accounts that a webhook says are disconnected or connected again."""
    changed = {webhook.account for webhook in webhooks if about_access(webhook)}
    if changed:
        query = "select surety.accounts_of_merchants(%s)"
        await worker.circuit_breaker.probe_accounts(await worker.database.value(query, sorted(changed)))


async def store_polled_events(worker: Worker, account: str, events: list[Json]) -> None:
    """Store listed events that no webhook has brought. Raises OutcomeUnknown for an entry that is no event."""
    for event in events:
        if not (isinstance(event.get("type"), str) and isinstance(event.get("livemode"), bool)):
            raise OutcomeUnknown(f"{event['id']} in the list of events is none")
    query = "select surety.events_not_received('stripe', %s, %s)"
    not_received = set(await worker.database.value(query, account, [event["id"] for event in events]))
    taken = [
        {
            "n": number,
            "provider": "stripe",
            "account": account,
            "livemode": event["livemode"],
            "event_id": event["id"],
            "type": event["type"],
            "body": without_secrets(msgspec.json.encode(event)).decode(),
        }
        for number, event in enumerate(events)
        if event["id"] in not_received
    ]
    if taken:
        await worker.database.value("select surety.store_polled_events(%s)", Jsonb(taken))
        await worker.schedule_handlers_for(["webhook.received"])


async def unknown_objects(worker: Worker, wants: list[ObjectToFetch]) -> set[str]:
    """Those of the objects about which no fact of the wanted kinds is known."""
    questions = [
        {
            "provider": "stripe",
            "account": want.source.account,
            "livemode": want.source.livemode,
            "object_id": want.unless_object,
            "kinds": want.unless_kinds,
        }
        for want in wants
    ]
    if not questions:
        return set()
    return set(await worker.database.value("select surety.objects_without_facts(%s)", Jsonb(questions)))


async def methods_not_saved(worker: Worker, sources: list[ProviderObject]) -> set[ProviderObject]:
    """The payment methods among these objects that are not saved here, of other systems or of single payments."""
    methods: dict[str, set[ProviderObject]] = defaultdict(set)
    for source in sources:
        if source.kind == "payment_method":
            methods[source.account].add(source)
    found: set[ProviderObject] = set()
    for account, asked in methods.items():
        query = "select surety.saved_methods_among(%s, %s)"
        saved = await worker.database.value(query, account, sorted(method.id for method in asked))
        found |= {method for method in asked if method.id not in saved}
    return found


def group_by_call(wanted: list[WantedObject]) -> tuple[dict[str, list[WantedObject]], Fetches]:
    """The calls that bring all objects: by account those to look for in one list, the others to be fetched, each once.

    Balance transactions are listed if an account has LISTED_MIN of them or more.
    """
    to_list: dict[str, list[WantedObject]] = defaultdict(list)
    fetches: Fetches = defaultdict(list)
    for webhook, want in wanted:
        if want.unless_kinds == MONEY_KNOWN and want.created is not None:
            to_list[want.source.account].append((webhook, want))
        else:
            fetches[want.source].append(webhook)
    for account in [account for account, wants in to_list.items() if len(wants) < LISTED_MIN]:
        for webhook, want in to_list.pop(account):
            fetches[want.source].append(webhook)
    return to_list, fetches


async def audit_ignored(worker: Worker, ignored: list[StoredWebhook]) -> None:
    """Write an audit entry for each event of the other mode than our key's."""
    ours, other = ("live", "test") if worker.stripe.livemode else ("test", "live")
    entries = [
        {
            "kind": "answer",
            "actor": worker.actor,
            "outcome": "ignored",
            "reason": f"an event of {other} mode, and our key is of {ours} mode",
            "snapshot": {
                "operation": "apply_webhooks",
                "event": webhook.provider_event_id,
                "type": webhook.type,
            },
        }
        for webhook in ignored
    ]
    if entries:
        log.warning("%s events ignored: of %s mode, and our key is of %s mode", len(entries), other, ours)
        await worker.database.value("select audit.write_entries(%s)", Jsonb(entries))


async def audit_calls(worker: Worker, to_list: dict[str, list[WantedObject]], to_fetch: Fetches) -> None:
    """Write an audit entry for each list that is going to be read, and for each object that is going to be fetched."""
    lists = [
        {"operation": LIST_OPERATION, "account": account, "because": [one.provider_event_id for one, _ in wanted]}
        for account, wanted in to_list.items()
    ]
    fetches = [
        {"operation": "fetch", "object": source.id, "because": [one.provider_event_id for one in webhooks]}
        for source, webhooks in to_fetch.items()
    ]
    entries = [
        {"kind": "call", "actor": worker.actor, "outcome": "asked", "snapshot": snapshot}
        for snapshot in [*lists, *fetches]
    ]
    if entries:
        await worker.database.value("select audit.write_entries(%s)", Jsonb(entries))


async def list_for_webhooks(worker: Worker, account: str, wanted: list[WantedObject]) -> list[CallResult]:
    """Find the balance transactions that webhooks name in a list of their account's; fetch those that it lacks.

    The list is read from its newest line until all are found, at most to the oldest of their charges, and at most as
    many pages as fetches would be necessary: an event may be about a charge of last year.
    """
    began = time.monotonic()
    since = min(want.created for _, want in wanted if want.created is not None)
    missing: dict[str, list[WantedObject]] = defaultdict(list)
    for webhook, want in wanted:
        missing[want.unless_object].append((webhook, want))
    results: list[CallResult] = []
    rows, pages_left = 0, len(missing)
    try:
        async with aclosing(worker.stripe.balance_transactions(account, datetime.fromtimestamp(since, UTC))) as pages:
            async for page in pages:
                rows += len(page.rows)
                for line in page.rows:
                    read = facts_of_row(
                        line, FactOrigin(account, worker.stripe.livemode, "poll"), listed_transaction_facts
                    )
                    results.append(read)
                    if "facts" in read:
                        results += [{"event_id": webhook.event_id} for webhook, _ in missing.pop(line["id"], [])]
                pages_left -= 1
                if not missing or not pages_left:
                    break
        listed: CallResult = {"outcome": "answered", "snapshot": {"account": account, "rows": rows}}
    except ProviderError as error:
        # What it leaves out is fetched: those calls decide what becomes of the events.
        listed = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    results.append({"operation": LIST_OPERATION, "duration_ms": duration_ms, **listed})
    fetches: Fetches = defaultdict(list)
    for webhook, want in chain.from_iterable(missing.values()):
        fetches[want.source].append(webhook)
    await audit_calls(worker, {}, fetches)
    for fetched in await asyncio.gather(*(fetch_for_webhooks(worker, *one) for one in fetches.items())):
        results += fetched
    return results


async def fetch_for_webhooks(worker: Worker, source: ProviderObject, webhooks: list[StoredWebhook]) -> list[CallResult]:
    """Fetch an object for all webhooks that refer to it; the first one's result holds its facts."""
    began = time.monotonic()
    result: CallResult = {}
    try:
        if source.livemode != worker.stripe.livemode:
            raise OutcomeUnknown(f"{source.id} is of the other mode than our key")
        origin = FactOrigin(source.account, source.livemode, webhooks[0].source, webhooks[0].provider_event_id)
        if source.kind == "dispute":
            result = fetch_result(await fetch_dispute(worker, source, origin))
        elif source.kind == "charge":
            result = await fetch_intent_of_charge(worker, source, origin)
        elif source.kind == "payment_method":
            result = await fetch_saved_method(worker, source)
        else:
            answer = await fetch_object(worker, source)
            result = fetch_result(answer) | {"facts": facts_of_object(answer.body, origin)}
    except ProviderError as error:
        result = failed_call_result(source.account, error)
        if "outage" in result:
            result["failed_call"] = (source.account, began)
    except UNREADABLE as error:
        result = {"outcome": "unknown", "error": f"{source.id} can't be read: {error_text(error)}"}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    results: list[CallResult] = [
        {name: result[name] for name in FIELDS_OF_EVENTS if name in result} | {"event_id": webhook.event_id}
        for webhook in webhooks
    ]
    results[0] |= {"operation": "fetch", "duration_ms": duration_ms, **result}
    return results


async def fetch_object(worker: Worker, source: ProviderObject) -> ProviderResponse:
    """The object, as it is now. Raises OutcomeUnknown if it is another."""
    if source.kind == "payment_intent":
        answer = await worker.stripe.fetch_intent(source.account, source.id)
    else:
        answer = await worker.stripe.fetch(source.account, f"{source.kind.replace('.', '/')}s", source.id)
    if (answer.body.get("object"), answer.body.get("id")) != (source.kind, source.id):
        raise OutcomeUnknown(f"another object was answered for {source.id}")
    return answer


async def fetch_intent_of_charge(worker: Worker, source: ProviderObject, origin: FactOrigin) -> CallResult:
    """The result of fetching a charge and its intent; without facts if another system made the charge alone."""
    charge = await fetch_object(worker, source)
    intent_id = id_of(charge.body.get("payment_intent"))
    if intent_id is None:
        return fetch_result(charge)
    intent = ProviderObject(source.account, source.livemode, "payment_intent", intent_id)
    answer = await fetch_object(worker, intent)
    return fetch_result(answer) | {"facts": facts_of_object(answer.body, origin)}


def facts_of_object(body: Json, origin: FactOrigin) -> list[Fact]:
    """The facts of a fetched intent, refund or payout; none of another system's intent that lacks a field.

    Raises ObjectUnreadable if an object that may be ours lacks a field.
    """
    try:
        return FACT_READERS[body["object"]](body, origin)
    except ObjectUnreadable:
        metadata = body.get("metadata")
        if body["object"] == "payment_intent" and isinstance(metadata, dict) and "surety_payment" not in metadata:
            return []
        raise


async def fetch_dispute(worker: Worker, source: ProviderObject, origin: FactOrigin) -> ProviderResponse:
    """Fetch a dispute and record its facts, numbered, under a lock. Raises ObjectUnreadable if it can't be read.

    A dispute's status goes back and forth, so the facts of the last fetch win. Under the lock, fetches are numbered,
    made and recorded in one order; results of calls, which are recorded in groups, would be in another.
    """
    async with worker.database.try_lock(f"dispute:{source.id}") as is_locked:
        if not is_locked:
            reason = "another worker is fetching it"
            raise ProviderBusy(reason, seconds=FETCH_PAUSE_SECONDS, cause="fetched_elsewhere")
        revision = await worker.database.value(
            "select surety.next_fetch_number('stripe', %s, %s, %s)", source.account, source.livemode, source.id
        )
        answer = await fetch_object(worker, source)
        try:
            facts = dispute_facts(answer.body, origin, revision)
        except UNREADABLE as error:
            raise ObjectUnreadable(f"{source.id} can't be read: {error_text(error)}") from error
        if facts:
            made = await worker.database.value("select surety.record_facts(%s, %s)", Jsonb(facts), worker.actor)
            await worker.schedule_handlers_for(made)
    return answer


async def fetch_saved_method(worker: Worker, source: ProviderObject) -> CallResult:
    """Fetch a saved payment method and record its state, under a lock: the last fetch wins, as for disputes.

    A method that is gone is detached.
    """
    async with worker.database.try_lock(f"payment_method:{source.id}") as is_locked:
        if not is_locked:
            reason = "another worker is fetching it"
            raise ProviderBusy(reason, seconds=FETCH_PAUSE_SECONDS, cause="fetched_elsewhere")
        found = await fetch_method(worker, source.account, source.id)
        is_detached = found is None or found.body["customer"] is None
        method = {"id": source.id} if found is None else saved_card(found.body)
        query = "select surety.record_method_state(%s, %s, %s)"
        made = await worker.database.value(query, source.account, Jsonb(method), is_detached)
        await worker.schedule_handlers_for(made)
    # Nothing else of the answer is kept: it holds personal data.
    return {"outcome": "answered", "status": 404 if found is None else found.status, "snapshot": {"id": source.id}}


def facts_of_row(line: Json, origin: FactOrigin, read: FactReader) -> CallResult:
    """The facts of one object of a list; an object that can't be read becomes a discrepancy."""
    try:
        return {"facts": read(line, origin)}
    except UNREADABLE as error:
        return unreadable_object(line["id"], error)


def fetch_result(answer: ProviderResponse) -> CallResult:
    """The result of a fetch, without facts."""
    return {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body)}
