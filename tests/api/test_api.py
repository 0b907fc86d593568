"""The HTTP API over real sockets: guarantees to merchants' systems, and refusals."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from app.api.create_payment import BODY_BYTES_MAX
from app.api.schemas.events import EventList
from app.api.schemas.payments import Payment as PaymentDocument
from app.api.schemas.payments import PaymentList, Trace
from app.web.keys import new_key
from app.web.problems import PROBLEM_TYPES
from db.connect import harden
from tests.support.http_client import (
    Connection,
    Merchant,
    ServerProcess,
    broken_rules,
    connect_as_owner,
    payment,
    problem,
    running_server,
    unique_name,
)


@pytest.fixture(scope="module")
def other(module_database: str) -> Iterator[ServerProcess]:
    """A second API process beside the first."""
    with running_server("api", module_database) as running:
        yield running


@pytest.fixture
def merchant(rights: Connection, api: ServerProcess) -> Iterator[Merchant]:
    """A merchant of the test's own."""
    made = Merchant(rights, api.url)
    yield made
    made.client.close()


def strictly(document: Any, struct: Any) -> None:
    """A document holds what its struct says, and nothing else."""
    decoded = msgspec.convert(document, struct)
    assert set(document) == {field.encode_name for field in msgspec.structs.fields(struct)}
    assert decoded


# ------------------------------------------------------------------------------------------------------- accepting


def test_acknowledged_payment_is_stored(merchant: Merchant) -> None:
    body = payment(
        capture_method="manual",
        reference="order-1042",
        description="two books",
        statement_descriptor_suffix="ACME 1042",
        return_url="https://shop.example/return?o=1042",
        customer={"email": "a@b.c", "name": "Ada"},
        metadata={"cart": "9", "größe": "x\ny"},
    )
    answer = merchant.post(body)
    document = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/payments/{document['id']}"
    assert re.fullmatch("req_[0-9a-f]{32}", answer.headers["request-id"])
    assert "idempotency-replayed" not in answer.headers
    strictly(document, PaymentDocument)
    sent = {name: value for name, value in body.items() if name != "payment_method"}
    assert {name: document[name] for name in sent} == sent
    assert document["payment_method"] == {"type": "card"}
    assert (document["state"], document["status"], document["version"]) == ("initiated", "pending", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document["created_at"])
    assert merchant.get(answer.headers["location"]) == document


def test_currency_is_case_insensitive_and_returned_in_lower_case(merchant: Merchant) -> None:
    assert merchant.pay(currency="EuR")["currency"] == "eur"


def test_new_payment_schedules_the_submit_handler(merchant: Merchant) -> None:
    merchant.pay()
    waiting = "select count(*) from procrastinate.procrastinate_jobs where queueing_lock = 'drain:submit'"
    while merchant.conn.execute(waiting).fetchone() == (0,):
        pass


# ----------------------------------------------------------------------------------------------------- idempotency


def test_repeated_request_gets_the_first_response_byte_for_byte(merchant: Merchant) -> None:
    key = unique_name("key")
    first = merchant.post(payment(metadata={"a": "1", "b": "2"}), key=key)
    again = merchant.post(payment(metadata={"b": "2", "a": "1"}, currency="USD", capture_method="automatic"), key=key)
    assert again.status_code == 201
    assert again.content == first.content
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["request-id"] != first.headers["request-id"]
    assert merchant.count() == 1


def test_first_response_is_repeated_after_the_payment_changed_state(merchant: Merchant) -> None:
    key = unique_name("key")
    first = merchant.post(key=key)
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (first.json()["id"],),
    )
    assert merchant.get(first.headers["location"])["state"] == "canceled"
    assert merchant.post(key=key).content == first.content


def test_idempotency_key_with_another_body_is_refused(merchant: Merchant) -> None:
    key = unique_name("key")
    merchant.post(payment(amount=100), key=key)
    problem(merchant.post(payment(amount=101), key=key), 422, "idempotency-key-reused")
    assert merchant.count() == 1


