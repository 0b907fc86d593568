"""Load shedding over real sockets: under overload, requests under way are finished and new ones refused at once."""

from __future__ import annotations

import re
import socket
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import msgspec
import psycopg

from tests.support.http_client import (
    Connection,
    Merchant,
    connect_as_owner,
    payment,
    problem,
    running_server,
    unique_name,
)
from tests.support.sandbox_process import eventually

SUSTAINED_MAX = 64


@contextmanager
def stalled(database: str) -> Generator[Connection]:
    """Nothing can be accepted for as long as this holds."""
    with connect_as_owner(database) as conn:
        conn.execute("begin")
        conn.execute("lock table surety.idempotency_keys in exclusive mode")
        yield conn
        with suppress(psycopg.Error):
            conn.execute("rollback")


def raw_request(merchant: Merchant) -> bytes:
    body = msgspec.json.encode(payment())
    head = (
        f"POST /v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Idempotency-Key: {unique_name('raw')}\r\nAuthorization: Bearer {merchant.key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def test_overload_is_refused_at_once_and_no_accepted_payment_is_lost(database: str, conn: Connection) -> None:
    with ExitStack() as stack:
        api = stack.enter_context(running_server("api", database))
        merchant = Merchant(conn, api.url)
        stack.callback(merchant.client.close)
        pool = stack.enter_context(ThreadPoolExecutor(SUSTAINED_MAX))
        merchant.pay()
        where = urlsplit(api.url)
        assert where.hostname and where.port
        with stalled(database):
            waiting: list[Future[httpx.Response]] = [pool.submit(merchant.post) for _ in range(SUSTAINED_MAX)]
            refused = eventually(lambda: post_briefly(merchant), 10)
            document = problem(refused, 503, "overloaded")
            assert refused.headers["retry-after"] == "1" and "date" in refused.headers
            assert document["request_id"] != problem(merchant.post(), 503, "overloaded")["request_id"]
            assert merchant.client.get("/v1/payments").status_code == 200

            with socket.create_connection((where.hostname, where.port), timeout=5) as connection:
                connection.sendall(raw_request(merchant) + raw_request(merchant))
                third = raw_request(merchant)
                connection.sendall(third[:-20])
                answers = read_until(connection, 2)
                connection.sendall(third[-20:])
                answers += read_until(connection, 1)
            assert answers.count(b"HTTP/1.1 503 ") == 3
            assert len(set(re.findall(rb"\r\nrequest-id: (req_[0-9a-f]{24})", answers))) == 3
        answered = [answer.result() for answer in waiting]
        assert {answer.status_code for answer in answered} <= {201, 503}
        accepted = [answer.json()["id"] for answer in answered if answer.status_code == 201]
        kept = conn.execute("select count(*) from surety.payments where id = any(%s)", (accepted,)).fetchone()
        assert kept == (len(accepted),)
        assert merchant.pay()["id"]


def post_briefly(merchant: Merchant) -> httpx.Response | None:
    """An answer, if it comes at once."""
    with suppress(httpx.ReadTimeout):
        return merchant.client.post(
            "/v1/payments", json=payment(), headers={"Idempotency-Key": unique_name("brief")}, timeout=0.3
        )
    return None


def read_until(connection: socket.socket, answers: int) -> bytes:
    """So many answers' bytes."""
    said = b""
    while said.count(b'"request_id"') < answers or not said.endswith(b"}"):
        part = connection.recv(65536)
        assert part
        said += part
    return said
