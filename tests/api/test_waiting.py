"""Requests with `Prefer: wait=N` over real sockets: what ends a wait, what they get, and what a wait may not cost."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn

from app.api.application import create_app
from app.connection_limits import ConnectionLimits
from app.web.load_shedding import LoadSheddingProtocol
from db.connect import harden
from db.embedded.processes import wait_until
from db.settings import load_settings
from tests.support.http_client import (
    CONTEXT,
    Connection,
    Merchant,
    problem,
    running_server,
    unique_name,
)
from tests.support.payments import fact, money, record
from tests.support.postgres_proxy import PostgresProxy
from tests.support.sandbox_process import eventually

APPLIED = "preference-applied"
LONG = {"Prefer": "wait=30"}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait."""
    with ThreadPoolExecutor(8) as threads:
        yield threads


def cancel(conn: Connection, *payments: str) -> None:
    """Move new payments to their end."""
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select id, 2, 'initiated', 'canceled', 'test', now(), 'test' from unnest(%s::text[]) as p (id)",
        (list(payments),),
    )


def take(conn: Connection, payment_id: str, *kinds: str) -> None:
    """Record facts of a payment of 49.99 USD."""
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select id, 2, 'initiated', 'submitting', 'test', now(), 'test' from surety.payments"
        " where id = %s and state = 'initiated'",
        (payment_id,),
    )
    objects = {"submitted": "pi", "authorized": "ch", "captured": "ch"}
    record(conn, [fact(payment_id, kind, objects[kind], None if kind == "submitted" else 4999) for kind in kinds])


def begin(pool: ThreadPoolExecutor, merchant: Merchant, path: str, **query: Any) -> Future[httpx.Response]:
    """A GET that waits, under way."""
    return pool.submit(merchant.client.get, path, params=query, headers=LONG)


@contextmanager
def asking(conn: Connection) -> Generator[None]:
    """The block begins a wait: returns once the database has been asked for it."""
    [(since,)] = conn.execute("select clock_timestamp()").fetchall()
    yield
    asked = (
        "select true from pg_stat_activity where query like %s and query_start > %s and datname = current_database()"
    )
    eventually(lambda: conn.execute(asked, ("%api.find_ended_waits%", since)).fetchone(), 20)


