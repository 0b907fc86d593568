"""A TCP port in front of PostgreSQL whose connections can fall silent.

A silent connection is half-open: its bytes are acknowledged and dropped in both directions. Neither end is notified.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from db.connect import NETWORK_DEFAULTS

# A lost host answers no keepalives. The kernel answers them on the proxy's behalf, so the proxy itself resets a silent
# connection when keepalives would have.
KEEPALIVE_SECONDS = (
    int(NETWORK_DEFAULTS["keepalives_idle"])
    + int(NETWORK_DEFAULTS["keepalives_count"]) * int(NETWORK_DEFAULTS["keepalives_interval"])
)  # fmt: skip
CHUNK_BYTES = 65536

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class PostgresProxy:
    """Listens on loopback, in a thread of its own, and forwards to a database's server.

    While `is_dead`, each connection falls silent with the next bytes it carries, and stays silent. A silent connection
    is reset after `reset_seconds`, or never.
    """

    def __init__(self, database: str, *, reset_seconds: float | None = None) -> None:
        target = conninfo_to_dict(database)
        self.is_dead = False
        self.swallowed = 0
        self._host, self._server_port = str(target["host"]), int(target.get("port") or 5432)
        self._reset_seconds = reset_seconds
        self._connections: set[ProxiedConnection] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self._run(self._open())
        self.url = make_conninfo(database, host="127.0.0.1", port=self.port)

    def silence(self, place: float) -> bool:
        """Silence one of the connections, the one at a place in [0, 1). False if there is none."""
        return bool(self._run(self._silence(place)))

    def close(self) -> None:
        """Close all connections and stop listening."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _open(self) -> int:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._listening.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        # A cancelled handler would be reported as an error by asyncio.
        with suppress(asyncio.CancelledError, OSError):
            try:
                connection = ProxiedConnection(self, (reader, writer), await self._connect())
                self._connections.add(connection)
                await connection.carry(self._reset_seconds)
                self._connections.discard(connection)
            finally:
                writer.transport.abort()

    async def _connect(self) -> Stream:
        if self._host.startswith("/"):
            stream = await asyncio.open_unix_connection(Path(self._host) / f".s.PGSQL.{self._server_port}")
        else:
            stream = await asyncio.open_connection(self._host, self._server_port)
        self._writers.append(stream[1])
        return stream

    async def _silence(self, place: float) -> bool:
        open_connections = [connection for connection in self._connections if not connection.silent.is_set()]
        if open_connections:
            open_connections[int(place * len(open_connections))].silent.set()
        return bool(open_connections)

    async def _close(self) -> None:
        self._listening.close()
        # A task that is canceled before its first turn closes nothing, so accepted connections begin first.
        await turn_loop()
        while tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        # Sockets of aborted transports are closed in the next turns.
        await turn_loop()


async def turn_loop() -> None:
    """Let the loop turn some times, so that begun and aborted work takes effect."""
    for _ in range(5):
        await asyncio.sleep(0)


class ProxiedConnection:
    """One connection, until an end closes it or, once it is silent, until it is reset."""

    def __init__(self, proxy: PostgresProxy, client: Stream, server: Stream) -> None:
        self.silent = asyncio.Event()
        self._proxy, self._client, self._server = proxy, client, server

    async def carry(self, reset_seconds: float | None) -> None:
        """Carry bytes both ways until the connection has ended."""
        pumps = {
            asyncio.create_task(self._pump(self._client[0], self._server[1])),
            asyncio.create_task(self._pump(self._server[0], self._client[1])),
        }
        silence = asyncio.create_task(self.silent.wait())
        try:
            await asyncio.wait({*pumps, silence}, return_when=asyncio.FIRST_COMPLETED)
            if self.silent.is_set():
                await asyncio.wait_for(asyncio.Event().wait(), reset_seconds)
        except TimeoutError:
            pass
        finally:
            for task in (*pumps, silence):
                task.cancel()
            await asyncio.gather(*pumps, silence, return_exceptions=True)
            for _, writer in (self._client, self._server):
                writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if self._proxy.is_dead:
                    self.silent.set()
                if self.silent.is_set():
                    self._proxy.swallowed += len(data)
                else:
                    target.write(data)
                    await target.drain()


@contextmanager
def proxied(database: str) -> Generator[PostgresProxy]:
    """A proxy that is closed in the end."""
    proxy = PostgresProxy(database)
    try:
        yield proxy
    finally:
        proxy.close()
