"""Webhook endpoints in the API: what it accepts, shows and keeps secret."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import Any

import httpx
import pytest

from db.settings import load_settings
from db.webhook_secrets import SealedSecret, Signer, WebhookKeys
from tests.support.http_client import Connection, Json, Merchant, ServerProcess, unique_name

PATH = "/v1/webhook_endpoints"
KEY = b64encode(b"k" * 32).decode()


@pytest.fixture
def keys(rights: Connection) -> WebhookKeys:
    keys = WebhookKeys.from_settings(load_settings({"SURETY_WEBHOOK_KEY": KEY}))
    assert keys is not None
    rights.execute("select outbox.publish_sealing_key(%s, %s)", (keys.id, keys.public_key))
    return keys


def send(merchant: Merchant, path: str, body: Json | None = None, key: str | None = None) -> httpx.Response:
    return merchant.client.post(path, json=body or {}, headers={"Idempotency-Key": key or unique_name("key")})


def created(merchant: Merchant, **fields: Any) -> Json:
    answer = send(merchant, PATH, {"url": "https://shop.example/hooks?token=geheim", "event_types": ["*"]} | fields)
    assert answer.status_code == 201, answer.text
    document: Json = answer.json()
    return document


def test_without_a_published_key_no_endpoint_can_be_made(merchant: Merchant) -> None:
    answer = send(merchant, PATH, {"url": "https://shop.example/hooks", "event_types": ["*"]})
    assert answer.status_code == 503
    assert "SURETY_WEBHOOK_KEY" in answer.json()["detail"]


def test_secret_is_shown_once_and_only_the_workers_key_opens_it(
    merchant: Merchant, rights: Connection, keys: WebhookKeys
) -> None:
    name = unique_name("key")
    body = {"url": "https://shop.example/hooks", "event_types": ["refund.*", "payment.settled"]}
    first, second = send(merchant, PATH, body, name), send(merchant, PATH, body, name)
    assert (first.status_code, second.status_code) == (201, 201)
    document = first.json()
    secret = document.pop("secret")
    assert first.headers["location"] == f"{PATH}/{document['id']}" and first.headers["cache-control"] == "no-store"
    assert second.headers["idempotency-replayed"] == "true" and second.json() == document
    assert merchant.get(f"{PATH}/{document['id']}") == document
    assert merchant.get(PATH)["data"] == [document]
    sealed = rights.execute(
        "select scheme, sealing_key, encode(sealed, 'base64'), public_key from outbox.webhook_secrets"
        " where endpoint_id = %s order by scheme",
        (document["id"],),
    ).fetchall()
    secrets = [SealedSecret(*row) for row in sealed]
    assert [each.public_key for each in secrets] == [None, document["public_keys"][0]]
    assert keys.open(secrets[0]) == b64decode(secret.removeprefix("whsec_"))
    other = WebhookKeys.from_settings(load_settings({"SURETY_WEBHOOK_KEY": b64encode(b"x" * 32).decode()}))
    assert other is not None and not Signer(other, secrets).is_usable


def test_rotation_keeps_the_old_secret_for_the_overlap(
    merchant: Merchant, rights: Connection, keys: WebhookKeys
) -> None:
    id = created(merchant)["id"]
    answer = send(merchant, f"{PATH}/{id}/rotate_secret", {"overlap_hours": 2})
    assert answer.status_code == 200 and answer.json()["secret"].startswith("whsec_")
    assert len(answer.json()["public_keys"]) == 2
    query = (
        "select scheme, expires_at between now() + '1 hour' and now() + '2 hours' from outbox.webhook_secrets"
        " where endpoint_id = %s order by id, scheme"
    )
    assert sorted(rights.execute(query, (id,)).fetchall(), key=str) == [
        ("v1", None), ("v1", True), ("v1a", None), ("v1a", True),
    ]  # fmt: skip
    send(merchant, f"{PATH}/{id}/rotate_secret", {"overlap_hours": 0})
    assert sorted(rights.execute(query, (id,)).fetchall()) == [("v1", None), ("v1a", None)]


def test_neither_secret_nor_address_is_audited(merchant: Merchant, rights: Connection, keys: WebhookKeys) -> None:
    document = created(merchant)
    send(merchant, f"{PATH}/{document['id']}/disable")
    send(merchant, f"{PATH}/{document['id']}/enable", {"from": "now"})
    rows = rights.execute("select row_to_json(e)::text from audit.entries as e where merchant_id = %s", (merchant.id,))
    entries = [row[0] for row in rows]
    assert sum(document["id"] in entry for entry in entries) >= 5
    assert not any("geheim" in entry or document["secret"] in entry for entry in entries)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"event_types": ["*"]}, "/url"),
        ({"url": "https://shop.example/"}, "/event_types"),
        ({"url": "ftp://shop.example/", "event_types": ["*"]}, "/url"),
        ({"url": "https://user@shop.example/", "event_types": ["*"]}, "/url"),
        ({"url": "https://shop.example/#x", "event_types": ["*"]}, "/url"),
        ({"url": "https://shop.example/a b", "event_types": ["*"]}, "/url"),
        ({"url": "https://shop.example/", "event_types": []}, "/event_types"),
        ({"url": "https://shop.example/", "event_types": ["payment.exploded"]}, "/event_types/0"),
        ({"url": "https://shop.example/", "event_types": ["*"], "payload": "fat"}, "/payload"),
        ({"url": "https://shop.example/", "event_types": ["*"], "concurrency": 17}, "/concurrency"),
    ],
)
def test_wrong_field_is_named(merchant: Merchant, keys: WebhookKeys, body: Json, field: str) -> None:
    answer = send(merchant, PATH, body)
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_life_of_an_endpoint(merchant: Merchant, keys: WebhookKeys) -> None:
    id = created(merchant, event_types=["*", "*"])["id"]
    answer = send(merchant, f"{PATH}/{id}", {"event_types": ["dispute.*"], "rate_max": 5, "description": "ours"})
    shown = answer.json()
    assert (shown["event_types"], shown["rate_max"], shown["description"]) == (["dispute.*"], 5, "ours")
    assert send(merchant, f"{PATH}/{id}/disable").json()["disabled_because"] == "merchant"
    wrong = send(merchant, f"{PATH}/{id}/enable", {"from": "hours"})
    assert [error["field"] for error in wrong.json()["errors"]] == ["/hours"]
    assert send(merchant, f"{PATH}/{id}/enable", {"from": "hours", "hours": 3}).json()["status"] == "enabled"
    wrong = send(merchant, f"{PATH}/{id}/replay")
    assert [error["field"] for error in wrong.json()["errors"]] == ["/events"]
    counted = send(merchant, f"{PATH}/{id}/replay", {"from": "2026-01-01T00:00:00Z"}).json()
    assert (counted["events"], counted["is_sent"]) == (0, False)
    assert merchant.get(f"{PATH}/{id}/deliveries")["data"] == []
    gone = merchant.client.request("DELETE", f"{PATH}/{id}", headers={"Idempotency-Key": unique_name("key")})
    assert gone.json()["status"] == "deleted"
    assert merchant.client.get(f"{PATH}/{id}").status_code == 404
    assert send(merchant, f"{PATH}/{id}").status_code == 404
    assert merchant.get(PATH)["data"] == []


def test_merchant_has_at_most_sixteen_endpoints(merchant: Merchant, keys: WebhookKeys) -> None:
    for _ in range(16):
        created(merchant)
    answer = send(merchant, PATH, {"url": "https://shop.example/", "event_types": ["*"]})
    assert "at most 16 webhook endpoints" in json.dumps(answer.json()["errors"])


def test_endpoint_of_another_merchant_is_not_found(
    merchant: Merchant, rights: Connection, api: ServerProcess, keys: WebhookKeys
) -> None:
    id = created(merchant)["id"]
    other = Merchant(rights, api.url)
    assert other.client.get(f"{PATH}/{id}").status_code == 404
    assert other.client.get(f"{PATH}/{id}/deliveries").status_code == 404
    assert send(other, f"{PATH}/{id}/disable").status_code == 404
    other.client.close()