def test_idempotency_key_is_scoped_to_its_merchant(merchant: Merchant, rights: Connection, api: ServerProcess) -> None:
    key = unique_name("key")
    neighbour = Merchant(rights, api.url, "Corner Shop")
    assert merchant.post(key=key).json()["id"] != neighbour.post(key=key).json()["id"]
    neighbour.client.close()


def test_refused_request_does_not_use_up_its_idempotency_key(merchant: Merchant) -> None:
    key = unique_name("key")
    broken_rules(merchant.post(payment(amount=1), key=key))
    assert merchant.post(key=key).status_code == 201


async def test_fifty_concurrent_posts_with_one_key_at_two_processes_make_one_payment(
    merchant: Merchant, api: ServerProcess, other: ServerProcess
) -> None:
    headers = dict(merchant.client.headers) | {
        "Idempotency-Key": unique_name("key"),
        "Content-Type": "application/json",
    }
    body = msgspec.json.encode(payment())
    async with httpx.AsyncClient(timeout=30) as client:
        urls = [f"{running.url}/v1/payments" for running in (api, other)] * 25
        answers = await asyncio.gather(*(client.post(url, content=body, headers=headers) for url in urls))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert merchant.count() == 1


def test_response_is_repeated_byte_for_byte_by_a_new_process(merchant: Merchant, module_database: str) -> None:
    key = unique_name("key")
    first = merchant.post(key=key)
    with running_server("api", module_database, "--processes", "2") as later:
        merchant.client.base_url = httpx.URL(later.url)
        again = merchant.post(key=key)
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["idempotency-replayed"] == "true"
        merchant.client.close()


# ------------------------------------------------------------------------------------------------- when things go wrong


def test_request_that_cannot_be_stored_gets_503_and_its_retry_succeeds(merchant: Merchant) -> None:
    key = unique_name("key")
    merchant.conn.execute("alter function api.create_payments(json) rename to away")
    answer = merchant.post(key=key)
    problem(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    merchant.conn.execute("alter function api.away(json) rename to create_payments")
    assert merchant.count() == 0
    assert merchant.post(key=key).status_code == 201


def test_lost_database_connection_is_not_noticed_by_clients(merchant: Merchant) -> None:
    for _ in range(3):
        merchant.conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = 'surety-api' and datname = current_database()"
        )
        made = merchant.pay()
        assert merchant.get(f"/v1/payments/{made['id']}") == made


def test_stopped_process_finishes_waiting_requests(merchant: Merchant, module_database: str) -> None:
    with (
        running_server("api", module_database) as stopping,
        ThreadPoolExecutor(1) as elsewhere,
        connect_as_owner(module_database) as holder,
    ):
        merchant.client.base_url = httpx.URL(stopping.url)
        with holder.transaction():
            holder.execute("lock table surety.payments in share row exclusive mode")
            answer = elsewhere.submit(merchant.post)
            blocked = "select count(*) from pg_locks where relation = 'surety.payments'::regclass and not granted"
            while merchant.conn.execute(blocked).fetchone() == (0,):
                pass
            stopping.process.terminate()
        assert answer.result().status_code == 201
        assert stopping.stop()[0] == 0


# ------------------------------------------------------------------------------------------------------ references


def test_reference_in_use_is_refused_and_names_its_payment(merchant: Merchant) -> None:
    key = unique_name("key")
    holder = merchant.pay(reference="order-1")
    refused = problem(merchant.post(payment(reference="order-1"), key=key), 409, "reference-taken")
    assert refused["payment"] == holder["id"]
    assert merchant.post(payment(reference="order-2"), key=key).status_code == 201


def test_reference_is_reusable_after_its_payment_was_canceled(merchant: Merchant) -> None:
    first = merchant.pay(reference="order-1")
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (first["id"],),
    )
    assert merchant.pay(reference="order-1")["id"] != first["id"]


