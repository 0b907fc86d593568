"""What a webhook says, or what is fetched because of it (MONEY.md, "Facts").

A signed snapshot is believed where it tells of something that only grows and was made for our API version. Failures,
disputes and what only announces something are fetched, unless it is known by then. Events of other types mean nothing
to us and end here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct
from psycopg.types.json import Jsonb

from db.redaction import without_secrets
from jobs.breaker import outage_key
from jobs.handlers.calls import Result, record, record_as_they_come, without_subject
from jobs.stripe.client import API_VERSION, Answer, Busy, Outage, ProviderError, Unknown
from jobs.stripe.facts import (
    Fact,
    Json,
    Origin,
    dispute_facts,
    id_of,
    intent_facts,
    payout_facts,
    redacted,
    refund_facts,
)
from jobs.worker import Batch, Worker

DISPUTE_PAUSE_SECONDS = 1.0

Read = Callable[[Json, Origin], list[Fact]]

BELIEVED: dict[str, Read] = {
    "payment_intent.created": intent_facts,
    "payment_intent.requires_action": intent_facts,
    "payment_intent.processing": intent_facts,
    "payment_intent.amount_capturable_updated": intent_facts,
    "payment_intent.succeeded": intent_facts,
    "payment_intent.canceled": intent_facts,
    "refund.created": refund_facts,
    "refund.updated": refund_facts,
    "payout.created": payout_facts,
    "payout.updated": payout_facts,
    "payout.paid": payout_facts,
    "payout.failed": payout_facts,
    "payout.canceled": payout_facts,
}

# What announces something about an intent, and the facts by any of which it is known already.
ANNOUNCING: dict[str, tuple[str, ...]] = {
    "payment_intent.payment_failed": ("attempt_failed", "failed", "canceled"),
    "charge.failed": ("attempt_failed", "failed", "canceled"),
    "charge.expired": ("failed", "canceled"),
    "charge.pending": ("processing",),
    "charge.succeeded": ("authorized", "captured"),
    "charge.captured": ("captured",),
    "charge.updated": ("money",),
}
ABOUT_THE_CHARGE = frozenset({"charge.succeeded", "charge.captured"})

FETCHED = frozenset(
    {
        "refund.failed",
        "charge.dispute.created",
        "charge.dispute.updated",
        "charge.dispute.closed",
        "charge.dispute.funds_withdrawn",
        "charge.dispute.funds_reinstated",
    }
)

# What nothing else would tell, should its webhook be lost: what happens to a payment that has ended here, what was done
# in the dashboard, what the network does.
LISTED = FETCHED | {
    "payment_intent.created",
    "payment_intent.succeeded",
    "payment_intent.canceled",
    "charge.expired",
    "refund.created",
    "refund.updated",
}

READS: dict[str, Read] = {"payment_intent": intent_facts, "refund": refund_facts, "payout": payout_facts}


class Webhook(Struct):
    """A row of surety.read_inbox."""

    event_id: str
    inbox_id: str
    source: str
    account: str
    livemode: bool
    type: str
    body: str


class Envelope(Struct):
    """What every event of Stripe's says of itself."""

    api_version: str | None
    data: dict[str, Json]


class Source(Struct, frozen=True):
    """An object at Stripe; `kind` as it calls itself, `payment_intent`."""

    account: str
    livemode: bool
    kind: str
    id: str


class Wanted(Struct):
    """What must be fetched because of a webhook, unless one of these facts is known by then."""

    source: Source
    unless_object: str = ""
    unless_kinds: tuple[str, ...] = ()


async def apply(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """webhook.received: the provider's news, as facts. What is believed makes one group; what is fetched follows."""
    webhooks = await worker.database.rows(
        Webhook,
        "select event_id, inbox_id, source, account, livemode, type, body from surety.read_inbox(%s, %s)"
        " where event_id = any(%s)",
        batch.batch_id, batch.fence, event_ids,
    )  # fmt: skip
    results = await without_subject(worker, batch, event_ids, {webhook.event_id for webhook in webhooks})
    wanted: list[tuple[Webhook, Wanted]] = []
    for webhook in webhooks:
        try:
            meant = understand(webhook)
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {webhook.type} as Stripe sends it: {type(error).__name__} {error}"
            results.append({"event_id": webhook.event_id, "error": reason})
            continue
        if isinstance(meant, Wanted):
            wanted.append((webhook, meant))
        else:
            results.append({"event_id": webhook.event_id, "facts": meant})
    to_fetch = await without_known(worker, wanted)
    asking = [webhook for webhooks in to_fetch.values() for webhook in webhooks]
    results += [{"event_id": webhook.event_id} for webhook, _ in wanted if webhook not in asking]
    for source in [source for source in to_fetch if source.account in worker.breaker.blocked]:
        held = {"error": "not asked: the provider is out", "outage": outage_key(source.account)}
        results += [held | {"event_id": webhook.event_id} for webhook in to_fetch.pop(source)]
    if results:
        await record(worker, batch, results)
    await announce(worker, to_fetch)
    await record_as_they_come(worker, batch, [partial(fetch, worker, *one) for one in to_fetch.items()])


def understand(webhook: Webhook) -> list[Fact] | Wanted:
    """What a webhook says, or what must be fetched for it; no facts if it means nothing to us.

    Raises what reading the body raises if it isn't as Stripe sends it.
    """
    envelope = msgspec.json.decode(webhook.body, type=Envelope)
    told = envelope.data["object"]
    if webhook.type in BELIEVED and envelope.api_version == API_VERSION:
        origin = Origin(webhook.account, webhook.livemode, webhook.source, webhook.inbox_id)
        return BELIEVED[webhook.type](told, origin)
    if webhook.type in BELIEVED or webhook.type in FETCHED:
        return Wanted(Source(webhook.account, webhook.livemode, told["object"], told["id"]))
    if webhook.type in ANNOUNCING:
        return announced(webhook, told)
    return []


def announced(webhook: Webhook, told: Json) -> list[Fact] | Wanted:
    """The intent that an event is about; nothing for a charge that has none, as another system's may."""
    intent = told["id"] if told["object"] == "payment_intent" else id_of(told["payment_intent"])
    about = intent
    if webhook.type in ABOUT_THE_CHARGE:
        about = told["id"]
    elif webhook.type == "charge.updated":
        about = id_of(told["balance_transaction"])
    if intent is None or about is None:
        return []
    source = Source(webhook.account, webhook.livemode, "payment_intent", intent)
    return Wanted(source, about, ANNOUNCING[webhook.type])


async def take_listed(worker: Worker, account: str, events: list[Json]) -> None:
    """Take events of the provider's list that no webhook has brought, as if it had. Raises Unknown if one is none."""
    for event in events:
        if not (isinstance(event.get("type"), str) and isinstance(event.get("livemode"), bool)):
            raise Unknown(f"{event['id']} in the list of events is none")
    query = "select surety.unheard_events('stripe', %s, %s)"
    unheard = set(await worker.database.value(query, account, [event["id"] for event in events]))
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
        if event["id"] in unheard
    ]
    if taken:
        await worker.database.value("select surety.receive_listed(%s)", Jsonb(taken))
        await worker.wake(["webhook.received"])


