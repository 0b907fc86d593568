"""A proxy before the sandbox that records when each payment's creation arrives. It forwards all bytes unchanged."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Self

import httpx

from app.local.demo.merchants import Order

REQUEST_SECONDS_MAX = 10.0
CREATE = b"POST /v1/payment_intents HTTP/1.1\r\n"


class RecordingProxy:
    """Listens on a port of its own and forwards everything. `heard` holds the times of requests to create an intent.

    It has a thread to itself, and its clock is this process's time.perf_counter().
    """

    def __init__(self, port: int) -> None:
        self.heard: list[float] = []
        self.url = ""
        self._to = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._listening = threading.Event()
        self._stopped = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def wait_for(self, number: int, seconds_max: float) -> float:
        """The time of the request to create the intent of that number. Raises TimeoutError."""
        deadline = time.monotonic() + seconds_max
        while len(self.heard) <= number:
            if time.monotonic() > deadline:
                raise TimeoutError("the provider has heard nothing")
            time.sleep(0.001)
        return self.heard[number]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as server:
            self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
            self._listening.set()
            await self._stopped.wait()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(self._pass(reader, their_writer, listen=True), self._pass(their_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, listen: bool = False) -> None:
        try:
            while part := await reader.read(1 << 16):
                if listen and part.startswith(CREATE):
                    self.heard.append(time.perf_counter())
                writer.write(part)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def post_and_listen(client: httpx.Client, proxy: RecordingProxy, number: int, order: Order) -> tuple[str, float]:
    """Post the payment with that number; returns its id, and the milliseconds until the proxy hears of it."""
    headers = {"Authorization": f"Bearer {order.api_key}", "Idempotency-Key": order.idempotency_key}
    began = time.perf_counter()
    answer = client.post("/v1/payments", json=order.body, headers=headers).raise_for_status()
    return answer.json()["id"], (proxy.wait_for(number, REQUEST_SECONDS_MAX) - began) * 1000