async def test_concurrent_payments_with_one_reference_make_one_payment(
    merchant: Merchant, api: ServerProcess, other: ServerProcess
) -> None:
    async with httpx.AsyncClient(timeout=30, headers=merchant.client.headers) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    f"{running.url}/v1/payments",
                    json=payment(reference="order-1"),
                    headers={"Idempotency-Key": unique_name("key")},
                )
                for running in (api, other) * 10
            )
        )
    made = [answer for answer in answers if answer.status_code == 201]
    assert len(made) == 1
    taken = [problem(answer, 409, "reference-taken")["payment"] for answer in answers if answer is not made[0]]
    assert set(taken) == {made[0].json()["id"]}


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
    ({"customer": {"email": "no-address"}}, "/customer/email", "pattern"),
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
    body += rb'"payment_method"  :  {"type":"card","token":"pm_card_visa"}}'
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
    assert "card data never enters here" in merchant.post(payment(card={"number": number})).text
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


def test_revoked_api_key_is_denied_and_its_use_is_audited(merchant: Merchant) -> None:
    merchant.pay()
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    problem(merchant.post(), 401, "unauthenticated")
    problem(merchant.client.get("/v1/payments"), 401, "unauthenticated")
    assert merchant.denials() == [
        ("unauthenticated", "POST /v1/payments"),
        ("unauthenticated", "GET /v1/payments"),
    ]


def test_suspended_merchant_can_read_but_not_create_payments(merchant: Merchant) -> None:
    made = merchant.pay()
    merchant.conn.execute("select surety.suspend_merchant(%s, true)", (merchant.id,))
    problem(merchant.post(), 403, "forbidden")
    problem(merchant.post(b"no json"), 403, "forbidden")
    assert merchant.denials() == [("forbidden", "POST /v1/payments")] * 2
    assert merchant.get(f"/v1/payments/{made['id']}") == made
    merchant.conn.execute("select surety.suspend_merchant(%s, false)", (merchant.id,))
    assert merchant.post().status_code == 201


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
    "payment_id", ["pay_0", "pay_" + "0" * 32, "%00", "pay_" + "G" * 32, "x" * 3000, "..%2f..%2fx"]
)
def test_unknown_payment_id_is_not_found(merchant: Merchant, payment_id: str) -> None:
    problem(merchant.client.get(f"/v1/payments/{payment_id}"), 404, "not-found")


# ----------------------------------------------------------------------------------------------------------- reading


def test_payments_are_listed_newest_first_in_pages(merchant: Merchant) -> None:
    made = [merchant.pay(reference=f"order-{n}") for n in range(5)]
    expected = sorted((document["id"] for document in made), reverse=True)
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = merchant.get("/v1/payments", **query)
        strictly(page, PaymentList)
        seen += [document["id"] for document in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
        query["starting_after"] = seen[-1]
    assert seen == expected


def test_payments_are_filtered_by_state_status_reference_and_time(merchant: Merchant) -> None:
    first, second = merchant.pay(reference="order-1"), merchant.pay(reference="order-2")
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (first["id"],),
    )

    def found(**query: str) -> set[str]:
        return {document["id"] for document in merchant.get("/v1/payments", **query)["data"]}

    both = {first["id"], second["id"]}
    assert found(state="initiated") == found(status="pending") == found(reference="order-2") == {second["id"]}
    assert found(state="canceled") == found(status="canceled") == {first["id"]}
    assert found(status="succeeded") == set()
    assert found(created_from="2020-01-01T00:00:00Z") == found(created_before="2100-01-01T00:00:00+01:00") == both
    assert found(created_from="1960-01-01T00:00:00Z") == both
    assert found(created_before="2020-01-01T00:00:00Z") == set()
    assert found(created_before=first["created_at"], created_from=first["created_at"]) == set()


