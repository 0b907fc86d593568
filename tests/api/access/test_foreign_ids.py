"""No route lets a merchant learn of another's objects: each route of the table, with ids of every kind.

A foreign id gets the answer of an id that does not exist, byte for byte but for the request's own id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from app.api.operator_routes import OPERATOR_ROUTES
from app.api.routes import MERCHANT_ROUTES, ROUTES
from app.web.routing import PATH_PARAMETER, Route
from tests.api.access.test_keys import BODIES
from tests.api.test_customers import new_customer, save_method
from tests.support.http_client import Connection, Merchant, ServerProcess, payment, unique_name
from tests.support.payments import fact, record

OWN_HEADERS = frozenset({"date", "ratelimit", "request-id"})
NOT_IDS = frozenset(
    {"expand", "type", "state", "status", "created_from", "created_before", "limit", "month", "outcome"}
)
OBJECT_TABLES = {
    "refunded payment": "select payment_id from surety.refunds where merchant_id = %s",
    "disputed payment": "select payment_id from surety.disputes where merchant_id = %s",
    "customer": "select id from surety.customers where merchant_id = %s",
    "saved payment method": "select id from surety.payment_methods where merchant_id = %s",
    "refund": "select id from surety.refunds where merchant_id = %s",
    "dispute": "select id from surety.disputes where merchant_id = %s",
    "event": "select id from outbox.events where merchant_id = %s",
    "balance transaction": "select id from ledger.postings where merchant_id = %s",
    "API key": "select id from surety.api_keys where merchant_id = %s",
    "merchant": "select id from surety.merchants where id = %s",
    "webhook endpoint": "select id from outbox.webhook_endpoints where merchant_id = %s",
    "audit entry": "select id from audit.entries where merchant_id = %s",
    "provider's object": "select provider_id from surety.payments where merchant_id = %s",
    "reference": "select reference from surety.payments where merchant_id = %s",
}


@pytest.fixture(scope="module")
def victim(rights: Connection, api: ServerProcess) -> Iterator[dict[str, str]]:
    """The ids of another merchant's objects, by kind."""
    other = Merchant(rights, api.url, "Harbour Books")
    paid = other.pay(reference="order-of-harbour-books")["id"]
    record(
        rights,
        [
            fact(paid, "submitted", "pi_foreign"),
            fact(paid, "captured", "ch_foreign", 4999),
            fact(paid, "dispute_opened", "du_foreign", 3999, revision=1, data={"status": "needs_response"}),
        ],
    )
    refunded = other.pay()["id"]
    record(rights, [fact(refunded, "submitted", "pi_other"), fact(refunded, "captured", "ch_other", 4999)])
    headers = {"Idempotency-Key": unique_name("key")}
    refund = other.client.post(f"/v1/payments/{refunded}/refunds", json={"amount": 500}, headers=headers)
    assert refund.status_code == 201, refund.text
    save_method(rights, other, new_customer(other)["id"])
    rights.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))
    endpoint = {"url": "https://shop.example/", "event_types": ["*"]}
    headers = {"Idempotency-Key": unique_name("key")}
    assert other.client.post("/v1/webhook_endpoints", json=endpoint, headers=headers).status_code == 201
    ids = {}
    for kind, query in OBJECT_TABLES.items():
        found = [value for (value,) in rights.execute(query.encode(), (other.id,)) if value]
        assert found, kind
        ids[kind] = found[0]
    yield ids
    other.client.close()


def unknown(known: str) -> str:
    """An id that does not exist and differs in its last character: a cursor at the same place."""
    return known[:-1] + ("0" if known[-1] != "0" else "1")


