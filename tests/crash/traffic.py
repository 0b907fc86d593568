"""Merchants' systems while things die: each order is repeated under its key until it is answered, and what was
acknowledged is on disk before anything else is done.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec

from app.demo.merchants import USUAL_TOKENS, Order, write_orders

SHOPPERS = 8
ORDERS_PER_SECOND = 10.0
ANSWER_SECONDS_MAX = 6.0
PAUSE_SECONDS = 0.1
STOP_SECONDS_MAX = 60.0
AGAIN_SHARE = 0.1
PORTION = 500


class Told(msgspec.Struct):
    """A line of the log: what a merchant was told. The answer is kept, for every repetition must bring the same."""

    id: str
    order: Order
    body: bytes


class Traffic:
    """Orders without end, from a thread of its own, until `stop`."""

    def __init__(self, url: str, api_keys: list[str], seed: int, log: Path) -> None:
        self.acknowledged: list[str] = []
        self.wrong: list[str] = []
        """Answers that should never be: refusals, and repetitions that differ from the first answer."""
        self.repeated = 0
        self.asked_again = 0
        self._url = url
        self._orders = orders_of(api_keys, seed)
        self._lot = random.Random(f"{seed} traffic")
        self._log = log.open("wb")
        self._probes = 0
        self._api_key = api_keys[0]
        self._seed = seed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take no further order; returns when all that were begun are answered."""
        self._stopping.set()
        self._thread.join(STOP_SECONDS_MAX)
        if self._thread.is_alive():
            self.wrong.append(f"orders are still unanswered after {STOP_SECONDS_MAX:.0f} s")
        if self._failure is not None:
            raise self._failure

    def probe(self, deadline: float) -> str | None:
        """A payment beside the others, from this thread; its id, or None if it was not taken in time."""
        self._probes += 1
        order = Order(
            self._api_key,
            f"probe-{self._seed}-{self._probes}",
            {"amount": 5000, "currency": "usd", "payment_method": {"type": "card", "token": USUAL_TOKENS[0]}},
        )
        while time.monotonic() < deadline:
            try:
                answer = httpx.post(
                    f"{self._url}/v1/payments", json=order.body, headers=headers_of(order), timeout=ANSWER_SECONDS_MAX
                )
            except httpx.TransportError:
                time.sleep(PAUSE_SECONDS)
                continue
            if answer.is_success:
                return self._write_down(order, answer.content).id
            time.sleep(PAUSE_SECONDS)
        return None

    async def _run(self) -> None:
        try:
            limits = httpx.Limits(max_connections=SHOPPERS, max_keepalive_connections=SHOPPERS)
            async with httpx.AsyncClient(base_url=self._url, timeout=ANSWER_SECONDS_MAX, limits=limits) as client:
                await asyncio.gather(*(self._shop(client) for _ in range(SHOPPERS)))
        except BaseException as error:  # noqa: BLE001  # told to the main thread, which raises it
            self._failure = error

    async def _shop(self, client: httpx.AsyncClient) -> None:
        for order in self._orders:
            await self._order(client, order)
            if self._stopping.is_set():
                return
            await asyncio.sleep(self._lot.uniform(0, 2 * SHOPPERS / ORDERS_PER_SECOND))

    async def _order(self, client: httpx.AsyncClient, order: Order) -> None:
        answer = await self._answer(client, order)
        if answer.status_code >= 400:
            self.wrong.append(f"{order.idempotency_key}: {answer.status_code} {answer.text}")
            return
        told = self._write_down(order, answer.content)
        if self._lot.random() < AGAIN_SHARE:
            again = await self._answer(client, order)
            self.asked_again += 1
            if again.content != told.body:
                self.wrong.append(f"{order.idempotency_key}: {again.status_code} {again.text}, not {told.body!r}")

    async def _answer(self, client: httpx.AsyncClient, order: Order) -> httpx.Response:
        """The first answer that tells how it ended."""
        while True:
            try:
                answer = await client.post("/v1/payments", json=order.body, headers=headers_of(order))
            except httpx.TransportError:
                pass
            else:
                if answer.status_code < 500:
                    return answer
                if answer.status_code != 503:
                    self.wrong.append(f"{order.idempotency_key}: {answer.status_code} {answer.text}")
            self.repeated += 1
            await asyncio.sleep(PAUSE_SECONDS)

    def _write_down(self, order: Order, body: bytes) -> Told:
        told = Told(msgspec.json.decode(body)["id"], order, body)
        self._log.write(msgspec.json.encode(told) + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        self.acknowledged.append(told.id)
        return told


def headers_of(order: Order) -> dict[str, str]:
    """Who orders, under which key."""
    return {"Authorization": f"Bearer {order.api_key}", "Idempotency-Key": order.idempotency_key}


def orders_of(api_keys: list[str], seed: int) -> Iterator[Order]:
    """Orders as in the demo, portion by portion, without end."""
    portion = 0
    while True:
        for order in write_orders(api_keys, PORTION, seed * 100_000 + portion):
            yield Order(order.api_key, order.idempotency_key, {**order.body, "reference": order.idempotency_key})
        portion += 1
