"""The sandbox's connections: requests in parts, several at once, and the receivers that webhooks meet."""

import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.support.sandbox_process import (
    CARD_PAYMENT,
    KEY,
    VERSION,
    SandboxProcess,
    eventually,
    running_sandbox,
)

FORM = urlencode(CARD_PAYMENT).encode()
KEYS = count()


def head(method: str, path: str, *fields: str, key: str | None = None, body: bytes = b"") -> bytes:
    """A request's head for this body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: sandbox", f"Authorization: Bearer {KEY}", f"Stripe-Version: {VERSION}"]
    if method == "POST":
        lines += ["Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(body)}"]
    if key:
        lines.append(f"Idempotency-Key: {key}")
    return "\r\n".join((*lines, *fields, "", "")).encode()


@contextmanager
def connected(sandbox: SandboxProcess) -> Generator[socket.socket]:
    """A connection to the sandbox."""
    host, port = sandbox.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def read_answer(connection: socket.socket, *, has_body: bool = True) -> tuple[bytes, bytes]:
    """The next answer: its head in lower case, and its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1)
    answer = received.lower()
    length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
    body = b""
    while has_body and len(body) < length:
        body += connection.recv(length - len(body))
    return answer, body


def test_body_may_arrive_in_parts(sandbox: SandboxProcess) -> None:
    whole = head("POST", "/v1/payment_intents", body=FORM) + FORM
    with connected(sandbox) as connection:
        for part in (whole[:20], whole[20:-30], whole[-30:-1], whole[-1:]):
            connection.sendall(part)
            sandbox.control("health")
        assert read_answer(connection)[0].startswith(b"http/1.1 200")


def test_body_beyond_the_buffer_arrives(sandbox: SandboxProcess) -> None:
    form = FORM + b"&description=" + b"x" * 500_000
    with connected(sandbox) as connection:
        connection.sendall(head("POST", "/v1/payment_intents", body=form) + form)
        assert b"must be at most 1000 characters" in read_answer(connection)[1]


def test_requests_sent_at_once_are_answered_in_order(sandbox: SandboxProcess) -> None:
    keys = [f"pipelined-{next(KEYS)}" for _ in range(3)]
    sandbox.order("payment_intents.create", "slow", match=keys[0])
    with connected(sandbox) as connection:
        connection.sendall(b"".join(head("POST", "/v1/payment_intents", key=key, body=FORM) + FORM for key in keys))
        for key in keys:
            answer, _ = read_answer(connection)
            assert b"http/1.1 200" in answer
            assert f"idempotency-key: {key}".encode() in answer


def test_body_is_asked_for(sandbox: SandboxProcess) -> None:
    with connected(sandbox) as connection:
        connection.sendall(head("POST", "/v1/payment_intents", "Expect: 100-continue", body=FORM))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(FORM)
        assert read_answer(connection)[0].startswith(b"http/1.1 200")


def test_answer_to_head_has_no_body(sandbox: SandboxProcess) -> None:
    with connected(sandbox) as connection:
        connection.sendall(head("HEAD", "/v1/balance") + head("GET", "/v1/balance"))
        assert read_answer(connection, has_body=False)[0].startswith(b"http/1.1 404")
        assert read_answer(connection)[0].startswith(b"http/1.1 200")


@pytest.mark.parametrize("field", ["Connection: close", "Connection: keep-alive"])
def test_connection_is_kept_unless_the_client_closes_it(sandbox: SandboxProcess, field: str) -> None:
    with connected(sandbox) as connection:
        connection.sendall(head("GET", "/v1/balance", field))
        answer, _ = read_answer(connection)
        closes = field == "Connection: close"
        assert (b"connection: close" in answer) == closes
        with suppress(ConnectionError):
            connection.sendall(head("GET", "/v1/balance"))
            assert (connection.recv(1) == b"") == closes


Behave = Callable[[socket.socket, int], None]


class RawReceiver:
    """A receiver that does with each connection what the test says, given the connection's number from 1."""

    def __init__(self, behave: Behave) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/stripe"
        self._behave = behave
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        for number in count(1):
            try:
                connection = self.listening.accept()[0]
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection, number))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection:
            connection.settimeout(30)
            self._behave(connection, number)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join()