def answer_to(client: httpx.Client, row: Route, path: str, query: dict[str, str], key: str) -> tuple[int, object, str]:
    """Status, headers and body of an answer, without what differs from request to request."""
    if row.method == "GET":
        answer = client.get(path, params=query)
    elif row.method == "DELETE":
        answer = client.delete(path, headers={"Idempotency-Key": key})
    else:
        body = BODIES.get(row.path, {"reason": "why"} if "/operator/" in row.path else {})
        answer = client.post(path, json=body, headers={"Idempotency-Key": key})
    headers = {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS}
    # A cursor of events holds a snapshot, which goes on with every transaction.
    text = re.sub(r'"next":"[^"]*"', '"next":""', answer.text)
    return answer.status_code, headers, re.sub(r"req_[0-9a-f]+", "req_", text)


def test_every_route_with_an_id_is_tried() -> None:
    """A route of a new kind must be thought of here."""
    tried = {name for row in ROUTES for name in PATH_PARAMETER.findall(row.path)}
    assert tried == {
        "payment_id",
        "refund_id",
        "dispute_id",
        "event_id",
        "letter_id",
        "discrepancy_id",
        "name",
        "customer_id",
        "payment_method_id",
        "webhook_endpoint_id",
    }
    cursors = {
        field.name
        for row in MERCHANT_ROUTES
        if row.query
        for field in msgspec.structs.fields(row.query)
        if field.name not in NOT_IDS
    }
    assert cursors == {
        "reference",
        "customer_email",
        "email",
        "customer_id",
        "metadata",
        "metadata_is",
        "payment",
        "object",
        "event",
        "starting_after",
    }


@pytest.mark.parametrize("kind", OBJECT_TABLES)
def test_foreign_id_in_a_path_is_answered_as_an_unknown_one(
    merchant: Merchant, victim: dict[str, str], kind: str
) -> None:
    known = victim[kind]
    for row in [*MERCHANT_ROUTES, *OPERATOR_ROUTES]:
        if not PATH_PARAMETER.search(row.path):
            continue
        answers = []
        for each in (known, unknown(known)):
            path = PATH_PARAMETER.sub(each, row.path)
            answers.append(answer_to(merchant.client, row, path, {}, unique_name("key")))
        (status, headers, text), other = answers
        assert (status, headers) == other[:2], row.name
        assert text.replace(known, "ID") == other[2].replace(unknown(known), "ID"), row.name
        assert status == (403 if row in OPERATOR_ROUTES else 404), row.name


@pytest.mark.parametrize("kind", OBJECT_TABLES)
def test_foreign_id_in_a_query_is_answered_as_an_unknown_one(
    merchant: Merchant, victim: dict[str, str], kind: str
) -> None:
    own = merchant.pay()["id"]
    known = victim[kind]
    for row in MERCHANT_ROUTES:
        for field in msgspec.structs.fields(row.query) if row.query else ():
            if field.name in NOT_IDS:
                continue
            answers = []
            for each in (known, unknown(known)):
                query = {field.name: each}
                answers.append(answer_to(merchant.client, row, row.path, query, ""))
            (status, headers, text), other = answers
            assert status == other[0], (row.name, field.name)
            assert text.replace(known, "ID") == other[2].replace(unknown(known), "ID"), (row.name, field.name)
            shown = set(re.findall(r"\b(?:pay|ref|dp|evt|pst|key|mer|cus|spm)_[0-9a-f]{24}\b", text)) - {known, own}
            assert not shown & set(victim.values()), (row.name, field.name)
            assert headers == other[1]


def test_foreign_idempotency_key_and_cursor_of_events_are_a_merchants_own(
    merchant: Merchant, rights: Connection, api: ServerProcess, victim: dict[str, str]
) -> None:
    other = Merchant(rights, api.url, "Corner Books")
    key = unique_name("key")
    foreign = other.post(key=key).json()
    mine = merchant.post(key=key)
    assert mine.status_code == 201 and "idempotency-replayed" not in mine.headers
    assert mine.json()["id"] != foreign["id"]
    # Another merchant's cursor leads to one's own events.
    cursor = other.get("/v1/events")["next"]
    second = merchant.pay()["id"]
    events = merchant.get("/v1/events", starting_after=cursor)["data"]
    assert [event["data"]["id"] for event in events] == [second]
    assert merchant.post(payment(reference=victim["reference"])).status_code == 201
    other.client.close()
