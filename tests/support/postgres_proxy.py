"""A line to PostgreSQL that can be cut, or go dead while its ends are still acknowledged."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class PostgresProxy:
    """Listens on loopback and forwards to a server's address. While `is_dead` it takes what it is sent, for nothing."""

    def __init__(self, database: str) -> None:
        target = conninfo_to_dict(database)
        self._host, self._port = str(target["host"]), int(target.get("port") or 5432)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = make_conninfo(database, host="127.0.0.1", port=self._listening.getsockname()[1])
        self.is_dead = False
        self.swallowed = 0
        self._lines: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            self._lines += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(one, other), daemon=True).start()

    def _connect(self) -> socket.socket:
        if not self._host.startswith("/"):
            return socket.create_connection((self._host, self._port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(Path(self._host) / f".s.PGSQL.{self._port}"))
        return server

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        dead = False
        with suppress(OSError):
            while data := one.recv(65536):
                # A line that was dead once stays so: what was swallowed would be missing.
                dead = dead or self.is_dead
                if dead:
                    self.swallowed += len(data)
                else:
                    other.sendall(data)
        if not dead:
            for end in (one, other):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut all lines."""
        self._listening.close()
        for line in self._lines:
            line.close()


@contextmanager
def proxied(database: str) -> Generator[PostgresProxy]:
    """A proxy that is closed in the end."""
    proxy = PostgresProxy(database)
    try:
        yield proxy
    finally:
        proxy.close()