@contextmanager
def serving_api(database: str, waiting_max: int, limits: ConnectionLimits) -> Generator[str]:
    """The address of an API in a thread, with bounds of the test's choice."""

    class Protocol(LoadSheddingProtocol):
        pass

    Protocol.limits = limits
    app = create_app(load_settings({"DATABASE_URL": database}), waiting_max=waiting_max)
    server = uvicorn.Server(uvicorn.Config(app, http=Protocol, ws="none", lifespan="on", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert wait_until(lambda: server.started, 30)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


# ---------------------------------------------------------------------------------------------------------- payments


def test_read_waits_until_the_payment_leaves_pending(merchant: Merchant, pool: ThreadPoolExecutor) -> None:
    made = merchant.pay()["id"]
    waiting = begin(pool, merchant, f"/v1/payments/{made}")
    other = merchant.client.get(f"/v1/payments/{made}", headers={"Prefer": "respond-async, wait=1"})
    assert (other.json()["status"], other.headers[APPLIED]) == ("pending", "wait=1")
    assert not waiting.done()
    cancel(merchant.conn, made)
    answer = waiting.result()
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    assert (answer.headers[APPLIED], answer.headers["vary"]) == ("wait=30", "Prefer")
    assert answer.json() == merchant.get(f"/v1/payments/{made}")


def test_read_without_a_valid_wait_is_answered_at_once(merchant: Merchant) -> None:
    made = merchant.pay()["id"]
    for prefer in ("", "wait", "wait=soon", 'wait="30"', "return=minimal"):
        answer = merchant.client.get(f"/v1/payments/{made}", headers={"Prefer": prefer})
        assert (answer.json()["status"], answer.headers.get(APPLIED)) == ("pending", None), prefer
    answer = merchant.client.get(f"/v1/payments/{made}")
    assert (answer.headers["vary"], answer.headers.get(APPLIED)) == ("Prefer", None)


def test_read_of_a_decided_payment_does_not_wait(merchant: Merchant) -> None:
    made = merchant.pay()["id"]
    cancel(merchant.conn, made)
    answer = merchant.client.get(f"/v1/payments/{made}", headers={"Prefer": "wait=3600"})
    assert (answer.json()["status"], answer.headers[APPLIED]) == ("canceled", "wait=30")
    head = merchant.client.head(f"/v1/payments/{made}", headers=LONG)
    assert (head.content, head.headers[APPLIED], head.headers["content-length"]) == (
        b"", "wait=30", str(len(answer.content)),
    )  # fmt: skip


def test_wait_names_the_preferences_of_several_headers(merchant: Merchant) -> None:
    made = merchant.pay()["id"]
    cancel(merchant.conn, made)
    headers = [("Prefer", "respond-async"), ("Prefer", "wait=4, wait=9"), ("Authorization", f"Bearer {merchant.key}")]
    assert httpx.get(f"{merchant.client.base_url}/v1/payments/{made}", headers=headers).headers[APPLIED] == "wait=4"


def test_new_payment_is_answered_when_it_is_decided(merchant: Merchant, pool: ThreadPoolExecutor) -> None:
    only_writes = merchant.another_key(scopes=["payments:write"])
    key = unique_name("key")
    waiting = pool.submit(merchant.post, key=key, Prefer="wait=30", Authorization=f"Bearer {only_writes}")
    made = eventually(lambda: (found := merchant.get("/v1/payments")["data"]) and found[0]["id"])
    cancel(merchant.conn, made)
    answer = waiting.result()
    assert (answer.status_code, answer.json()["status"]) == (201, "canceled")
    assert (answer.headers["location"], answer.headers[APPLIED]) == (f"/v1/payments/{made}", "wait=30")
    assert merchant.count() == 1


def test_repetition_with_wait_shows_the_payment_as_it_is(merchant: Merchant) -> None:
    key = unique_name("key")
    first = merchant.post(key=key)
    cancel(merchant.conn, first.json()["id"])
    repeated = merchant.post(key=key, Prefer="wait=30")
    assert (repeated.status_code, repeated.json()["status"]) == (201, "canceled")
    assert (repeated.headers["idempotency-replayed"], repeated.headers[APPLIED]) == ("true", "wait=30")
    again = merchant.post(key=key)
    assert (again.content, again.headers.get(APPLIED)) == (first.content, None)


# ---------------------------------------------------------------------------------------------------------- commands


def command(merchant: Merchant, path: str, **headers: str) -> httpx.Response:
    """A command under an Idempotency-Key of its own."""
    return merchant.client.post(path, json={}, headers={"Idempotency-Key": unique_name("key"), **headers})


def test_capture_waits_until_the_payment_leaves_pending(merchant: Merchant, pool: ThreadPoolExecutor) -> None:
    made = merchant.pay(capture_method="manual")["id"]
    take(merchant.conn, made, "submitted", "authorized")
    waiting = pool.submit(command, merchant, f"/v1/payments/{made}/capture", **LONG)
    eventually(lambda: merchant.get(f"/v1/payments/{made}")["state"] == "processing" or None)
    take(merchant.conn, made, "captured")
    answer = waiting.result()
    assert (answer.status_code, answer.json()["status"], answer.headers[APPLIED]) == (202, "succeeded", "wait=30")


def test_cancel_waits_until_the_cancellation_is_decided(merchant: Merchant, pool: ThreadPoolExecutor) -> None:
    made = merchant.pay(capture_method="manual")["id"]
    take(merchant.conn, made, "submitted", "authorized")
    path = f"/v1/payments/{made}/cancel"
    short = command(merchant, path, Prefer="wait=1")
    assert (short.status_code, short.json()["status"], short.headers[APPLIED]) == (202, "requires_capture", "wait=1")
    with asking(merchant.conn):
        waiting = pool.submit(command, merchant, path, **LONG)
    record(merchant.conn, [fact(made, "canceled", "pi")])
    assert waiting.result().json()["status"] == "canceled"
    at_once = command(merchant, f"/v1/payments/{merchant.pay()['id']}/cancel", **LONG)
    assert (at_once.status_code, at_once.json()["status"], at_once.headers[APPLIED]) == (200, "canceled", "wait=30")


def test_refund_waits_until_it_leaves_pending(merchant: Merchant, pool: ThreadPoolExecutor) -> None:
    made = merchant.pay()["id"]
    take(merchant.conn, made, "submitted", "captured")
    record(merchant.conn, [money(made, "txn", "charge", 4999, 175)])
    only_refunds = merchant.another_key(scopes=["refunds:write"])
    authorized = {"Authorization": f"Bearer {only_refunds}", **LONG}
    waiting = pool.submit(command, merchant, f"/v1/payments/{made}/refunds", **authorized)
    refund = eventually(lambda: (found := merchant.get("/v1/refunds")["data"]) and found[0]["id"])
    reading = begin(pool, merchant, f"/v1/refunds/{refund}")
    merchant.conn.execute(
        "insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'pending', 'succeeded', 'test', now(), 'test')",
        (refund,),
    )
    for answer, status in ((waiting.result(), 201), (reading.result(), 200)):
        assert (answer.status_code, answer.json()["status"], answer.headers[APPLIED]) == (
            status, "succeeded", "wait=30",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ events


def test_empty_page_of_events_waits_for_the_merchants_next_event(
    merchant: Merchant, rights: Connection, pool: ThreadPoolExecutor
) -> None:
    first = merchant.get("/v1/events")["next"]
    waiting = begin(pool, merchant, "/v1/events", starting_after=first)
    other = Merchant(rights, str(merchant.client.base_url))
    other.pay()
    other.client.close()
    page = merchant.client.get("/v1/events", params={"starting_after": first}, headers={"Prefer": "wait=1"})
    assert (page.json()["data"], page.headers[APPLIED]) == ([], "wait=1")
    assert not waiting.done()
    made = merchant.pay()["id"]
    answer = waiting.result()
    assert [event["data"]["id"] for event in answer.json()["data"]] == [made]
    assert (answer.headers[APPLIED], answer.headers["vary"]) == ("wait=30", "Prefer")
    at_once = merchant.client.get("/v1/events", params={"starting_after": page.json()["next"]}, headers=LONG)
    assert [event["data"]["id"] for event in at_once.json()["data"]] == [made]


def test_waiting_reader_gets_an_event_that_commits_late(
    merchant: Merchant, module_database: str, pool: ThreadPoolExecutor
) -> None:
    made = merchant.pay()["id"]
    with psycopg.connect(harden(module_database, "deploy")) as late:
        late.execute("select pg_current_xact_id()")
        # Its transaction id is below those of the events that the reader has seen.
        merchant.pay()
        cursor = merchant.get("/v1/events")["next"]
        waiting = begin(pool, merchant, "/v1/events", starting_after=cursor)
        short = merchant.client.get("/v1/events", params={"starting_after": cursor}, headers={"Prefer": "wait=1"})
        assert short.json()["data"] == [] and not waiting.done()
        cancel(late, made)
    assert [event["type"] for event in waiting.result().json()["data"]] == ["payment.canceled"]


# ------------------------------------------------------------------------------------------------- what ends a wait


def test_key_revoked_during_a_wait_reads_nothing(
    merchant: Merchant, pool: ThreadPoolExecutor, rights: Connection
) -> None:
    made = merchant.pay()["id"]
    reading = begin(pool, merchant, f"/v1/payments/{made}")
    creating = pool.submit(merchant.post, Prefer="wait=30")
    eventually(lambda: merchant.count() == 2 or None)
    other = merchant.get("/v1/payments")["data"][0]["id"]
    assert merchant.client.get(f"/v1/payments/{made}", headers={"Prefer": "wait=1"}).headers[APPLIED] == "wait=1"
    rights.execute("update surety.api_keys set revoked_at = now() where merchant_id = %s", (merchant.id,))
    cancel(rights, made, other)
    problem(reading.result(), 401, "key-revoked")
    # The payment was made, so its answer is no refusal.
    answer = creating.result()
    assert (answer.status_code, answer.json()["status"], answer.headers.get(APPLIED)) == (201, "pending", None)


def test_wrong_key_does_not_wait(merchant: Merchant) -> None:
    made = merchant.pay()["id"]
    other = Merchant(merchant.conn, str(merchant.client.base_url))
    problem(other.client.get(f"/v1/payments/{made}", headers=LONG), 404, "not-found")
    wrong = {"Authorization": f"Bearer {merchant.key[:-1]}0", **LONG}
    assert merchant.client.get(f"/v1/payments/{made}", headers=wrong).status_code == 401
    other.client.close()


def test_waits_beyond_the_bound_are_answered_at_once(
    module_database: str, rights: Connection, pool: ThreadPoolExecutor
) -> None:
    with serving_api(module_database, 1, ConnectionLimits()) as url:
        merchant = Merchant(rights, url)
        made = merchant.pay()["id"]
        path = f"/v1/payments/{made}"
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {merchant.key}\r\nPrefer: wait=30\r\n\r\n"
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as leaving:
            with asking(rights):
                leaving.sendall(head.encode())
            assert APPLIED not in short(merchant, path).headers
        # The client has left: its place is free, long before its wait would be over.
        eventually(lambda: short(merchant, path).headers.get(APPLIED), 5)
        merchant.client.close()


def short(merchant: Merchant, path: str) -> httpx.Response:
    """A read of a pending payment that waits for a second at most."""
    answer = merchant.client.get(path, headers={"Prefer": "wait=1"})
    assert answer.json()["status"] == "pending"
    return answer


def test_waiting_requests_take_no_connection_from_others(
    module_database: str, rights: Connection, pool: ThreadPoolExecutor
) -> None:
    with serving_api(module_database, 10, ConnectionLimits(connections=2)) as url:
        merchant = Merchant(rights, url)
        made = [merchant.pay()["id"] for _ in range(5)]
        waiting = []
        for one in made:
            waiting.append(begin(pool, merchant, f"/v1/payments/{one}"))
            assert short(merchant, f"/v1/payments/{one}").headers[APPLIED]
        with httpx.Client(verify=CONTEXT) as another:
            assert another.get(f"{url}/health").status_code == 200
        assert not any(one.done() for one in waiting)
        cancel(rights, *made)
        assert {one.result().json()["status"] for one in waiting} == {"canceled"}
        merchant.client.close()


def test_waiting_requests_are_answered_when_the_server_stops(
    module_database: str, rights: Connection, pool: ThreadPoolExecutor
) -> None:
    with running_server("api", module_database) as api:
        merchant = Merchant(rights, api.url)
        made = merchant.pay()["id"]
        reading = [begin(pool, merchant, f"/v1/payments/{made}") for _ in range(2)]
        cursor = merchant.get("/v1/events")["next"]
        reading.append(begin(pool, merchant, "/v1/events", starting_after=cursor))
        creating = pool.submit(merchant.post, Prefer="wait=30")
        eventually(lambda: merchant.count() == 2 or None)
        assert short(merchant, f"/v1/payments/{made}").headers[APPLIED] == "wait=1"
        status, log = api.stop()
        assert (status, "Traceback" in log) == (0, False), log
        assert [one.result().status_code for one in reading] == [200, 200, 200]
        assert {one.result().headers.get(APPLIED) for one in reading[:2]} == {None}
        assert (creating.result().status_code, creating.result().json()["status"]) == (201, "pending")
        merchant.client.close()


def test_waits_end_when_the_database_is_away(
    module_database: str, rights: Connection, pool: ThreadPoolExecutor
) -> None:
    proxy = PostgresProxy(module_database)
    with running_server("api", proxy.url) as api:
        merchant = Merchant(rights, api.url)
        made = merchant.pay()["id"]
        reading = begin(pool, merchant, f"/v1/payments/{made}")
        creating = pool.submit(merchant.post, Prefer="wait=30")
        eventually(lambda: merchant.count() == 2 or None)
        assert short(merchant, f"/v1/payments/{made}").headers[APPLIED] == "wait=1"
        proxy.close()
        problem(reading.result(), 503, "unavailable")
        assert (creating.result().status_code, creating.result().json()["status"]) == (201, "pending")
        assert APPLIED not in creating.result().headers
        status, log = api.stop()
        assert status == 0
        assert len([line for line in log.splitlines() if "waiting requests are answered at once" in line]) == 1, log
        merchant.client.close()
