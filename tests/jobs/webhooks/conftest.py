"""A merchant with webhook endpoints, a receiver, and a sender that the test runs."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from db.settings import load_settings
from db.webhook_secrets import NewSecrets, WebhookKeys, make_secrets
from jobs.webhooks.sender import EndpointSender
from jobs.worker import Worker
from tests.conftest import Connection
from tests.support.payments import add_merchant, pay, violations
from tests.support.webhook_receiver import WebhookReceiver, running_receiver
from tests.support.workers import in_process_worker

KEY = b64encode(bytes(range(32))).decode()
SETTINGS = {"SURETY_WEBHOOK_KEY": KEY, "SURETY_WEBHOOK_NETWORKS": "127.0.0.0/8,::1"}


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with running_receiver() as receiver:
        yield receiver


class Shop:
    """A merchant of the test's own."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.id, self.key_hash = add_merchant(conn)
        keys = WebhookKeys.from_settings(load_settings(SETTINGS))
        assert keys is not None
        self.keys = keys
        conn.execute("select outbox.publish_sealing_key(%s, %s)", (keys.id, keys.public_key))
        self._commands = 0

    def command(self, function: str, **fields: Any) -> dict[str, Any]:
        """The answer to a command of the API, as its SQL function gives it."""
        self._commands += 1
        given = {
            "key_hash": self.key_hash.hex(), "request_id": "req_1", "address": "127.0.0.1",
            "api_version": "2026-11-30", "idempotency_key": f"{self.id}-{self._commands}", "request_hash": "00",
        }  # fmt: skip
        row = self.conn.execute(
            f"select problem, detail, body from api.{function}(%s)".encode(), (json.dumps(given | fields),)
        ).fetchone()
        assert row is not None and row[0] is None, row
        answer: dict[str, Any] = msgspec.json.decode(row[2])
        return answer

    def endpoint(self, url: str, **fields: Any) -> tuple[str, NewSecrets]:
        """A new endpoint's id, and its secrets."""
        secrets = make_secrets(self.keys.id, self.keys.public_key)
        given = {"url": url, "event_types": ["*"], "payload": "full", "concurrency": 4}
        sealed = msgspec.to_builtins(secrets.sealed)
        return self.command("create_webhook_endpoint", **(given | fields), secrets=sealed)["id"], secrets

    def show(self, endpoint_id: str) -> dict[str, Any]:
        """The endpoint."""
        row = self.conn.execute(
            "select s.document from outbox.webhook_endpoints as w, api.show_webhook_endpoint(w) as s where w.id = %s",
            (endpoint_id,),
        ).fetchone()
        assert row is not None
        shown: dict[str, Any] = row[0]
        return shown

    def pay(self, count: int = 1) -> list[str]:
        """New payments, each with an event; the events' ids."""
        ids = pay(self.conn, self.key_hash, count)
        rows = self.conn.execute("select id from outbox.events where aggregate_id = any(%s) order by id", (ids,))
        return [row[0] for row in rows]

    def attempts(self, endpoint_id: str) -> list[tuple[Any, ...]]:
        """Outcome and status of each attempt in the log."""
        query = "select outcome, status from outbox.delivery_attempts where endpoint_id = %s order by id"
        return self.conn.execute(query, (endpoint_id,)).fetchall()

    def make_retries_due(self) -> None:
        """Deliveries that wait are due now, and endpoints that are slowed down may be sent to."""
        self.conn.execute("update outbox.delivery_retries set due_at = now() where due_at is not null")
        self.conn.execute("update outbox.webhook_endpoints set not_before = now() where not_before is not null")


@pytest.fixture
def shop(conn: Connection) -> Iterator[Shop]:
    shop = Shop(conn)
    yield shop
    assert violations(conn) == {}


SendDue = Callable[[], Any]


@asynccontextmanager
async def sending(database: str, name: str = "w1", **settings: str) -> AsyncGenerator[tuple[EndpointSender, SendDue]]:
    """A sender, and a function that sends due deliveries until none is left."""
    given: dict[str, Any] = SETTINGS | settings
    async with in_process_worker(database, "http://127.0.0.1:9", judged=False, **given) as worker:
        worker.name = name
        sender = new_sender(worker)

        async def send_due() -> None:
            for _ in range(1000):
                if await sender._take_turn() >= 1 and not sender._tasks:
                    return
                if sender._tasks:
                    await asyncio.wait(sender._tasks)
                else:
                    await asyncio.sleep(0.02)  # another worker holds the batches
            raise AssertionError("the sender finds no end")

        yield sender, send_due
        if sender._tasks:
            await asyncio.wait(sender._tasks)


def new_sender(worker: Worker) -> EndpointSender:
    """A sender of this worker's."""
    keys = WebhookKeys.from_settings(worker.settings)
    assert keys is not None
    return EndpointSender(worker, keys)


def public_key_of(text: str) -> bytes:
    """The bytes of whpk_…."""
    return b64decode(text.removeprefix("whpk_"))
