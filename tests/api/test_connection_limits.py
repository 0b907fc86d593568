"""Limits of a connection, over real sockets: a problem document for what exceeds them, and a closed connection."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import _lru_cache_wrapper

import msgspec
import pytest

from app.bounded_http import SINGLE_VALUED
from app.connection_limits import ConnectionLimits
from app.web.keys import checksum, key_hash_of
from db.embedded.processes import wait_until
from tests.support.limited_server import (
    ANSWER_SECONDS,
    BODY_BYTES_MAX,
    LARGE,
    Served,
    problem_of,
    read_answer,
    read_to_end,
    request,
    serving,
)


@pytest.fixture(scope="module")
def patient() -> Iterator[Served]:
    """A server whose time limits no test reaches."""
    with serving(ConnectionLimits(head_seconds=600, body_seconds=600, write_seconds=600, check_seconds=0.05)) as served:
        yield served


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """A server whose time limits are short."""
    short = ConnectionLimits(
        head_seconds=0.3, body_seconds=0.3, write_seconds=0.3, close_seconds=0.3, check_seconds=0.05
    )
    with serving(short, keep_alive=1) as served:
        yield served


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        request("CONNECT a:443"),
        request("GET http://x"),
        request("GET /a b"),
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        request("GET /", "A\x00: b"),
        request("GET /", "Folded: a", " b"),
        request("POST /echo", "Content-Length: 3", "Content-Length: 3", body=b"abc"),
        request("POST /echo", "Content-Length: 3, 3", body=b"abc"),
        request("POST /echo", "Content-Length: -1"),
        request("POST /echo", "Content-Length: 99999999999999999999999"),
        request("POST /echo", "Content-Length: 3", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        request("POST /echo", "Transfer-Encoding: gzip", body=b"abc"),
        request("POST /echo", "Transfer-Encoding: chunked", body=b"z\r\n"),
    ],
)
def test_malformed_request_gets_a_problem_document(patient: Served, sent: bytes) -> None:
    problem_of(patient.answer(sent), 400, "malformed-request")


def test_broken_chunk_after_the_head_gets_a_problem_document(patient: Served) -> None:
    with patient.connect() as connection:
        connection.sendall(request("POST /echo", "Transfer-Encoding: chunked", "Expect: 100-continue"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"zz\r\n")
        problem_of(read_to_end(connection), 400, "malformed-request")


@pytest.mark.parametrize("name", sorted(SINGLE_VALUED - {b"content-length", b"transfer-encoding"}))
def test_second_value_of_a_single_valued_header_is_refused(patient: Served, name: bytes) -> None:
    title = name.decode().title()
    sent = request("POST /echo", f"{title}: a", "Accept: a", f"{name.decode()}: a", "Content-Length: 0")
    document = problem_of(patient.answer(sent), 400, "invalid-request")
    assert document["errors"] == [
        {"field": title, "rule": "once", "message": f"the header {title} is given twice", "in": "header"}
    ]


def test_second_value_of_a_list_header_is_accepted(patient: Served) -> None:
    sent = request("POST /names", "Accept: a", "Via: 1.1 one", "Via: 1.1 two", "Accept: b", "Connection: close")
    assert patient.answer(sent).endswith(b"host accept via via accept connection")


@pytest.mark.parametrize(
    ("parts", "status", "name", "limit"),
    [
        ([request("POST /echo", "A: " + "a" * 40_000)], 431, "head-too-large", 16384),
        ([b"GET / HTTP/1.1\r\nA: ", *[b"a" * 100_000] * 40], 431, "head-too-large", 16384),
        ([b"GET / HTTP/1.1\r\n" + b"a" * 100_000, b"a" * 100_000], 431, "head-too-large", 16384),
        ([b"\r\n" * 50_000], 431, "head-too-large", 16384),
        ([request("POST /echo", *[f"A{n}: {'a' * 1000}" for n in range(17)])], 431, "head-too-large", 16384),
        ([request("POST /echo", *[f"A{n}: a" for n in range(100)])], 431, "head-too-large", 100),
        ([b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 50_000], 431, "head-too-large", 16384),
        ([request("GET /" + "a" * 9000)], 414, "target-too-long", 8192),
        ([request("GET /?" + "a=b&" * 3000)], 414, "target-too-long", 8192),
        ([b"GET /" + b"a" * 100_000, *[b"a" * 100_000] * 40], 414, "target-too-long", 8192),
    ],
)
def test_head_beyond_a_bound_is_refused(
    patient: Served, parts: list[bytes], status: int, name: str, limit: int
) -> None:
    assert problem_of(patient.answer(*parts), status, name)["limit"] == limit


def test_endless_head_is_not_read_to_its_end(patient: Served) -> None:
    with patient.connect() as connection, suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nA: ")
        sent = 0
        while sent < 1 << 30:
            sent += connection.send(b"a" * (1 << 20))
    assert sent < 1 << 30


def test_trailers_are_ignored(patient: Served) -> None:
    head = request("POST /names", "Transfer-Encoding: chunked", "Connection: close")
    assert patient.answer(head, b"1\r\na\r\n0\r\nTrailing: x\r\n\r\n").endswith(b"host transfer-encoding connection")


def test_body_that_is_declared_too_large_is_not_asked_for(patient: Served) -> None:
    head = request("POST /echo", "Content-Length: 1001", "Expect: 100-continue")
    assert problem_of(patient.answer(head), 413, "too-large")["limit"] == BODY_BYTES_MAX


@pytest.mark.parametrize("size", [1001, 3_000_000])
def test_body_that_is_too_large_gets_an_answer_that_the_client_can_read(patient: Served, size: int) -> None:
    declared = patient.answer(request("POST /echo", f"Content-Length: {size}"), bytes(size))
    assert problem_of(declared, 413, "too-large")["limit"] == BODY_BYTES_MAX
    chunk = b"%x\r\n%b\r\n" % (size, bytes(size))
    assert problem_of(patient.answer(request("POST /echo", "Transfer-Encoding: chunked"), chunk), 413, "too-large")


def test_body_after_the_answer_is_read_up_to_a_bound(patient: Served) -> None:
    with patient.connect() as connection:
        connection.sendall(request("POST /refuse", "Content-Length: 60000"))
        assert read_answer(connection).startswith(b"HTTP/1.1 401 ")
        connection.sendall(bytes(60_000) + request("POST /echo", "Content-Length: 2", body=b"ok"))
        assert read_answer(connection).endswith(b"\r\n\r\nok")
        connection.sendall(request("POST /refuse", "Content-Length: 600000"))
        assert read_answer(connection).startswith(b"HTTP/1.1 401 ")
        connection.sendall(bytes(599_999))
        assert read_to_end(connection) == b""


def test_connection_ends_if_the_body_was_not_asked_for(patient: Served) -> None:
    answer = patient.answer(request("POST /refuse", "Content-Length: 5", "Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer


@pytest.mark.parametrize("sent", [b"GET /", b"GET / HTTP/1.1\r\nA: ", b"\r\n", request("POST /echo")[:-2]])
def test_slow_head_is_refused(impatient: Served, sent: bytes) -> None:
    problem_of(impatient.answer(sent), 408, "request-timeout")


@pytest.mark.parametrize("path", ["/echo", "/names"])
@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_slow_body_is_refused(impatient: Served, path: str, framing: str) -> None:
    problem_of(impatient.answer(request(f"POST {path}", framing, body=b"1\r\n")), 408, "request-timeout")


def test_silent_and_idle_connections_are_closed(impatient: Served) -> None:
    assert impatient.answer() == b""
    with impatient.connect() as connection:
        connection.sendall(request("POST /echo", "Content-Length: 2", body=b"ok"))
        assert read_answer(connection).endswith(b"ok")
        assert read_to_end(connection) == b""
    with impatient.connect() as connection:
        connection.sendall(request("POST /refuse", "Content-Length: 2"))
        assert read_answer(connection).endswith(b"no")
        assert read_to_end(connection) == b""


def test_client_that_does_not_read_is_disconnected(impatient: Served) -> None:
    with impatient.connect() as connection:
        connection.sendall(request("GET /much"))
        assert wait_until(lambda: len(impatient.server.server_state.connections) == 1, ANSWER_SECONDS)
        assert wait_until(lambda: not impatient.server.server_state.connections, ANSWER_SECONDS)
        received = 0
        with suppress(ConnectionResetError):
            received = len(read_to_end(connection))
        assert received < LARGE


def test_above_the_bound_of_connections_idle_ones_make_room() -> None:
    with serving(ConnectionLimits(connections=3, check_seconds=0.05)) as served:
        idle = [served.connect() for _ in range(3)]
        idle[0].sendall(request("GET /things/1"))
        assert read_answer(idle[0]).endswith(b"no")  # the last one to become idle
        with served.connect() as another:
            another.sendall(request("GET /things/1"))
            assert read_answer(another).endswith(b"no")
        with suppress(ConnectionResetError):
            assert idle[1].recv(1) == b""
        idle[0].sendall(request("GET /things/1"))
        assert read_answer(idle[0]).endswith(b"no")
        for connection in idle:
            connection.close()


def test_above_the_bound_of_connections_with_requests_new_ones_get_503() -> None:
    with serving(ConnectionLimits(connections=3, check_seconds=0.05)) as served:
        busy = [served.connect() for _ in range(3)]
        for connection in busy:
            connection.sendall(request("GET /wait"))
            assert served.entered.acquire(timeout=ANSWER_SECONDS)
        answer = served.answer()
        assert b"retry-after: 1" in answer
        problem_of(answer, 503, "overloaded")
        served.released.set()
        for connection in busy:
            assert read_answer(connection).endswith(b"released")
            connection.close()


def test_pipelined_requests_are_answered_in_order_up_to_a_bound(patient: Served) -> None:
    sent = [request("POST /echo", "Content-Length: 3", body=b"%03d" % n) for n in range(40)]
    answer = patient.answer(b"".join(sent))
    bodies = re.findall(rb"\r\n\r\n(\d{3})", answer)
    assert bodies == [b"%03d" % n for n in range(len(bodies))]
    assert 1 <= len(bodies) <= ConnectionLimits().pipelined + 1


def test_malformed_request_after_another_does_not_answer_in_its_place(patient: Served) -> None:
    answer = patient.answer(request("POST /echo", "Content-Length: 2", body=b"ok") + b"nonsense\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 \d+", answer) == [b"HTTP/1.1 200"]
    assert answer.endswith(b"ok")


def test_upgrade_is_ignored(patient: Served) -> None:
    with patient.connect() as connection:
        upgrade = request("GET /things/1", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        for _ in range(2):
            connection.sendall(upgrade)
            assert read_answer(connection).endswith(b"no")
        connection.sendall(upgrade + request("POST /echo", "Content-Length: 2", body=b"ok"))
        assert read_answer(connection).startswith(b"HTTP/1.1 401 ")


def test_whole_addresses_and_http_1_0_are_understood(patient: Served) -> None:
    answer = patient.answer(request("POST http://elsewhere/echo", "Content-Length: 2", "Connection: close", body=b"ok"))
    assert answer.endswith(b"ok")
    answer = patient.answer(b"POST /echo HTTP/1.0\r\nContent-Length: 2\r\n\r\nok")
    assert answer.endswith(b"ok")
    assert b"connection: close" in answer


def test_line_break_in_a_header_of_a_response_begins_no_header(
    patient: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    answer = patient.answer(request("GET /split", "Connection: close"))
    assert answer == b""


def test_response_to_head_has_the_length_and_no_body(patient: Served) -> None:
    answer = patient.answer(request("HEAD /" + 600 * "x", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert re.search(rb"content-length: [1-9]", answer)
    assert answer.endswith(b"\r\n\r\n")


def test_response_announces_that_the_connection_closes_as_asked(patient: Served) -> None:
    assert b"\r\nconnection: close\r\n" in patient.answer(request("GET /short", "Connection: close"))


def test_response_that_closes_the_connection_ends_it(patient: Served) -> None:
    with patient.connect() as connection:
        connection.sendall(request("GET /last"))
        assert read_to_end(connection).endswith(b"\r\n\r\nlast")


def test_failed_application_gets_a_problem_document(patient: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    answer = patient.answer(request("GET /broken", "Connection: close"))
    problem_of(answer, 500, "internal")


def test_refusals_are_counted_in_the_log(patient: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "surety.http")

    def is_logged() -> bool:
        return any(re.search(r"refused: .*\d+ malformed-request", record.message) for record in caplog.records)

    with serving(ConnectionLimits(check_seconds=0.05)) as served:
        for _ in range(5):
            served.answer(b"hello\r\n\r\n")
        assert wait_until(is_logged, ANSWER_SECONDS)


def cached_entries() -> dict[str, int]:
    """The number of entries of each cache of a function in this process."""
    caches = [one for one in gc.get_objects() if isinstance(one, _lru_cache_wrapper)]
    return {f"{one.__module__}.{one.__qualname__} {id(one)}": one.cache_info().currsize for one in caches}


def test_no_cache_grows_by_what_clients_without_a_key_send(patient: Served) -> None:
    def send(number: int) -> None:
        key = f"sty_test_{number:032d}"
        authorization = f"Bearer {key}{checksum(key)}"
        assert key_hash_of(authorization.encode())
        headers = f"Authorization: {authorization}", f"Cookie: a={number}", f"Host: h{number}", "Connection: close"
        for path in (f"/things/{number}?a={number}", f"/nothing/{number}", f"/echo?{number}"):
            for method in ("GET", "POST"):
                sent = f"{method} {path} HTTP/1.1\r\n" + "\r\n".join([*headers, "Content-Length: 2", "", "{}"])
                assert b"HTTP/1.1 " in patient.answer(sent.encode())

    send(0)
    before = cached_entries()
    for number in range(1, 40):
        send(number)
    grown = {name.partition(" ")[0] for name, size in cached_entries().items() if size > before.get(name, 0) + 20}
    by_path = {
        "litestar._asgi.asgi_router.ASGIRouter._handle_routing",
        "litestar._asgi.routing_trie.traversal.parse_path_params",
    }
    assert grown <= by_path
    assert problem_in(patient.answer(request("GET /things/" + "a" * 505, "Connection: close"))) == "not-found"


def problem_in(answer: bytes) -> str:
    """The type of the problem document."""
    name: str = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["type"].removeprefix("/problems/")
    return name
