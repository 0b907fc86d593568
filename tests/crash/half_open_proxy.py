"""A TCP port before PostgreSQL's Unix socket. A connection through it can be cut half-open: nothing comes through any
more, in neither direction, and neither end is told.

A host that is gone would not answer keepalives either; here the kernel does, for the proxy. So the proxy ends a cut
connection after as long as keepalives would have taken (db/connect.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from db.connect import NETWORK_DEFAULTS

KEEPALIVE_SECONDS = (
    int(NETWORK_DEFAULTS["keepalives_idle"])
    + int(NETWORK_DEFAULTS["keepalives_count"]) * int(NETWORK_DEFAULTS["keepalives_interval"])
)  # fmt: skip
CHUNK_BYTES = 65536


class ProxiedConnection:
    """One connection: two directions, until one end hangs up or it is cut."""

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.is_cut = asyncio.Event()
        self._client, self._server = client, server

    async def carry(self) -> None:
        """Carry bytes until the connection has ended."""
        pumps = {
            asyncio.create_task(self._pump(self._client[0], self._server[1])),
            asyncio.create_task(self._pump(self._server[0], self._client[1])),
        }
        silence = asyncio.create_task(self.is_cut.wait())
        try:
            await asyncio.wait({*pumps, silence}, return_when=asyncio.FIRST_COMPLETED)
            if self.is_cut.is_set():
                for pump in pumps:
                    pump.cancel()
                await asyncio.sleep(KEEPALIVE_SECONDS)
        finally:
            for task in (*pumps, silence):
                task.cancel()
            await asyncio.gather(*pumps, silence, return_exceptions=True)
            for _, writer in (self._client, self._server):
                writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                target.write(data)
                await target.drain()


class HalfOpenProxy:
    """The proxy, in a thread of its own."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._loop = asyncio.new_event_loop()
        self._connections: set[ProxiedConnection] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self._do(self._open())

    def cut(self, place: float) -> bool:
        """Cut one of the connections, the one at a place in [0, 1); false if there is none."""
        return bool(self._do(self._cut(place)))

    def stop(self) -> None:
        """Hang up everywhere."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _open(self) -> int:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._listening.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_unix_connection(self._socket_path)
        except OSError:
            writer.transport.abort()
            return
        connection = ProxiedConnection((reader, writer), server)
        self._connections.add(connection)
        try:
            await connection.carry()
        except asyncio.CancelledError:
            return  # asyncio would tell of it as of a mishap
        finally:
            self._connections.discard(connection)

    async def _cut(self, place: float) -> bool:
        whole = [connection for connection in self._connections if not connection.is_cut.is_set()]
        if whole:
            whole[int(place * len(whole))].is_cut.set()
        return bool(whole)

    async def _close(self) -> None:
        self._listening.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
