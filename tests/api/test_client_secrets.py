"""POST /v1/payments/{id}/client_secret without a worker: who may ask, when, how often; the written rows."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from nacl.public import PrivateKey, PublicKey, SealedBox

from tests.support.http_client import Connection, Merchant, ServerProcess, problem
from tests.support.payments import fact, record

CARD = {"type": "card", "token": "pm_card_threeDSecure2Required"}
Json = dict[str, Any]


def asked_to_act(merchant: Merchant, action: Json | None = None, **fields: Any) -> str:
    """A payment whose payer must act, by script."""
    made = merchant.pay(**{"payment_method": CARD, "authentication": "script", "return_url": None} | fields)["id"]
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'submitting', 'test', now(), 'test')",
        (made,),
    )
    shown = {"next_action": action or {"type": "script"}}
    record(merchant.conn, [fact(made, "submitted", "pi"), fact(made, "action", "pi", data=shown)])
    return str(made)


def ask(merchant: Merchant, payment_id: str, **more: Any) -> httpx.Response:
    return merchant.client.post(f"/v1/payments/{payment_id}/client_secret", **more)


def request_row(merchant: Merchant, payment_id: str, key: PrivateKey) -> Json:
    """What the SQL function answers to a request by the merchant's key."""
    asked = {"key_hash": key_hash(merchant), "request_id": "req_1", "address": "", "payment_id": payment_id}
    asked["public_key"] = key.public_key.encode().hex()
    row = merchant.conn.execute(
        "select to_json(r) from api.request_client_secret(%s) as r", (json.dumps(asked),)
    ).fetchone()
    assert row is not None
    result: Json = row[0]
    return result


def key_hash(merchant: Merchant) -> str:
    [(found,)] = merchant.conn.execute(
        "select encode(hash, 'hex') from surety.api_keys where id = %s", (merchant.key_id,)
    ).fetchall()
    return str(found)


def answer_as_worker(conn: Connection, secret: str) -> None:
    """Seal a secret for the only request that waits."""
    [(id, key)] = conn.execute("select id, public_key from surety.client_secret_requests where sealed is null")
    sealed = SealedBox(PublicKey(key)).encrypt(secret.encode())
    given = json.dumps([{"secret_request_id": id, "sealed": b64encode(sealed).decode()}])
    conn.execute("select surety.answer_secret_requests(0, 0, '{}', %s)", (given,))


@pytest.fixture
def other(rights: Connection, api: ServerProcess) -> Iterator[Merchant]:
    """Another merchant."""
    made = Merchant(rights, api.url, "Other Books")
    yield made
    made.client.close()


def test_another_merchant_finds_no_payment(merchant: Merchant, other: Merchant, rights: Connection) -> None:
    payment_id = asked_to_act(merchant)
    problem(ask(other, payment_id), 404, "not-found")
    problem(ask(merchant, "pay_0"), 404, "not-found")
    problem(ask(merchant, "pay_0123456789abcdef01234567"), 404, "not-found")
    assert rights.execute("select from surety.client_secret_requests").fetchall() == []


def test_key_needs_the_scope_of_payments(merchant: Merchant) -> None:
    payment_id = asked_to_act(merchant)
    headers = {"Authorization": f"Bearer {merchant.another_key(scopes=['read', 'refunds:write'])}"}
    assert problem(ask(merchant, payment_id, headers=headers), 403, "scope-missing")["scope"] == "payments:write"


def test_body_has_no_fields(merchant: Merchant) -> None:
    payment_id = asked_to_act(merchant)
    problem(ask(merchant, payment_id, json={"key": "mine"}), 400, "invalid-request")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('update surety.payments set flags = \'{"cancel_requested_at": "now"}\' where id = %s', "cancellation"),
        ('update surety.payments set next_action = \'{"type": "other"}\' where id = %s', "otherwise"),
        (
            "update surety.payments set authentication = 'redirect', return_url = 'https://a.example' where id = %s",
            "by redirect",
        ),
    ],
)
def test_only_a_payer_who_must_act_by_script_gets_a_secret(merchant: Merchant, change: str, reason: str) -> None:
    payment_id = asked_to_act(merchant)
    merchant.conn.execute(change.encode(), (payment_id,))
    document = problem(ask(merchant, payment_id), 409, "wrong-state")
    assert (document["state"], reason in document["detail"]) == ("requires_action", True), document["detail"]


def test_new_payment_gives_no_secret(merchant: Merchant) -> None:
    made = merchant.pay(authentication="script", return_url=None)["id"]
    assert problem(ask(merchant, made), 409, "wrong-state")["state"] == "initiated"