async def without_known(worker: Worker, wanted: list[tuple[Webhook, Wanted]]) -> dict[Source, list[Webhook]]:
    """What has still to be fetched, each object once, with the webhooks that ask for it."""
    questions = [
        {
            "provider": "stripe",
            "account": want.source.account,
            "livemode": want.source.livemode,
            "object_id": want.unless_object,
            "kinds": want.unless_kinds,
        }
        for _, want in wanted
    ]
    if not questions:
        return {}
    unknown = set(await worker.database.value("select surety.unknown_facts(%s)", Jsonb(questions)))
    groups: dict[Source, list[Webhook]] = defaultdict(list)
    for webhook, want in wanted:
        if want.unless_object in unknown:
            groups[want.source].append(webhook)
    return groups


async def announce(worker: Worker, to_fetch: dict[Source, list[Webhook]]) -> None:
    """Tell the audit trail what is going to be asked."""
    entries = [
        {
            "kind": "call",
            "actor": worker.actor,
            "outcome": "asked",
            "snapshot": {"operation": "fetch", "object": source.id, "because": [one.inbox_id for one in webhooks]},
        }
        for source, webhooks in to_fetch.items()
    ]
    if entries:
        await worker.database.value("select audit.record(%s)", Jsonb(entries))


async def fetch(worker: Worker, source: Source, webhooks: list[Webhook]) -> list[Result]:
    """What an object says now, for all webhooks that asked for it; the first of them carries it."""
    began = time.monotonic()
    told: Result = {}
    try:
        if source.livemode != worker.stripe.livemode:
            raise Unknown(f"{source.id} is of the other mode than our key")
        origin = Origin(source.account, source.livemode, webhooks[0].source, webhooks[0].inbox_id)
        if source.kind == "dispute":
            told = await fetch_dispute(worker, source, origin)
        else:
            answer = await fetch_one(worker, source)
            told = fetched(answer) | {"facts": READS[source.kind](answer.body, origin)}
    except ProviderError as error:
        told = {"outcome": error.outcome, "status": error.status, "error": str(error)}
        if isinstance(error, Busy):
            told["release_seconds"] = error.seconds
        elif isinstance(error, Outage):
            told |= {"outage": outage_key(source.account), "began": began}
    except (KeyError, TypeError, AttributeError) as error:
        told = {"outcome": "unknown", "error": f"{source.id} as it was never seen: {type(error).__name__} {error}"}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    results: list[Result] = [
        {name: told[name] for name in ("error", "release_seconds", "outage") if name in told}
        | {"event_id": webhook.event_id}
        for webhook in webhooks
    ]
    results[0] |= {"operation": "fetch", "duration_ms": duration_ms, **told}
    return results


async def fetch_one(worker: Worker, source: Source) -> Answer:
    """The object, as it is now. Raises Unknown if it is another."""
    if source.kind == "payment_intent":
        answer = await worker.stripe.fetch_intent(source.account, source.id)
    else:
        answer = await worker.stripe.fetch(source.account, f"{source.kind}s", source.id)
    if (answer.body.get("object"), answer.body.get("id")) != (source.kind, source.id):
        raise Unknown(f"another object was answered for {source.id}")
    return answer


async def fetch_dispute(worker: Worker, source: Source, origin: Origin) -> Result:
    """A dispute is fetched by one at a time, and numbered: it goes back and forth, and the last fetch wins."""
    async with worker.database.alone(f"dispute:{source.id}") as is_alone:
        if not is_alone:
            raise Busy("somebody else is fetching it", seconds=DISPUTE_PAUSE_SECONDS)
        revision = await worker.database.value(
            "select surety.next_fetch('stripe', %s, %s, %s)", source.account, source.livemode, source.id
        )
        answer = await fetch_one(worker, source)
        facts = dispute_facts(answer.body, origin, revision)
        if facts:
            made = await worker.database.value("select surety.record_facts(%s, %s)", Jsonb(facts), worker.actor)
            await worker.wake(made)
    return fetched(answer)


def fetched(answer: Answer) -> Result:
    """What the audit trail keeps of an answer."""
    return {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body)}
