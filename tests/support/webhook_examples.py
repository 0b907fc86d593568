"""The examples of the routes of webhook endpoints, a part of api_examples.py."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING

from db.settings import load_settings
from db.webhook_secrets import WebhookKeys
from tests.support.payments import Connection

if TYPE_CHECKING:
    from tests.support.api_examples import ExampleClient


def record_webhook_endpoints(client: ExampleClient, conn: Connection) -> None:
    """The routes of webhook endpoints."""
    keys = WebhookKeys.from_settings(load_settings({"SURETY_WEBHOOK_KEY": b64encode(b"k" * 32).decode()}))
    assert keys is not None
    conn.execute("select outbox.publish_sealing_key(%s, %s)", (keys.id, keys.public_key))
    wanted = {"url": "https://shop.example/webhooks", "event_types": ["payment.*", "dispute.needs_response"]}
    path = f"/v1/webhook_endpoints/{client.post('/v1/webhook_endpoints', wanted)['id']}"
    client.get("/v1/webhook_endpoints")
    client.get(path)
    client.post(path, {"event_types": ["*"], "rate_max": 20})
    client.post(f"{path}/disable")
    client.post(f"{path}/enable", {"from": "hours", "hours": 6})
    client.post(f"{path}/rotate_secret", {"overlap_hours": 24})
    client.post(f"{path}/replay", {"from": "2026-11-30T08:00:00Z"})
    client.get(f"{path}/deliveries", outcome="failed")
    # Which events are skipped depends on the time for an endpoint that gets them.
    quiet = {"url": "https://shop.example/disputes", "event_types": ["dispute.needs_response"]}
    unused = client.post("/v1/webhook_endpoints", quiet, is_example=False)["id"]
    client.delete(f"/v1/webhook_endpoints/{unused}")