def test_suspended_merchant_gets_no_secret(merchant: Merchant) -> None:
    payment_id = asked_to_act(merchant)
    merchant.conn.execute("select surety.suspend_merchant(%s, true, 'test')", (merchant.id,))
    problem(ask(merchant, payment_id), 403, "merchant-suspended")


def test_ten_secrets_an_hour_are_given_for_a_payment(merchant: Merchant) -> None:
    payment_id, other = asked_to_act(merchant), asked_to_act(merchant)
    for _ in range(10):
        assert request_row(merchant, payment_id, PrivateKey.generate())["problem"] is None
    answer = ask(merchant, payment_id)
    document = problem(answer, 429, "rate-limited")
    assert document["rate_limit"] == "payment"
    assert 0 < document["retry_after"] <= 3600
    assert answer.headers["retry-after"] == str(document["retry_after"])
    assert request_row(merchant, other, PrivateKey.generate())["problem"] is None


def test_only_the_key_of_the_merchant_takes_the_answer(merchant: Merchant, other: Merchant, rights: Connection) -> None:
    key = PrivateKey.generate()
    rights.execute("delete from surety.client_secret_requests")
    row = request_row(merchant, asked_to_act(merchant), key)
    answer_as_worker(rights, "pi_1_secret_2")
    # A second answer changes nothing.
    forged = json.dumps([{"secret_request_id": row["secret_request_id"], "sealed": "eA=="}])
    rights.execute("select surety.answer_secret_requests(0, 0, '{}', %s)", (forged,))
    taking = "select sealed from api.take_client_secret(decode(%s, 'hex'), %s, '')"
    assert rights.execute(taking, (key_hash(other), row["secret_request_id"])).fetchall() == []
    [(sealed,)] = rights.execute(taking, (key_hash(merchant), row["secret_request_id"])).fetchall()
    assert SealedBox(key).decrypt(sealed) == b"pi_1_secret_2"
    assert rights.execute(taking, (key_hash(merchant), row["secret_request_id"])).fetchall() == []


def test_only_the_api_asks_and_only_workers_answer(rights: Connection) -> None:
    who = rights.execute(
        "select r.rolname, p.proname from pg_roles as r cross join pg_proc as p"
        " where r.rolname like 'surety\\_%' and r.rolname <> 'surety_owner'"
        " and has_function_privilege(r.oid, p.oid, 'execute')"
        " and p.proname like '%secret%' and p.proname not like '%webhook%' order by 1, 2"
    ).fetchall()
    assert who == [
        ("surety_api", "request_client_secret"),
        ("surety_api", "take_client_secret"),
        ("surety_worker", "answer_secret_requests"),
        ("surety_worker", "delete_old_secret_requests"),
        ("surety_worker", "open_secret_requests"),
    ]
    tables = rights.execute(
        "select grantee from information_schema.role_table_grants where table_name = 'client_secret_requests'"
        " and grantee like 'surety\\_%' and grantee <> 'surety_owner'"
    ).fetchall()
    assert tables == []


def test_request_is_audited_without_a_key_and_traced(merchant: Merchant) -> None:
    payment_id = asked_to_act(merchant)
    request_row(merchant, payment_id, PrivateKey.generate())
    [(snapshot,)] = merchant.conn.execute(
        "select snapshot from audit.entries where payment_id = %s and kind = 'request' and version is null",
        (payment_id,),
    ).fetchall()
    assert snapshot == {"route": "POST /v1/payments/{id}/client_secret", "api_version": None}
    entries = merchant.get(f"/v1/payments/{payment_id}/trace")["entries"]
    summaries = [entry["summary"] for entry in entries]
    assert any(text.startswith("POST /v1/payments/{id}/client_secret, key sty_…") for text in summaries), summaries
    assert any(text.startswith("action by script") for text in summaries), summaries


def test_old_requests_are_deleted(merchant: Merchant) -> None:
    payment_id = asked_to_act(merchant)
    request_row(merchant, payment_id, PrivateKey.generate())
    merchant.conn.execute("update surety.client_secret_requests set requested_at = now() - interval '2 minutes'")
    second = request_row(merchant, payment_id, PrivateKey.generate())["secret_request_id"]
    assert merchant.conn.execute("select id from surety.client_secret_requests").fetchall() == [(second,)]


def test_table_of_requests_is_not_in_the_write_ahead_log(rights: Connection) -> None:
    row = rights.execute("select relpersistence from pg_class where relname = 'client_secret_requests'").fetchone()
    assert row in ((b"u",), ("u",))
