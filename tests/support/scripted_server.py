"""A TCP server that does what a script says, connection by connection, and counts what arrives."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path


class ScriptedConnection:
    """One connection, in a thread of its own."""

    def __init__(self, server: ScriptedServer, connected: socket.socket) -> None:
        self.socket = connected
        self._server = server
        self._input = connected.makefile("rb")

    def read_request(self) -> bytes | None:
        """The head of the next request, whose body is read too. None once the client has closed the connection."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self._input.readline()
            if not line:
                return None
            head += line
        _, found, rest = head.lower().partition(b"\r\ncontent-length: ")
        self._input.read(int(rest.split(b"\r\n")[0]) if found else 0)
        self._server.requests.append(head)
        return head

    def answer(self, content: bytes, *headers: str) -> None:
        """Send a complete answer."""
        head = "\r\n".join(("HTTP/1.1 200 OK", f"Content-Length: {len(content)}", *headers, "", ""))
        self.socket.sendall(head.encode() + content)

    def close(self) -> None:
        """End it."""
        self._input.close()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class ScriptedServer:
    """The server; `script` is run for every connection, which ends with it."""

    def __init__(self, script: Callable[[ScriptedConnection], None], tls: ssl.SSLContext | None) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.ended = 0
        """Connections whose script has ended."""
        self._script = script
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._connected: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                self.connections += 1
                self._connected.append(connected)
                thread = threading.Thread(target=self._serve, args=(connected,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connected: socket.socket) -> None:
        try:
            # A client that refuses the certificate ends the connection.
            with suppress(OSError):
                if self._tls is not None:
                    connected = self._tls.wrap_socket(connected, server_side=True)
                connection = ScriptedConnection(self, connected)
                try:
                    self._script(connection)
                finally:
                    connection.close()
        finally:
            connected.close()
            self.ended += 1

    def stop(self) -> None:
        """End all connections, and wait for their threads."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for connected in self._connected:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@contextmanager
def scripted_server(
    script: Callable[[ScriptedConnection], None], tls: ssl.SSLContext | None = None
) -> Generator[ScriptedServer]:
    """The server, stopped in the end."""
    server = ScriptedServer(script, tls)
    try:
        yield server
    finally:
        server.stop()


def self_signed(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server with a certificate for an address, and a client that trusts it."""
    certificate = folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", f"subjectAltName=IP:{name}",
         "-keyout", certificate, "-out", folder / "public"],
        check=True, capture_output=True,
    )  # fmt: skip
    with certificate.open("ab") as file:
        file.write((folder / "public").read_bytes())
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    return server, ssl.create_default_context(cafile=folder / "public")
