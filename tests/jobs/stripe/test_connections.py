"""Kept connections: an answer belongs to its request, a request is sent once, and no connection is lost."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jobs.stripe.connections import (
    CONNECTIONS_KEPT_MAX,
    RESPONSE_BYTES_MAX,
    ConnectionPool,
    KeptConnection,
    NoAnswer,
    OutgoingRequest,
    RawResponse,
)
from tests.support.sandbox_process import eventually
from tests.support.scripted_server import ScriptedConnection, scripted_server, self_signed

GET = OutgoingRequest("GET", "/v1/balance", {})
POST = OutgoingRequest("POST", "/v1/refunds", {"Idempotency-Key": "key"}, b"amount=100")


def echo(connection: ScriptedConnection) -> None:
    """Answer each request with its target."""
    while head := connection.read_request():
        connection.answer(head.split(b" ")[1])


def read_only(connection: ScriptedConnection) -> None:
    """Read until the client closes the connection."""
    while connection.read_request():
        pass


@asynccontextmanager
async def connections(
    url: str, connect_seconds: float = 10, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[ConnectionPool]:
    pool = ConnectionPool(url, tls or ssl.create_default_context(), connect_seconds)
    try:
        yield pool
    finally:
        await pool.close()
        assert not pool._open


async def send(pool: ConnectionPool, target: str) -> bytes:
    """The content of the answer to a GET."""
    return (await pool.send(OutgoingRequest("GET", target, {}))).content


async def answer_to(pieces: list[bytes], request: OutgoingRequest = GET) -> RawResponse:
    """The answer to a request when the server sends these pieces, and then ends the connection."""
    go_on = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        for piece in pieces:
            connection.socket.sendall(piece)
            # So that pieces don't arrive together.
            go_on.wait(0.02)

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            try:
                return await pool.send(request)
            finally:
                assert len(server.requests) == 1


async def test_requests_one_after_another_share_a_connection() -> None:
    with scripted_server(echo) as server:
        async with connections(server.url) as pool:
            answers = [await send(pool, f"/v1/{n}") for n in range(5)]
            assert (await pool.send(POST)).content == b"/v1/refunds"
    assert answers == [b"/v1/0", b"/v1/1", b"/v1/2", b"/v1/3", b"/v1/4"]
    assert server.connections == 1


async def test_requests_are_sent_as_they_are_given() -> None:
    with scripted_server(echo) as server:
        async with connections(server.url) as pool:
            await pool.send(POST)
            await pool.send(GET)
    host = f"Host: 127.0.0.1:{server.port}\r\nAccept-Encoding: identity\r\n"
    assert [request.decode() for request in server.requests] == [
        f"POST /v1/refunds HTTP/1.1\r\n{host}Idempotency-Key: key\r\nContent-Length: 10\r\n\r\n",
        f"GET /v1/balance HTTP/1.1\r\n{host}\r\n",
    ]


async def test_a_connection_carries_one_request_at_a_time_and_not_all_are_kept() -> None:
    count = CONNECTIONS_KEPT_MAX + 8
    all_arrived = threading.Barrier(count)

    def script(connection: ScriptedConnection) -> None:
        while head := connection.read_request():
            all_arrived.wait(20)
            connection.answer(head.split(b" ")[1])

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            targets = [f"/v1/{n}" for n in range(count)]
            answers = await asyncio.gather(*(send(pool, target) for target in targets))
            assert answers == [target.encode() for target in targets]
            await asyncio.to_thread(eventually, lambda: server.ended == count - CONNECTIONS_KEPT_MAX)


async def test_canceled_requests_leave_no_connection_and_no_answer_behind() -> None:
    canceled = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        while head := connection.read_request():
            if b"/slow" in head:
                canceled.wait(20)
            connection.answer(head.split(b" ")[1])

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            assert await send(pool, "/v1/first") == b"/v1/first"
            slow = [asyncio.create_task(send(pool, f"/slow/{n}")) for n in range(100)]
            await asyncio.to_thread(eventually, lambda: len(server.requests) == 101)
            # Others end before they are connected.
            late = [asyncio.create_task(send(pool, f"/slow/{n}")) for n in range(100)]
            await asyncio.sleep(0)
            for task in slow + late:
                task.cancel()
            results = await asyncio.gather(*slow, *late, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            canceled.set()
            assert await send(pool, "/v1/next") == b"/v1/next"
            await asyncio.to_thread(eventually, lambda: server.ended == server.connections - 1)
            assert len(pool._open) == 1


async def test_connection_that_the_server_closed_while_idle_is_not_used() -> None:
    closed = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        head = connection.read_request()
        connection.answer((head or b"").split(b" ")[1])
        connection.close()
        closed.set()

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            assert await send(pool, "/v1/1") == b"/v1/1"
            # The event loop does not turn, so only the socket can show it.
            assert closed.wait(20)
            assert await send(pool, "/v1/2") == b"/v1/2"
    assert len(server.requests) == 2


@pytest.mark.parametrize("request_", [GET, POST])
@pytest.mark.parametrize("answered_before", [False, True])
async def test_request_without_an_answer_is_not_sent_again(request_: OutgoingRequest, answered_before: bool) -> None:
    def script(connection: ScriptedConnection) -> None:
        if answered_before:
            connection.read_request()
            connection.answer(b"{}")
        connection.read_request()

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            if answered_before:
                await pool.send(GET)
            with pytest.raises(NoAnswer, match=r"^the connection ended"):
                await pool.send(request_)
    assert len(server.requests) == 1 + answered_before
    assert server.connections == 1


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"HTTP/1.1 200 OK\r\nDa", [b"te: now\r\nContent-Length: 4\r\n\r\n{", b"'a}"]),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n",
            [b"Date: now\r\n\r\n2\r\n{'\r\n2", b"\r\na}\r\n", b"0\r\n\r\n"],
        ),
        (
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
            [b"HTTP/1.1 200 OK\r\nDate: now\r\n", b"Content-Length: 4\r\n\r\n{'a}"],
        ),
    ],
    ids=["length", "chunked", "interim"],
)
async def test_answer_that_arrives_in_pieces_is_whole(first: bytes, rest: list[bytes]) -> None:
    answer = await answer_to([first, *rest])
    assert (answer.status, answer.headers["date"], answer.content) == (200, "now", b"{'a}")
    assert "link" not in answer.headers


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([], "the connection ended"),
        ([b"HTTP/1.1 200 OK\r\nContent-Le"], "the connection ended"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{}"], "the connection ended"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"], "the connection ended"),
        # It ends with the connection, which may also have broken.
        ([b"HTTP/1.1 200 OK\r\n\r\n{}"], "the connection ended"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "an unreadable answer"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"], "an unreadable answer"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"], "an unreadable answer"),
        ([b"HTTP/1.1 200 OK\r\n\r\n" + bytes(RESPONSE_BYTES_MAX)], "an answer of more than 16777216 bytes"),
        ([b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * (RESPONSE_BYTES_MAX // 6)], "an answer of more than 16777216 bytes"),
    ],
)
async def test_answer_that_is_incomplete_unreadable_or_too_large_is_none(pieces: list[bytes], reason: str) -> None:
    with pytest.raises(NoAnswer, match=f"^{reason}"):
        await answer_to(pieces)


async def test_size_of_answers_is_limited_one_by_one() -> None:
    content = bytes(RESPONSE_BYTES_MAX * 2 // 3)

    def script(connection: ScriptedConnection) -> None:
        while connection.read_request():
            connection.answer(content)

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            assert [(await pool.send(GET)).content == content for _ in range(3)] == [True] * 3
    assert server.connections == 1


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong", b"\0"])
@pytest.mark.parametrize("at_once", [True, False])
async def test_bytes_that_no_request_asked_for_answer_no_request(extra: bytes, at_once: bool) -> None:
    answered, sent = threading.Event(), threading.Event()

    def script(connection: ScriptedConnection) -> None:
        while head := connection.read_request():
            target = head.split(b" ")[1]
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(target), target)
            if at_once:
                connection.socket.sendall(whole + extra)
            else:
                connection.socket.sendall(whole)
                answered.wait(20)
                connection.socket.sendall(extra)
            sent.set()

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            for target in ("/v1/1", "/v1/2", "/v1/3"):
                answered.clear()
                sent.clear()
                assert await send(pool, target) == target.encode()
                answered.set()
                # The event loop does not turn, so the next request would be the first to read them.
                assert sent.wait(20)
            await asyncio.to_thread(eventually, lambda: server.ended == 3)
    assert server.connections == len(server.requests) == 3


@pytest.mark.parametrize("header", ["Connection: close", "Connection: keep-alive"])
async def test_connection_is_not_used_after_its_last_answer(header: str) -> None:
    def script(connection: ScriptedConnection) -> None:
        while head := connection.read_request():
            connection.answer(head.split(b" ")[1], header)

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            assert [await send(pool, target) for target in ("/v1/1", "/v1/2")] == [b"/v1/1", b"/v1/2"]
    assert server.connections == (2 if header == "Connection: close" else 1)


@pytest.mark.parametrize(
    "request_",
    [
        OutgoingRequest("GET", "/v1/refunds HTTP/1.1\r\nHost: x", {}),
        OutgoingRequest("GET", "/v1/refunds?a=b c", {}),
        OutgoingRequest("GET", "/v1/refunds", {"Stripe-Account": "acct_1\r\nIdempotency-Key: x"}),
        OutgoingRequest("GET", "/v1/refunds", {"Stripe-Account": "acct_1\nx"}),
        OutgoingRequest("GET", "/v1/refunds", {"Stripe-Account": "acct_ä"}),
    ],
)
async def test_request_that_would_be_read_otherwise_is_not_sent(request_: OutgoingRequest) -> None:
    with scripted_server(echo) as server:
        async with connections(server.url) as pool:
            with pytest.raises(ValueError, match=r"space or a line break|ascii"):
                await pool.send(request_)
    assert server.connections == 0


async def test_server_that_is_out_of_reach_is_no_answer() -> None:
    with scripted_server(echo) as server:
        url = server.url
    async with connections(url) as pool:
        with pytest.raises(NoAnswer, match=r"^no connection: ConnectionRefusedError$"):
            await pool.send(GET)


async def test_connecting_has_a_time_limit_of_its_own() -> None:
    # It accepts the connection and never begins TLS.
    with scripted_server(read_only) as server:
        silent = server.url.replace("http:", "https:")
        async with connections(silent, connect_seconds=0.2) as pool:
            with pytest.raises(NoAnswer, match=r"^no connection within 0\.2 s$"):
                await pool.send(GET)


@pytest.mark.parametrize(("name", "is_trusted"), [("127.0.0.1", True), ("127.0.0.2", True), ("127.0.0.1", False)])
async def test_request_is_sent_only_to_a_server_that_proves_its_name(
    tmp_path: Path, name: str, is_trusted: bool
) -> None:
    server_tls, client_tls = self_signed(tmp_path, name)
    with scripted_server(echo, server_tls) as server:
        async with connections(server.url, tls=client_tls if is_trusted else None) as pool:
            if is_trusted and name in server.url:
                assert [await send(pool, target) for target in ("/v1/1", "/v1/2")] == [b"/v1/1", b"/v1/2"]
                assert server.connections == 1
            else:
                with pytest.raises(NoAnswer, match=r"^no connection: SSLCertVerificationError$"):
                    await pool.send(POST)
                assert server.requests == []


async def test_requests_under_way_end_with_the_pool() -> None:
    forever = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        forever.wait(20)

    with scripted_server(script) as server:
        async with connections(server.url) as pool:
            request = asyncio.create_task(pool.send(GET))
            await asyncio.to_thread(eventually, lambda: len(server.requests) == 1)
        with pytest.raises(NoAnswer, match=r"^the connection ended$"):
            await request
        forever.set()


async def test_request_on_a_connection_that_has_ended_waits_for_no_answer() -> None:
    with scripted_server(lambda _: None) as server:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(KeptConnection, "127.0.0.1", server.port)
        await connection.lost
        with pytest.raises(NoAnswer):
            await asyncio.wait_for(connection.exchange(b"GET / HTTP/1.1\r\n\r\n"), 5)