@pytest.mark.parametrize(
    ("query", "field", "rule"),
    [
        ("limit=0", "limit", "minimum"),
        ("limit=101", "limit", "maximum"),
        ("limit=ten", "limit", "type"),
        ("limit=1&limit=2", "limit", "once"),
        ("state=lost", "state", "one_of"),
        ("status=open", "status", "one_of"),
        ("starting_after=pay_1", "starting_after", "pattern"),
        ("created_from=yesterday", "created_from", "format"),
        ("created_before=2026-01-01T00:00:00", "created_before", "format"),
        ("reference=", "reference", "min_length"),
        ("reference=%00", "reference", "no_nul"),
        ("colour=red", "colour", "known"),
    ],
)
def test_invalid_query_is_refused(merchant: Merchant, query: str, field: str, rule: str) -> None:
    answer = merchant.client.get(f"/v1/payments?{query}")
    assert broken_rules(answer) == {(field, rule)}
    assert {error["in"] for error in answer.json()["errors"]} == {"query"}


def test_trace_contains_the_whole_history_of_a_payment(merchant: Merchant) -> None:
    made = merchant.pay()
    story = merchant.get(f"/v1/payments/{made['id']}/trace")
    strictly(story, Trace)
    assert story["payment"] == made
    assert [(entry["kind"], entry["to"]) for entry in story["entries"]] == [("request", "initiated")]
    assert story["entries"][0]["actor"] == {"type": "key", "id": merchant.key_id}
    assert story["entries"][0]["data"]["address"] == "127.0.0.1"
    assert re.fullmatch("req_[0-9a-f]{32}", story["entries"][0]["data"]["request_id"])


# ------------------------------------------------------------------------------------------------------------ events


def events(merchant: Merchant, after: str | None = None, limit: int = 100) -> tuple[list[str], str]:
    """Read on until nothing is left: ids of the events' payments, and the cursor."""
    seen: list[str] = []
    while True:
        query: dict[str, Any] = {"limit": limit} | ({"after": after} if after else {})
        page = merchant.get("/v1/events", **query)
        strictly(page, EventList)
        seen += [event["data"]["id"] for event in page["data"]]
        after = page["next"]
        if not page["has_more"]:
            return seen, after


def test_events_are_listed_oldest_first_with_the_payment_at_that_version(merchant: Merchant) -> None:
    made = merchant.pay()
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (made["id"],),
    )
    first, second = merchant.get("/v1/events")["data"]
    assert (first["type"], first["data"]) == ("payment.initiated", made)
    assert (second["type"], second["data"]["state"], second["data"]["version"]) == ("payment.canceled", "canceled", 2)


def test_each_event_is_listed_once_across_pages(merchant: Merchant) -> None:
    made = [merchant.pay()["id"] for _ in range(7)]
    seen, cursor = events(merchant, limit=2)
    assert seen == made
    assert events(merchant, cursor) == ([], events(merchant, cursor)[1])
    later = merchant.pay()["id"]
    assert events(merchant, cursor)[0] == [later]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_event_feed_skips_nothing_in_any_commit_order(
    merchant: Merchant, module_database: str, order: tuple[int, ...]
) -> None:
    payments = [merchant.pay()["id"] for _ in range(3)]
    _, cursor = events(merchant)
    writers: list[psycopg.Connection[Any]] = [psycopg.connect(harden(module_database, "deploy")) for _ in payments]
    for writer, payment_id in zip(writers, payments, strict=True):
        writer.execute(
            "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
            " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
            (payment_id,),
        )
    seen: list[str] = []
    for turn in order:
        writers[turn].commit()
        writers[turn].close()
        more, cursor = events(merchant, cursor, limit=1)
        assert more == [payments[turn]]
        seen += more
    assert sorted(seen) == sorted(payments)


@pytest.mark.parametrize("cursor", ["x", "MSAx", "1", "%00", "M" * 5000])
def test_unknown_cursor_is_refused(merchant: Merchant, cursor: str) -> None:
    problem(merchant.client.get(f"/v1/events?after={cursor}"), 400, "invalid-request")


# ----------------------------------------------------------------------------------------------------- pages and paths


