"""Refusals over real sockets: rules that a request breaks, and authentication."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from app.api.create_payment import BODY_BYTES_MAX
from app.web.keys import new_key, new_operator_key
from tests.support.http_client import (
    CONTEXT,
    Connection,
    Json,
    Merchant,
    ServerProcess,
    broken_rules,
    connect_as_owner,
    payment,
    problem,
    running_server,
    unique_name,
)
from tests.support.payments import fact, record

# ---------------------------------------------------------------------------------------------------- validation errors

CARD = {"type": "card", "token": "pm_card_visa"}
BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"amount": 0}, "/amount", "minimum"),
    ({"amount": -5}, "/amount", "minimum"),
    ({"amount": 49}, "/amount", "minimum"),
    ({"amount": 499, "currency": "krw"}, "/amount", "minimum"),
    ({"amount": 100_000_000}, "/amount", "maximum"),
    ({"amount": 10**12}, "/amount", "maximum"),
    ({"amount": 10**30}, "/amount", "maximum"),
    ({"amount": -(10**30)}, "/amount", "minimum"),
    ({"amount": 100.0}, "/amount", "type"),
    ({"amount": "100"}, "/amount", "type"),
    ({"amount": True}, "/amount", "type"),
    ({"amount": [100]}, "/amount", "type"),
    ({"amount": None}, "/amount", "required"),
    ({"currency": "xyz"}, "/currency", "known"),
    ({"currency": "us"}, "/currency", "pattern"),
    ({"currency": "usd\n"}, "/currency", "pattern"),
    ({"currency": 840}, "/currency", "type"),
    ({"payment_method": None}, "/payment_method", "required"),
    ({"payment_method": "pm_card_visa"}, "/payment_method", "type"),
    ({"payment_method": {"type": "cash", "token": "pm_x"}}, "/payment_method/type", "one_of"),
    ({"payment_method": {"type": "card"}}, "/payment_method/token", "required"),
    ({"payment_method": {"type": "card", "token": "tok_visa"}}, "/payment_method/token", "pattern"),
    ({"payment_method": {**CARD, "number": "4242424242424242"}}, "/payment_method/number", "no_card_data"),
    ({"card": {"number": "4242424242424242"}}, "/card", "no_card_data"),
    ({"capture_method": "later"}, "/capture_method", "one_of"),
    ({"reference": ""}, "/reference", "min_length"),
    ({"reference": "r" * 256}, "/reference", "max_length"),
    ({"description": "d" * 1001}, "/description", "max_length"),
    ({"description": "a\0b"}, "/description", "no_nul"),
    ({"statement_descriptor_suffix": "S" * 23}, "/statement_descriptor_suffix", "max_length"),
    *(
        ({"statement_descriptor_suffix": f"AC{letter}ME"}, "/statement_descriptor_suffix", "pattern")
        for letter in "<>\\'\"*é\n"
    ),
    ({"statement_descriptor_suffix": "1042"}, "/statement_descriptor_suffix", "pattern"),
    ({"return_url": "ftp://shop.example"}, "/return_url", "pattern"),
    ({"return_url": "javascript:alert(1)"}, "/return_url", "pattern"),
    ({"return_url": "/return"}, "/return_url", "pattern"),
    ({"return_url": "https://shop.example/" + "x" * 2048}, "/return_url", "max_length"),
    ({"return_url": "javascript://%0aalert(1)"}, "/return_url", "pattern"),
    ({"return_url": "data://text/html,x"}, "/return_url", "pattern"),
    ({"return_url": "MyApp://done"}, "/return_url", "pattern"),
    ({"return_url": "myapp://"}, "/return_url", "pattern"),
    ({"return_url": "myapp:done"}, "/return_url", "pattern"),
    ({"return_url": "https://?x"}, "/return_url", "pattern"),
    ({"return_url": None}, "/return_url", "required"),
    ({"return_url": None, "off_session": False}, "/return_url", "required"),
    ({"return_url": None, "off_session": "true"}, "/off_session", "type"),
    ({"authentication": "Script"}, "/authentication", "one_of"),
    ({"authentication": "Script", "return_url": None}, "/authentication", "one_of"),
    ({"authentication": "script"}, "/return_url", "exclusive"),
    ({"authentication": "script", "return_url": None, "off_session": True}, "/off_session", "exclusive"),
    ({"authentication": "redirect", "return_url": None}, "/return_url", "required"),
    ({"customer": {"email": "no-address"}}, "/customer/email", "pattern"),
    ({"customer": {"email": "ada@nowhere"}}, "/customer/email", "pattern"),
    ({"customer": {"email": "ada@shop.example" + "x" * 240}}, "/customer/email", "max_length"),
    ({"customer": {"name": ""}}, "/customer/name", "min_length"),
    ({"customer": {"name": "A" * 201}}, "/customer/name", "max_length"),
    ({"customer": {"phone": "1"}}, "/customer/phone", "known"),
    ({"metadata": {"n": 9}}, "/metadata/n", "type"),
    ({"metadata": {"k" * 41: "v"}}, "/metadata/" + "k" * 41, "key_max_length"),
    ({"metadata": {"": "v"}}, "/metadata/", "key_min_length"),
    ({"metadata": {"k": "v" * 501}}, "/metadata/k", "max_length"),
    ({"metadata": {"k": "a\0b"}}, "/metadata/k", "no_nul"),
    ({"metadata": {"a\0": "v"}}, "/metadata/a\0", "key_no_nul"),
    ({"metadata": {"a/b~c": None}}, "/metadata/a~1b~0c", "type"),
    ({"metadata": {str(n): "v" for n in range(51)}}, "/metadata", "max_entries"),
    ({"metadata": {"deep": {"deeper": {"deepest": 1}}}}, "/metadata/deep", "type"),
    ({"metadata": []}, "/metadata", "type"),
    ({"colour": "red"}, "/colour", "known"),
    ({"id": "pay_0"}, "/id", "known"),
]


@pytest.mark.parametrize(("fields", "field", "rule"), BROKEN, ids=lambda value: str(value)[:40])
def test_invalid_field_is_reported_and_nothing_is_stored(
    merchant: Merchant, fields: dict[str, Any], field: str, rule: str
) -> None:
    assert broken_rules(merchant.post(payment(**fields))) == {(field, rule)}
    assert merchant.count() == 0


MALFORMED: list[tuple[bytes, str, str]] = [
    (b"", "", "json"),
    (b"amount=100", "", "json"),
    (b'{"amount": 100,}', "", "json"),
    (b'{"amount": NaN}', "", "json"),
    (b'{"amount": ' + b"9" * 5000 + b"}", "", "json"),
    (b'{"description": "\xff"}', "", "json"),
    (b"[" * 30_000, "", "depth"),
    (b'{"metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, "", "depth"),
    (b"[]", "", "type"),
    (b"null", "", "type"),
    (b'"text"', "", "type"),
]


@pytest.mark.parametrize(("body", "field", "rule"), MALFORMED, ids=lambda value: str(value)[:30])
def test_body_that_is_not_a_json_object_is_refused(merchant: Merchant, body: bytes, field: str, rule: str) -> None:
    assert broken_rules(merchant.post(body)) == {(field, rule)}


@pytest.mark.parametrize(
    ("broken_part", "field", "rule"),
    [
        (rb'"amount": 200', "/amount", "once"),
        (rb'"\u0061mount": 200', "/amount", "once"),
        (rb'"metadata": {"a": "1", "a": "2"}', "/metadata/a", "once"),
        (rb'"description": "\ud800"', "/description", "unicode"),
        (rb'"metadata": {"a": "\udc00"}', "/metadata/a", "unicode"),
    ],
)
def test_input_that_lenient_decoding_would_accept_is_refused(
    merchant: Merchant, broken_part: bytes, field: str, rule: str
) -> None:
    whole = msgspec.json.encode(payment())[:-1] + b", " + broken_part + b"}"
    assert broken_rules(merchant.post(whole)) == {(field, rule)}


def test_json_escapes_and_whitespace_are_accepted(merchant: Merchant) -> None:
    body = rb'{"amount" : 100, "currency":"usd", "description": "\u00e9\ud83d\ude00 \":", "metadata": {"a\":": "b"},'
    body += rb'"payment_method"  :  {"type":"card","token":"pm_card_visa"}, "off_session" : true}'
    answer = merchant.post(body)
    assert answer.json()["description"] == 'é😀 ":'
    assert answer.json()["metadata"] == {'a":': "b"}


def test_all_validation_errors_are_reported_at_once(merchant: Merchant) -> None:
    answer = merchant.post(payment(amount=0, payment_method={"type": "card"}, colour="red", customer={"email": "x"}))
    assert broken_rules(answer) == {
        ("/amount", "minimum"),
        ("/payment_method/token", "required"),
        ("/colour", "known"),
        ("/customer/email", "pattern"),
    }
    shown = problem(answer, 400, "invalid-request")
    assert shown["detail"] == "amount must be at least 50 for usd (and 3 more)"
    [amount] = [error for error in shown["errors"] if error["field"] == "/amount"]
    assert (amount["limit"], amount["given"]) == (50, 0)


def test_card_data_is_refused_and_never_echoed(merchant: Merchant, rights: Connection) -> None:
    number = "4242424242424242"
    for method in ({"type": "card", "number": number, "cvc": "123"}, {"type": "card", "token": number}):
        answer = merchant.post(payment(payment_method=method))
        assert answer.status_code == 400
        assert number not in answer.text
    assert "card data is not accepted" in merchant.post(payment(card={"number": number})).text
    assert rights.execute(
        "select count(*) from audit.entries where snapshot::text like %s", (f"%{number}%",)
    ).fetchone() == (0,)


def test_oversized_body_is_refused_with_or_without_content_length(merchant: Merchant) -> None:
    fitting = payment(metadata={str(n): "v" * 500 for n in range(50)}, description="d" * 1000)
    assert merchant.post(fitting).status_code == 201
    large = msgspec.json.encode(payment(description="d" * BODY_BYTES_MAX))
    assert problem(merchant.post(large), 413, "too-large")["limit"] == BODY_BYTES_MAX
    headers = {"Content-Type": "application/json", "Idempotency-Key": unique_name("key")}
    chunked = merchant.client.post(
        "/v1/payments", content=(large[n : n + 8192] for n in range(0, len(large), 8192)), headers=headers
    )
    problem(chunked, 413, "too-large")
    assert merchant.count() == 1


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_other_content_types_are_refused(merchant: Merchant, content_type: str) -> None:
    problem(merchant.post(Content_Type=content_type), 415, "not-json")


def test_json_content_type_may_name_its_charset(merchant: Merchant) -> None:
    assert merchant.post(Content_Type="Application/JSON; charset=utf-8").status_code == 201


def test_idempotency_key_is_mandatory(merchant: Merchant) -> None:
    headers = {"Content-Type": "application/json"}
    answer = merchant.client.post("/v1/payments", json=payment(), headers=headers)
    problem(answer, 400, "idempotency-key-missing")
    problem(merchant.post(key=""), 400, "idempotency-key-missing")
    assert merchant.count() == 0


@pytest.mark.parametrize("key", ["k" * 256, "a\tb", "schl\u00fcssel".encode().decode("latin-1")])
def test_idempotency_key_must_be_short_and_printable(merchant: Merchant, key: str) -> None:
    headers = {b"Content-Type": b"application/json", b"Idempotency-Key": key.encode("latin-1")}
    answer = merchant.client.post("/v1/payments", json=payment(), headers=headers)
    assert broken_rules(answer) == {("Idempotency-Key", "pattern")}


def test_idempotency_key_of_maximum_length_and_unusual_characters_is_accepted(merchant: Merchant) -> None:
    key = 'a "quoted" \\ key, ' + "~" * 237
    assert len(key) == 255
    first = merchant.post(key=key)
    assert merchant.post(key=key).content == first.content


# ------------------------------------------------------------------------------------------------------- who may ask


def invalid_credentials() -> dict[str, str]:
    """Authorization headers that are refused."""
    known = new_key(livemode=False).text
    misspelt = known[:20] + ("a" if known[20] != "a" else "b") + known[21:]
    return {
        "no header": "",
        "no key": "Bearer",
        "another scheme": f"Basic {known}",
        "misspelt": f"Bearer {misspelt}",
        "unknown": f"Bearer {known}",
        "not ours": "Bearer sk_test_123",
    }


@pytest.mark.parametrize("authorization", invalid_credentials().values(), ids=invalid_credentials())
def test_authentication_precedes_every_other_check(merchant: Merchant, authorization: str) -> None:
    for body in (payment(), b"no json", payment(amount=0)):
        problem(merchant.post(body, Authorization=authorization), 401, "unauthenticated")
    for path in ("/v1/payments", "/v1/payments?limit=x", "/v1/payments/pay_x", "/v1/events?colour=red"):
        answer = merchant.client.get(path, headers={"Authorization": authorization})
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no header", "Authorization is missing"),
        ("no key", "no key after Bearer"),
        ("another scheme", "another scheme than Bearer"),
        ("misspelt", "misspelt"),
        ("unknown", "no such API key is known here"),
        ("not ours", "keys begin with sty_"),
    ],
)
def test_refusal_of_credentials_says_what_is_wrong_with_them(merchant: Merchant, name: str, words: str) -> None:
    authorization = invalid_credentials()[name]
    detail = merchant.client.get("/v1/payments", headers={"Authorization": authorization}).json()["detail"]
    assert words in detail
    assert authorization[-12:] not in detail or len(authorization) < 12


def test_operators_key_at_a_merchants_route_is_called_one(merchant: Merchant) -> None:
    answer = merchant.client.get("/v1/payments", headers={"Authorization": f"Bearer {new_operator_key().text}"})
    assert "operator's key" in problem(answer, 401, "unauthenticated")["detail"]


def test_revoked_api_key_is_denied_and_its_use_is_audited(merchant: Merchant) -> None:
    merchant.pay()
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    problem(merchant.post(), 401, "key-revoked")
    problem(merchant.client.get("/v1/payments"), 401, "key-revoked")
    assert merchant.denials() == [("key-revoked", "POST /v1/payments"), ("key-revoked", "GET /v1/payments")]


def test_unknown_and_malformed_keys_are_counted_but_leave_no_audit_entry(database: str) -> None:
    with running_server("api", database) as running, httpx.Client(base_url=running.url, verify=CONTEXT) as client:
        for n in range(60):
            authorization = "Bearer nonsense" if n % 2 else f"Bearer {new_key(livemode=False).text}"
            problem(client.get("/v1/payments", headers={"Authorization": authorization}), 401, "unauthenticated")
    # A server that ends has written its counts.
    with connect_as_owner(database) as conn:
        counted = "select kind, reason, actor, sum(count) from audit.refusals group by 1, 2, 3"
        assert conn.execute(counted.encode()).fetchall() == [("denied", "unauthenticated", "", 60)]
        assert conn.execute("select from audit.entries where kind = 'denied'").fetchall() == []


@pytest.mark.parametrize(("livemode", "text"), [(True, "this is a test key, and real money"), (False, "a live key")])
def test_refusal_of_an_unknown_key_names_the_other_mode_and_counts_it(database: str, livemode: bool, text: str) -> None:
    with connect_as_owner(database) as conn:
        conn.execute("select surety.set_livemode(%s)", (livemode,))
    with running_server("api", database) as running, httpx.Client(base_url=running.url, verify=CONTEXT) as client:
        for key, is_of_other_mode in ((new_key(livemode=not livemode), True), (new_key(livemode=livemode), False)):
            headers = {"Authorization": f"Bearer {key.text}"}
            post = client.post(
                "/v1/payments", json=payment(), headers=headers | {"Idempotency-Key": unique_name("key")}
            )
            for answer in (client.get("/v1/payments", headers=headers), post):
                document = problem(answer, 401, "unauthenticated")
                assert (text in document["detail"]) is is_of_other_mode
    with connect_as_owner(database) as conn:
        counted = "select reason, sum(count) from audit.refusals group by reason order by reason"
        assert conn.execute(counted.encode()).fetchall() == [("other-mode", 2), ("unauthenticated", 2)]
        assert conn.execute("select from audit.entries where kind = 'denied'").fetchall() == []


def test_suspended_merchant_can_read_but_not_create_payments(merchant: Merchant) -> None:
    made = merchant.pay()
    merchant.conn.execute("select surety.suspend_merchant(%s, true)", (merchant.id,))
    problem(merchant.post(), 403, "merchant-suspended")
    problem(merchant.post(b"no json"), 403, "merchant-suspended")
    assert merchant.denials() == [("merchant-suspended", "POST /v1/payments")] * 2
    assert merchant.get(f"/v1/payments/{made['id']}") == made
    merchant.conn.execute("select surety.suspend_merchant(%s, false)", (merchant.id,))
    assert merchant.post().status_code == 201


def test_suspended_merchant_can_give_back_but_not_take(merchant: Merchant) -> None:
    held, paid, disputed, waiting = (merchant.pay(capture_method=how)["id"] for how in ("manual", *["automatic"] * 3))
    facts = [fact(payment_id, "submitted", "pi", 4999) for payment_id in (held, paid, disputed)]
    facts += [fact(held, "authorized", "ch", 4999)]
    facts += [fact(payment_id, "captured", "ch", 4999) for payment_id in (paid, disputed)]
    facts += [fact(disputed, "dispute_opened", "dp", 1000, revision=1, data={"status": "needs_response"})]
    record(merchant.conn, facts)
    merchant.conn.execute("select surety.suspend_merchant(%s, true)", (merchant.id,))

    def send(path: str, body: Json) -> httpx.Response:
        return merchant.client.post(path, json=body, headers={"Idempotency-Key": unique_name("key")})

    problem(send(f"/v1/payments/{held}/capture", {}), 403, "merchant-suspended")
    [dispute] = merchant.get("/v1/disputes")["data"]
    for path, body, status in (
        (f"/v1/payments/{held}/cancel", {}, 202),
        (f"/v1/payments/{waiting}/cancel", {}, 200),
        (f"/v1/payments/{paid}/refunds", {"amount": 1000}, 201),
        (f"/v1/payments/{paid}", {"metadata": {"note": "1"}}, 200),
        (f"/v1/disputes/{dispute['id']}/evidence", {"evidence": {"uncategorized_text": "Delivered."}}, 202),
    ):
        assert send(path, body).status_code == status, path
    # What the provider reports is booked, and the merchant gets the events.
    record(merchant.conn, [fact(disputed, "dispute_won", "dp", 1000, revision=2, data={"status": "won"})])
    assert "dispute.won" in [event["type"] for event in merchant.get("/v1/events")["data"]]


def test_payment_of_another_merchant_is_not_found_and_the_attempt_is_audited(
    merchant: Merchant, rights: Connection, api: ServerProcess
) -> None:
    neighbour = Merchant(rights, api.url, "Corner Shop")
    theirs = neighbour.pay()
    for path in (f"/v1/payments/{theirs['id']}", f"/v1/payments/{theirs['id']}/trace"):
        problem(merchant.client.get(path), 404, "not-found")
    assert [reason for reason, _ in merchant.denials()] == ["not-found", "not-found"]
    assert merchant.get("/v1/payments")["data"] == []
    assert merchant.get("/v1/events")["data"] == []
    neighbour.client.close()


@pytest.mark.parametrize(
    "payment_id", ["pay_0", "pay_" + "0" * 24, "%00", "pay_" + "G" * 24, "x" * 3000, "..%2f..%2fx"]
)
def test_unknown_payment_id_is_not_found(merchant: Merchant, payment_id: str) -> None:
    problem(merchant.client.get(f"/v1/payments/{payment_id}"), 404, "not-found")
