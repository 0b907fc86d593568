"""Calls through a proxy: a tunnel, and TLS with the server itself."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from db.errors import SettingsError
from jobs.stripe.connections import ConnectionPool, NoAnswer, OutgoingRequest
from jobs.stripe.egress_proxy import proxy_for
from tests.support.scripted_server import ScriptedConnection, scripted_server, self_signed

POST = OutgoingRequest("POST", "/v1/refunds", {}, b"amount=100")


def forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def open_tunnel(connection: ScriptedConnection) -> None:
    """Do as CONNECT asks."""
    head = connection.read_request()
    assert head is not None
    host, _, port = head.split(b" ")[1].decode().partition(":")
    with socket.create_connection((host, int(port))) as target:
        connection.socket.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n")
        back = threading.Thread(target=forward, args=(target, connection.socket))
        back.start()
        forward(connection.socket, target)
        back.join()


def echo(connection: ScriptedConnection) -> None:
    """Answer each request with its target."""
    while head := connection.read_request():
        connection.answer(head.split(b" ")[1])


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("certified", ["127.0.0.1", "127.0.0.2"])
async def test_calls_go_through_the_proxy_to_a_server_that_proves_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified: str
) -> None:
    server_tls, client_tls = self_signed(tmp_path, certified)
    with scripted_server(echo, server_tls) as server, scripted_server(open_tunnel) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://us%40er:word@127.0.0.1:{proxy.port}")
        pool = ConnectionPool(server.url, client_tls, 10, proxy_for(server.url))
        if certified in server.url:
            assert [(await pool.send(POST)).content for _ in range(2)] == [b"/v1/refunds"] * 2
            [request] = proxy.requests
            assert request.startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n".encode())
            assert b"Proxy-Authorization: Basic dXNAZXI6d29yZA==\r\n" in request
        else:
            with pytest.raises(NoAnswer, match=r"^no connection: SSLCertVerificationError$"):
                await pool.send(POST)
            assert server.requests == []
        await pool.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "the proxy answered HTTP/1.1 407 Proxy Auth"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "the proxy answered SSH"),
        (bytes(70_000), "the proxy answered"),
        (b"HTTP/1.1 200 OK\r\n", "the proxy ended the connection"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "Connection|SSL"),
    ],
)
async def test_refusal_of_the_proxy_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, reason: str
) -> None:
    def script(connection: ScriptedConnection) -> None:
        connection.read_request()
        connection.socket.sendall(answer)

    _, tls = self_signed(tmp_path, "127.0.0.1")
    with scripted_server(script) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.port}")
        pool = ConnectionPool("https://provider.example", tls, 10, proxy_for("https://provider.example"))
        with pytest.raises(NoAnswer, match=rf"^no connection: ({reason})"):
            await pool.send(POST)
        await pool.close()


def test_environment_names_the_proxy_for_https_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for("https://api.stripe.com") is None
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    assert proxy_for("https://api.stripe.com") is not None
    assert proxy_for("http://127.0.0.1:8042") is None
    monkeypatch.setenv("NO_PROXY", "localhost,.stripe.com")
    assert proxy_for("https://api.stripe.com") is None
    assert proxy_for("https://provider.example") is not None
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.example:1080")
    with pytest.raises(SettingsError, match=r"^HTTPS_PROXY is not"):
        proxy_for("https://provider.example")
