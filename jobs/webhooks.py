"""What a webhook says, or what must be fetched because of it (MONEY.md, "Facts").

A signed snapshot is believed where it tells of something that only grows, and was made for our API version, account and
mode. Failures, disputes and balance transactions are fetched; so is whatever a snapshot can't be believed about. Kinds of
events that mean nothing to us end here.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from psycopg.types.json import Jsonb

from jobs.calls import Result, record
from jobs.stripe_facts import Fact, Json, Origin, intent_facts, payout_facts, refund_facts
from jobs.worker import Batch, Worker


class Webhook(Struct):
    """A row of surety.read_inbox."""

    event_id: str
    inbox_id: str
    account: str
    livemode: bool
    type: str
    body: str


async def apply(worker: Worker, batch: Batch, event_ids: list[str]) -> None:
    """webhook.received: the provider's news, as facts."""
    rows = await worker.database.rows(
        Webhook,
        "select event_id, inbox_id, account, livemode, type, body from surety.read_inbox(%s, %s)"
        " where event_id = any(%s)",
        batch.batch_id, batch.fence, event_ids,
    )  # fmt: skip
    results: list[Result] = []
    for row in rows:
        try:
            event = msgspec.json.decode(row.body)
            told = event["data"]["object"]
            origin = Origin(row.account, row.livemode, "webhook", row.inbox_id)
            facts = []
            if row.type.startswith("payment_intent."):
                facts = intent_facts(told, origin)
            results.append({"event_id": row.event_id, "facts": facts})
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            results.append({"event_id": row.event_id, "error": f"{type(error).__name__}: {error}"})
    if results:
        await record(worker, batch, results)
