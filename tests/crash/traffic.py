"""Merchants' systems while things die: orders without end, and for some of the payments a story that goes on."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from app.local.demo.merchants import USUAL_TOKENS, write_orders
from app.local.demo.payment_actions import Json
from tests.crash.aftersales import Clerk, Story, choose_story
from tests.crash.correspondence import ANSWER_SECONDS_MAX, PAUSE_SECONDS, Correspondence, Request

SHOPPERS = 24
CONNECTIONS_MAX = 32
# At most, for a shopper orders nothing more while his payment is under way: so the load is what the machine can bear.
ORDERS_PER_SECOND = 6.0
STOP_SECONDS_MAX = 60.0
PORTION = 500


class Traffic:
    """From a thread of its own, until `stop`."""

    def __init__(self, url: str, api_keys: list[str], seed: int, log: Path) -> None:
        self.told = Correspondence(log, random.Random(f"{seed} correspondence"))
        self._url = url
        self._orders = orders_of(api_keys, seed)
        self._clerks = {api_key: Clerk(api_key, self.told) for api_key in api_keys}
        self._lot = random.Random(f"{seed} traffic")
        self._probes = 0
        self._api_key = api_keys[0]
        self._seed = seed
        self._closing = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Take no further order; what was begun goes on."""
        self._closing.set()

    @property
    def is_busy(self) -> bool:
        """Whether something is unanswered, or a story not at its end."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Returns when all that was begun is at its end."""
        self.close()
        self._thread.join(STOP_SECONDS_MAX)
        if self._thread.is_alive():
            left = [line for clerk in self._clerks.values() for line in clerk.left()]
            self.told.wrong.append(f"after {STOP_SECONDS_MAX:.0f} s something is unanswered or waits: {left}")
        if self._failure is not None:
            raise self._failure

    def write_probe(self) -> Request:
        """An order beside the others."""
        self._probes += 1
        card = {"type": "card", "token": USUAL_TOKENS[0]}
        body: Json = {"amount": 5000, "currency": "usd", "payment_method": card}
        return Request(self._api_key, f"probe-{self._seed}-{self._probes}", "/v1/payments", body)

    def probe(self, request: Request) -> str | None:
        """Ask once, from this thread; the payment's id, or None if it was not taken."""
        try:
            answer = httpx.post(
                f"{self._url}{request.path}", json=request.body, headers=request.headers, timeout=ANSWER_SECONDS_MAX
            )
        except httpx.TransportError:
            return None
        return self.told.write_down(request, answer).id if answer.is_success else None

    async def _run(self) -> None:
        try:
            limits = httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX)
            async with httpx.AsyncClient(base_url=self._url, timeout=ANSWER_SECONDS_MAX, limits=limits) as client:
                is_sold_out = asyncio.Event()
                clerks = asyncio.gather(*(clerk.work(client, is_sold_out) for clerk in self._clerks.values()))
                await asyncio.gather(*(self._shop(client) for _ in range(SHOPPERS)))
                is_sold_out.set()
                await clerks
        except BaseException as error:  # noqa: BLE001  # told to the main thread, which raises it
            self._failure = error

    async def _shop(self, client: httpx.AsyncClient) -> None:
        for order, story in self._orders:
            clerk, reference = self._clerks[order.api_key], str(order.body["reference"])
            # Before it is asked for: its first event may be read before its answer is.
            clerk.expect(reference, story)
            await self.told.ask(client, order)
            if not await self._is_served(clerk, reference):
                return
            await asyncio.sleep(self._lot.uniform(0, 2 * SHOPPERS / ORDERS_PER_SECOND))

    async def _is_served(self, clerk: Clerk, reference: str) -> bool:
        """Whether the provider has answered about a payment, as the feed tells; False if the shop closes first."""
        while not self._closing.is_set():
            if reference not in clerk.under_way:
                return True
            await asyncio.sleep(PAUSE_SECONDS)
        return False


def orders_of(api_keys: list[str], seed: int) -> Iterator[tuple[Request, Story]]:
    """Orders as in the demo, portion by portion, without end, each with what its merchant will do about it."""
    lot = random.Random(f"{seed} stories")
    portion = 0
    while True:
        for order in write_orders(api_keys, PORTION, seed * 100_000 + portion):
            story, special = choose_story(lot)
            body = {**order.body, "reference": order.idempotency_key, **special}
            yield Request(order.api_key, order.idempotency_key, "/v1/payments", body), story
        portion += 1