@contextmanager
def delivered_to(folder: Path, behave: Behave, *options: str) -> Generator[SandboxProcess]:
    """A sandbox with one connection for webhooks, to a receiver that behaves so."""
    receiver = RawReceiver(behave)
    try:
        with running_sandbox(folder, "--webhook-connections=1", *options, webhook_url=receiver.url) as sandbox:
            yield sandbox
    finally:
        receiver.close()


def read_webhook(connection: socket.socket) -> bool:
    """Read one webhook; False at the connection's end."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            return False
        received += part
    top, _, body = received.partition(b"\r\n\r\n")
    length = int(top.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return True


ACCEPTED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def answer_all(connection: socket.socket) -> None:
    while read_webhook(connection):
        connection.sendall(ACCEPTED)


def counted(sandbox: SandboxProcess, deliveries: int) -> dict[str, int]:
    """The counts of webhooks once there have been so many deliveries and none is pending."""

    def counts() -> dict[str, int] | None:
        counted: dict[str, int] = sandbox.control("webhooks")
        return counted if counted["deliveries"] >= deliveries and not counted["pending"] else None

    return eventually(counts)


@pytest.mark.parametrize("reads_next", [False, True])
def test_webhook_is_sent_again_if_a_kept_connection_is_closed(tmp_path: Path, reads_next: bool) -> None:
    """The receiver closes its connection after an answer or after the next request, without having said so."""

    def behave(connection: socket.socket, _: int) -> None:
        if read_webhook(connection):
            connection.sendall(ACCEPTED)
        if reads_next:
            read_webhook(connection)

    with delivered_to(tmp_path, behave) as sandbox:
        sandbox.create()
        counted(sandbox, 1)
        sandbox.create()
        counts = counted(sandbox, 2)
        assert (counts["delivered"], counts["refused"]) == (2, 0)


def test_answer_may_arrive_in_parts_and_close_the_connection(tmp_path: Path) -> None:
    def behave(connection: socket.socket, _: int) -> None:
        if read_webhook(connection):
            for part in (b"HTTP/1.1 20", b"0 OK\r\nConnection: close\r\nContent-", b"Length: 2\r\n\r\no", b"k"):
                connection.sendall(part)

    with delivered_to(tmp_path, behave) as sandbox:
        sandbox.create()
        sandbox.create()
        counts = counted(sandbox, 2)
        assert (counts["delivered"], counts["refused"]) == (2, 0)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"not HTTP\r\n\r\n"])
def test_webhook_without_a_whole_answer_is_refused_and_retried(tmp_path: Path, answer: bytes) -> None:
    def behave(connection: socket.socket, number: int) -> None:
        if number > 1:
            answer_all(connection)
        elif read_webhook(connection):
            connection.sendall(answer)
            if answer.startswith(b"not"):
                assert connection.recv(1) == b""

    with delivered_to(tmp_path, behave) as sandbox:
        sandbox.create()
        counts = counted(sandbox, 2)
        assert (counts["delivered"], counts["refused"]) == (1, 1)


def test_webhook_without_an_answer_in_time_is_refused_and_retried(tmp_path: Path) -> None:
    def behave(connection: socket.socket, number: int) -> None:
        if number > 1:
            answer_all(connection)
        elif read_webhook(connection):
            assert connection.recv(1) == b""

    with delivered_to(tmp_path, behave, "--webhook-timeout-seconds=0.3") as sandbox:
        sandbox.create()
        counts = counted(sandbox, 2)
        assert (counts["delivered"], counts["refused"]) == (1, 1)


def test_webhook_to_a_port_without_a_server_is_retried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/stripe"
    options = ("--webhook-connections=1", "--webhook-attempts-max=2")
    with running_sandbox(tmp_path, *options, webhook_url=url) as sandbox:
        sandbox.create()
        counts = counted(sandbox, 2)
        assert (counts["refused"], counts["given_up"]) == (1, 1)
