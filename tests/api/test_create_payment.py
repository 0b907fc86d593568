"""POST /v1/payments over real sockets: acceptance, idempotency, failures, references."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest

from app.api.schemas.payments import Payment as PaymentDocument
from tests.support.http_client import (
    Connection,
    Merchant,
    ServerProcess,
    assert_matches,
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
    assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["request-id"])
    assert "idempotency-replayed" not in answer.headers
    assert_matches(document, PaymentDocument)
    sent = {name: value for name, value in body.items() if name != "payment_method"}
    assert {name: document[name] for name in sent} == sent
    assert document["payment_method"] == {"type": "card", "brand": None, "last4": None, "country": None, "saved": None}
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


@pytest.mark.parametrize(
    "url", ["http://localhost:3000", "HTTPS://shop.example/a?b#c", "myapp://done", "com.shop.app://x"]
)
def test_payer_may_return_to_a_page_or_to_an_app(merchant: Merchant, url: str) -> None:
    paid = merchant.pay(return_url=url)
    assert (paid["return_url"], paid["off_session"]) == (url, False)


def test_payment_without_a_payer_needs_no_return_url(merchant: Merchant) -> None:
    paid = merchant.pay(return_url=None, off_session=True)
    assert (paid["return_url"], paid["off_session"]) == (None, True)


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


def test_white_space_around_an_idempotency_key_is_no_part_of_it(merchant: Merchant) -> None:
    body = msgspec.json.encode(payment())
    made = set()
    for number, key in enumerate((b"order-1", b"order-1 ", b"order-1\t", b" \torder-1 \t ")):
        url = merchant.client.base_url
        head = (
            b"POST /v1/payments HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n"
        )
        with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
            connection.sendall(head % (merchant.key.encode(), key, len(body)) + body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 201")
        assert (b"idempotency-replayed: true" in answer.lower()) == (number > 0)
        made.add(answer.rpartition(b"\r\n\r\n")[2])
    assert len(made) == 1


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
    problem(answer, 503, "unavailable")
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
