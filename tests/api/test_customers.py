"""Customers, and payments that name one: what the API accepts, stores and shows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest

from app.api.schemas.events import PaymentMethodEvent
from tests.support.http_client import Connection, Json, Merchant, payment, unique_name

ADA: Json = {
    "email": "Ada@shop.example",
    "name": "Ada Lovelace",
    "phone": "+1 555 0100",
    "description": "met at the fair",
    "shipping": {"name": "Ada", "address": {"line1": "1 Main Street", "city": "Springfield", "country": "US"}},
    "metadata": {"tier": "gold"},
}
MANDATE: Json = {"accepted_at": "2025-11-22T14:03:07Z", "ip_address": "203.0.113.7", "user_agent": "Firefox/150"}


def send(merchant: Merchant, path: str, body: Json, key: str | None = None) -> httpx.Response:
    return merchant.client.post(path, json=body, headers={"Idempotency-Key": key or unique_name("key")})


def new_customer(merchant: Merchant, **fields: Any) -> Json:
    answer = send(merchant, "/v1/customers", fields)
    assert answer.status_code == 201, answer.text
    document: Json = answer.json()
    return document


def save_method(conn: Connection, merchant: Merchant, customer_id: str, **columns: Any) -> str:
    """A saved card of a customer, as a worker saves it."""
    values = {"exp_month": 11, "exp_year": 2030, "detached_at": None} | columns
    row = conn.execute(
        "insert into surety.payment_methods (id, customer_id, merchant_id, type, brand, last4, exp_month, exp_year,"
        " provider_id, usage, mandate, payment_id, created_at, detached_at)"
        " select i.id, %s, %s, 'card', 'visa', '4242', %s, %s, 'pm_of_' || i.id, 'off_session', %s, 'pay_0',"
        " now(), %s"
        " from surety.new_id('spm', surety.time_now()) as i (id) returning id",
        (
            *(customer_id, merchant.id, values["exp_month"], values["exp_year"], json.dumps(MANDATE)),
            values["detached_at"],
        ),
    ).fetchone()
    assert row is not None
    return str(row[0])


def errors_of(answer: httpx.Response) -> list[tuple[str, str]]:
    assert answer.status_code == 400, answer.text
    return [(error["field"], error["rule"]) for error in answer.json()["errors"]]


def test_new_customer_is_shown_as_it_was_given(merchant: Merchant) -> None:
    answer = send(merchant, "/v1/customers", ADA)
    assert answer.status_code == 201
    document = answer.json()
    assert {name: document[name] for name in ADA} == ADA
    assert (document["object"], document["version"], document["provider"]) == ("customer", 1, None)
    assert answer.headers["location"] == f"/v1/customers/{document['id']}"
    assert merchant.get(f"/v1/customers/{document['id']}") == document


def test_repeated_request_creates_one_customer(merchant: Merchant) -> None:
    key = unique_name("key")
    first, second = send(merchant, "/v1/customers", ADA, key), send(merchant, "/v1/customers", ADA, key)
    assert (first.text, second.headers["idempotency-replayed"]) == (second.text, "true")
    assert [each["id"] for each in merchant.get("/v1/customers")["data"]] == [first.json()["id"]]


def test_update_changes_the_given_fields_only(merchant: Merchant) -> None:
    id = new_customer(merchant, **ADA)["id"]
    answer = send(merchant, f"/v1/customers/{id}", {"phone": None, "name": "Ada King", "metadata": {"since": "1843"}})
    assert answer.status_code == 200
    changed = answer.json()
    assert (changed["phone"], changed["name"], changed["version"]) == (None, "Ada King", 2)
    assert (changed["email"], changed["shipping"]) == (ADA["email"], ADA["shipping"])
    assert changed["metadata"] == {"tier": "gold", "since": "1843"}
    assert send(merchant, f"/v1/customers/{id}", {"metadata": {"tier": None}}).json()["metadata"] == {"since": "1843"}


@pytest.mark.parametrize(
    "body",
    [
        {}, {"metadata": {}}, {"metadata": {"absent": None}}, ADA,
        {"name": ADA["name"], "shipping": dict(reversed(ADA["shipping"].items()))},
    ],
    ids=str,
)  # fmt: skip
def test_update_without_effect_changes_nothing(merchant: Merchant, body: Json) -> None:
    made = new_customer(merchant, **ADA)
    answer = send(merchant, f"/v1/customers/{made['id']}", body)
    assert (answer.status_code, answer.json()) == (200, made)
    assert merchant.get(f"/v1/customers/{made['id']}") == made
    events = merchant.get("/v1/events", object=made["id"])["data"]
    assert [event["type"] for event in events] == ["customer.created"]


def test_customers_are_listed_newest_first_and_by_email(merchant: Merchant) -> None:
    ada, bob, again = (
        new_customer(merchant, email=email)["id"] for email in ("á@x.example", "b@x.example", "Á@x.example")
    )
    first = merchant.get("/v1/customers", limit=2)
    assert ([each["id"] for each in first["data"]], first["has_more"]) == ([again, bob], True)
    rest = merchant.get("/v1/customers", limit=2, starting_after=bob)
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([ada], False)
    assert [each["id"] for each in merchant.get("/v1/customers", email="a\u0301@X.example")["data"]] == [again, ada]


def test_invalid_customer_is_refused_with_every_broken_rule(merchant: Merchant) -> None:
    answer = send(
        merchant,
        "/v1/customers",
        {"email": "no address", "phone": "5" * 21, "shipping": {"address": {"country": "usa"}}},
    )
    assert sorted(errors_of(answer)) == [
        ("/email", "pattern"),
        ("/phone", "max_length"),
        ("/shipping/address/country", "pattern"),
        ("/shipping/address/line1", "required"),
        ("/shipping/name", "required"),
    ]


@pytest.mark.parametrize(
    "email",
    [
        "ada@shop.example\u200b",
        "a\x7f@shop.example",
        "\u202eada@shop.example",
        "<ada@shop.example>",
        "ada,bob@shop.example",
        "ada@-.-",
        "ada@shop..example",
    ],
)
def test_email_that_is_no_address_is_refused(merchant: Merchant, email: str) -> None:
    assert errors_of(send(merchant, "/v1/customers", {"email": email})) == [("/email", "pattern")]
    assert errors_of(merchant.post(payment(customer={"email": email}))) == [("/customer/email", "pattern")]


def test_erased_customer_is_not_changed_and_takes_no_payments(merchant: Merchant, rights: Connection) -> None:
    id = new_customer(merchant)["id"]
    rights.execute("update surety.customers set erased_at = now() where id = %s", (id,))
    answer = send(merchant, f"/v1/customers/{id}", {"name": "Ada"})
    assert (answer.status_code, answer.json()["state"]) == (409, "erased")
    assert errors_of(merchant.post(payment(customer_id=id))) == [("/customer_id", "erased")]


def test_events_about_customers_show_them(merchant: Merchant) -> None:
    id = new_customer(merchant, email="ada@shop.example")["id"]
    send(merchant, f"/v1/customers/{id}", {"name": "Ada"})
    events = merchant.get("/v1/events", object=id)["data"]
    assert [event["type"] for event in events] == ["customer.created", "customer.updated"]
    assert {event["data"]["name"] for event in events} == {"Ada"}
    assert [event["data"]["version"] for event in events] == [1, 2]
    assert [event["data"]["updated_at"] for event in events] == [event["created_at"] for event in events]
    assert len(merchant.get("/v1/events", type="customer.*")["data"]) == 2


def test_personal_data_of_a_customer_are_in_its_row_and_its_answers_only(
    merchant: Merchant, rights: Connection
) -> None:
    email, name = f"{unique_name('ada')}@shop.example", unique_name("Ada")
    id = new_customer(merchant, email=email, name=name)["id"]
    send(merchant, f"/v1/customers/{id}", {"phone": "+1 555 0199"})
    merchant.pay(customer_id=id)
    kept = rights.execute(
        "select e.snapshot::text || coalesce(e.reason, '') from audit.entries as e where e.merchant_id = %(id)s"
        " union all select e.payload::text from outbox.events as e where e.merchant_id = %(id)s"
        " union all select to_jsonb(p)::text from surety.payments as p where p.merchant_id = %(id)s"
        " union all select to_jsonb(l)::text from surety.payment_labels as l where l.merchant_id = %(id)s",
        {"id": merchant.id},
    ).fetchall()
    assert len(kept) >= 6
    assert not [text for (text,) in kept if email in text or name in text or "0199" in text]


def test_payment_names_its_customer_and_is_found_by_it(merchant: Merchant) -> None:
    id = new_customer(merchant)["id"]
    paid = merchant.pay(customer_id=id)
    merchant.pay()
    assert (paid["customer_id"], paid["customer"]) == (id, None)
    assert [each["id"] for each in merchant.get("/v1/payments", customer_id=id)["data"]] == [paid["id"]]


def test_payments_of_a_stored_customer_are_found_by_its_id_not_by_its_address(merchant: Merchant) -> None:
    id = new_customer(merchant, email="ada@shop.example")["id"]
    merchant.pay(customer_id=id)
    inline = merchant.pay(customer={"email": "Zoë@shop.example"})
    found = merchant.get("/v1/payments", customer_email="ZOË@shop.example")["data"]
    assert [each["id"] for each in found] == [inline["id"]]


def test_one_idempotency_key_is_another_one_at_another_route(merchant: Merchant) -> None:
    key = unique_name("key")
    id = send(merchant, "/v1/customers", {}, key).json()["id"]
    assert send(merchant, f"/v1/customers/{id}", {"name": "Ada"}, key).status_code == 200
    other = new_customer(merchant)["id"]
    assert send(merchant, f"/v1/customers/{other}", {"name": "Ada"}, key).status_code == 422


def test_payment_with_a_customer_of_another_merchant_is_refused(merchant: Merchant, rights: Connection) -> None:
    other = Merchant(rights, str(merchant.client.base_url))
    foreign = new_customer(other)["id"]
    saved = save_method(rights, other, foreign)
    other.client.close()
    absent = "cus_" + "0" * 24
    for id in (foreign, absent):
        answer = merchant.post(payment(customer_id=id))
        assert (errors_of(answer), answer.json()["errors"][0]["given"]) == ([("/customer_id", "known")], id)
    method = {"type": "card", "saved": saved}
    assert errors_of(merchant.post(payment(payment_method=method))) == [("/payment_method/saved", "known")]
    assert merchant.count() == 0


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"detached_at": "2026-01-01T00:00:00Z"}, "detached"),
        ({"exp_month": 1, "exp_year": 2024}, "expired"),
    ],
)
def test_saved_method_that_cannot_be_charged_is_refused(
    merchant: Merchant, rights: Connection, columns: Json, rule: str
) -> None:
    saved = save_method(rights, merchant, new_customer(merchant)["id"], **columns)
    answer = merchant.post(payment(payment_method={"type": "card", "saved": saved}, off_session=True))
    assert errors_of(answer) == [("/payment_method/saved", rule)]


def test_saved_method_of_another_customer_is_refused(merchant: Merchant, rights: Connection) -> None:
    saved = save_method(rights, merchant, new_customer(merchant)["id"])
    body = payment(payment_method={"type": "card", "saved": saved}, customer_id=new_customer(merchant)["id"])
    assert errors_of(merchant.post(body)) == [("/payment_method/saved", "owner")]


def test_payment_by_a_saved_method_takes_its_customer_and_the_providers_token(
    merchant: Merchant, rights: Connection
) -> None:
    customer = new_customer(merchant)["id"]
    saved = save_method(rights, merchant, customer)
    body = payment(payment_method={"type": "card", "saved": saved}, off_session=True)
    del body["return_url"]
    answer = merchant.post(body)
    assert answer.status_code == 201, answer.text
    paid = answer.json()
    assert (paid["customer_id"], paid["payment_method"]["saved"], paid["off_session"]) == (customer, saved, True)
    token = rights.execute("select method_token from surety.payments where id = %s", (paid["id"],)).fetchone()
    assert token == (f"pm_of_{saved}",)


INCONSISTENT: list[tuple[Json, list[tuple[str, str]]]] = [
    ({"customer_id": "cus_" + "0" * 24, "customer": {"name": "Ada"}}, [("/customer", "exclusive")]),
    ({"payment_method": {"type": "card"}}, [("/payment_method/token", "required")]),
    (
        {"payment_method": {"type": "card", "token": "pm_card_visa", "saved": "spm_" + "0" * 24}},
        [("/payment_method/saved", "exclusive")],
    ),
    ({"save_payment_method": "off_session"}, [("/customer_id", "required"), ("/mandate", "required")]),
    ({"mandate": MANDATE}, [("/mandate", "exclusive")]),
    *(
        (
            {"payment_method": {"type": "card", "saved": "spm_" + "0" * 24}, "customer": customer},
            [("/customer", "exclusive")],
        )
        for customer in ({}, {"email": "ada@shop.example"})
    ),
    (
        {
            "save_payment_method": "off_session",
            "mandate": MANDATE,
            "customer_id": "cus_" + "0" * 24,
            "off_session": True,
        },
        [("/off_session", "exclusive")],
    ),
    (
        {
            "save_payment_method": "off_session",
            "mandate": MANDATE,
            "payment_method": {"type": "card", "saved": "spm_" + "0" * 24},
            "customer_id": "cus_" + "0" * 24,
        },
        [("/save_payment_method", "exclusive")],
    ),
    (
        {"save_payment_method": "off_session", "mandate": MANDATE | {"ip_address": "home"}, "customer_id": None},
        [("/customer_id", "required"), ("/mandate/ip_address", "pattern")],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), INCONSISTENT, ids=lambda value: json.dumps(value)[:60])
def test_fields_that_contradict_each_other_are_refused(
    merchant: Merchant, fields: Json, expected: list[tuple[str, str]]
) -> None:
    assert sorted(errors_of(merchant.post(payment(**fields)))) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"accepted_at": "2999-01-01T00:00:00Z"}, [("/mandate/accepted_at", "past")]),
        ({"accepted_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}, [("/mandate/accepted_at", "past")]),
        ({"accepted_at": "1999-12-31T23:59:59Z"}, [("/mandate/accepted_at", "minimum")]),
        ({"ip_address": "999.999.999.999"}, [("/mandate/ip_address", "format")]),
        ({"ip_address": "1:2:3"}, [("/mandate/ip_address", "format")]),
        ({"ip_address": "home"}, [("/mandate/ip_address", "pattern")]),
        (
            {"accepted_at": "1999-01-01T00:00:00Z", "ip_address": "10.0.0.256"},
            [("/mandate/accepted_at", "minimum"), ("/mandate/ip_address", "format")],
        ),
    ],
)
def test_consent_from_no_possible_time_or_address_is_refused(
    merchant: Merchant, fields: Json, expected: list[tuple[str, str]]
) -> None:
    body = payment(
        customer_id=new_customer(merchant)["id"], save_payment_method="off_session", mandate=MANDATE | fields
    )
    assert sorted(errors_of(merchant.post(body))) == expected


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::1", "::ffff:203.0.113.7"])
def test_consent_by_a_clock_that_is_a_minute_ahead_is_taken(merchant: Merchant, address: str) -> None:
    id = new_customer(merchant)["id"]
    mandate = MANDATE | {
        "accepted_at": (datetime.now(UTC) + timedelta(minutes=1)).isoformat(),
        "ip_address": address,
    }
    assert merchant.pay(customer_id=id, save_payment_method="off_session", mandate=mandate)["state"] == "initiated"


def test_payment_that_saves_its_method_keeps_the_mandate(merchant: Merchant, rights: Connection) -> None:
    id = new_customer(merchant)["id"]
    paid = merchant.pay(customer_id=id, save_payment_method="off_session", mandate=MANDATE)
    assert paid["save_payment_method"] == "off_session"
    assert "203.0.113.7" not in json.dumps(paid)
    row = rights.execute("select save_method from surety.payments where id = %s", (paid["id"],)).fetchone()
    assert row == ({"usage": "off_session", "mandate": MANDATE},)


def test_saved_methods_of_a_customer_are_listed_until_they_are_removed(merchant: Merchant, rights: Connection) -> None:
    customer = new_customer(merchant)["id"]
    path = f"/v1/customers/{customer}/payment_methods"
    first, second = sorted(save_method(rights, merchant, customer) for _ in range(2))
    assert [each["id"] for each in merchant.get(path)["data"]] == [second, first]
    assert [each["id"] for each in merchant.get(path, starting_after=second)["data"]] == [first]
    for _ in range(2):
        headers = {"Idempotency-Key": unique_name("key")}
        answer = merchant.client.delete(f"{path}/{first}", headers=headers)
        assert (answer.status_code, answer.json()["id"]) == (200, first)
        assert answer.json()["detached_at"]
    assert [each["id"] for each in merchant.get(path)["data"]] == [second]
    created, detached = merchant.get("/v1/events", object=customer)["data"]
    assert (created["type"], detached["type"]) == ("customer.created", "customer.payment_method_detached")
    assert detached["data"] == answer.json()
    assert msgspec.convert(detached, PaymentMethodEvent).data.id == first
    body = payment(payment_method={"type": "card", "saved": first}, off_session=True)
    assert errors_of(merchant.post(body)) == [("/payment_method/saved", "detached")]


@pytest.mark.parametrize("change", ["detached_at = now()", "exp_year = 2024"])
def test_repeated_payment_gets_its_first_answer_after_its_method_has_gone(
    merchant: Merchant, rights: Connection, change: str
) -> None:
    saved = save_method(rights, merchant, new_customer(merchant)["id"])
    body, key = payment(payment_method={"type": "card", "saved": saved}, off_session=True), unique_name("key")
    first = merchant.post(body, key=key)
    rights.execute(f"update surety.payment_methods set {change} where id = %s".encode(), (saved,))
    again = merchant.post(body, key=key)
    assert (first.status_code, again.status_code, again.content) == (201, 201, first.content)
    other = body | {"amount": body["amount"] + 1}
    assert merchant.post(other, key=key).json()["type"].endswith("idempotency-key-reused")
    assert errors_of(merchant.post(other))[0][0] == "/payment_method/saved"
    assert merchant.count() == 1


def test_payment_by_a_removed_method_keeps_no_key_and_no_reference(merchant: Merchant, rights: Connection) -> None:
    customer, key, reference = new_customer(merchant)["id"], unique_name("key"), unique_name("order")
    saved = save_method(rights, merchant, customer, detached_at="2026-01-01T00:00:00Z")
    by_saved = payment(payment_method={"type": "card", "saved": saved}, off_session=True, reference=reference)
    for _ in range(2):
        assert errors_of(merchant.post(by_saved, key=key)) == [("/payment_method/saved", "detached")]
    assert merchant.post(payment(reference=reference), key=key).status_code == 201
    assert merchant.count() == 1


def test_saved_method_is_removed_by_its_own_customer_only(merchant: Merchant, rights: Connection) -> None:
    owner, other = new_customer(merchant)["id"], new_customer(merchant)["id"]
    saved = save_method(rights, merchant, owner)
    path = f"/v1/customers/{other}/payment_methods/{saved}"
    assert merchant.client.delete(path, headers={"Idempotency-Key": unique_name("key")}).status_code == 404
    assert len(merchant.get(f"/v1/customers/{owner}/payment_methods")["data"]) == 1


def test_erased_customer_leaves_no_mandate_in_stored_answers(merchant: Merchant, rights: Connection) -> None:
    customer = new_customer(merchant)["id"]
    saved = save_method(rights, merchant, customer)
    path, headers = f"/v1/customers/{customer}/payment_methods/{saved}", {"Idempotency-Key": unique_name("key")}
    assert MANDATE["ip_address"] in merchant.client.delete(path, headers=headers).text
    rights.execute("select surety.erase_customer(%s, now())", (customer,))
    again = merchant.client.delete(path, headers=headers)
    assert (again.headers["idempotency-replayed"], again.json()["mandate"]) == ("true", None)