def test_each_problem_type_has_a_page(api: ServerProcess) -> None:
    shown = httpx.get(f"{api.url}/problems").json()
    assert [page["type"] for page in shown] == [f"/problems/{name}" for name in PROBLEM_TYPES]
    for page in shown:
        assert httpx.get(api.url + page["type"]).json() == page
    problem(httpx.get(f"{api.url}/problems/none"), 404, "not-found")


def test_documentation_loads_no_external_resources(api: ServerProcess) -> None:
    page = httpx.get(f"{api.url}/docs")
    assert page.status_code == 200
    head = page.text.partition("<body>")[0]
    fetched = re.findall(r"(?:src|href)=['\"]([^'\"]+)", page.text)
    assert len(fetched) == 4
    for address in fetched:
        assert address.startswith("/assets/"), address
        assert httpx.get(api.url + address).status_code == 200
    assert "//" not in head
    assert not [url for url in re.findall(r"https?://[^\s\"'<>\\]+", page.text) if "shop.example" not in url]
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_the_documentation_describes_every_route(api: ServerProcess) -> None:
    shown = httpx.get(f"{api.url}/docs/openapi.json").json()
    assert set(shown["paths"]) == {
        "/v1/payments",
        "/v1/payments/{payment_id}",
        "/v1/payments/{payment_id}/cancel",
        "/v1/payments/{payment_id}/capture",
        "/v1/payments/{payment_id}/refunds",
        "/v1/payments/{payment_id}/trace",
        "/v1/refunds",
        "/v1/refunds/{refund_id}",
        "/v1/disputes",
        "/v1/disputes/{dispute_id}",
        "/v1/disputes/{dispute_id}/evidence",
        "/v1/balance",
        "/v1/balance/transactions",
        "/v1/events",
        "/v1/operator/dead-letters",
        "/v1/operator/dead-letters/{letter_id}",
        "/v1/operator/dead-letters/{letter_id}/replay",
        "/v1/operator/dead-letters/{letter_id}/discard",
        "/v1/operator/dead-letters/replay",
        "/v1/operator/dead-letters/discard",
        "/v1/operator/status",
        "/problems",
        "/problems/{name}",
        "/health",
    }
    post = shown["paths"]["/v1/payments"]["post"]
    assert set(post["responses"]) == {"201", "400", "401", "403", "409", "413", "415", "422", "503"}
    body = shown["components"]["schemas"]["NewPayment"]
    assert body["required"] == ["amount", "currency", "payment_method"]
    assert body["properties"]["amount"]["minimum"] == 1
    query = {parameter["name"] for parameter in shown["paths"]["/v1/payments"]["get"]["parameters"]}
    assert query == {"state", "status", "reference", "created_from", "created_before", "limit", "starting_after"}


def test_unknown_paths_and_methods_get_problem_documents(merchant: Merchant) -> None:
    problem(merchant.client.get("/v2/payments"), 404, "not-found")
    problem(merchant.client.get("/"), 404, "not-found")
    for method, path, allowed in (
        ("DELETE", "/v1/payments", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("POST", "/v1/events", {"GET", "HEAD", "OPTIONS"}),
    ):
        answer = merchant.client.request(method, path)
        problem(answer, 405, "method-not-allowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


def test_head_answers_as_get_without_a_body_and_options_lists_the_methods(merchant: Merchant) -> None:
    made = merchant.pay()
    for path in (f"/v1/payments/{made['id']}", "/health", "/docs"):
        got, head = merchant.client.get(path), merchant.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
    options = merchant.client.options("/v1/payments")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


def test_every_response_has_a_request_id(merchant: Merchant) -> None:
    for path in (
        "/health",
        "/docs",
        "/docs/openapi.json",
        "/problems",
        "/none",
        "/v1/payments",
        "/assets/swagger-ui.css",
    ):
        assert re.fullmatch("req_[0-9a-f]{32}", merchant.client.get(path).headers["request-id"]), path


def test_health_checks_the_database(api: ServerProcess) -> None:
    assert httpx.get(f"{api.url}/health").json() == {"status": "ok"}
