"""Merchants' systems while things die: orders without end, and for some of the payments a story that goes on."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from app.local.demo.merchants import USUAL_TOKENS, create_orders
from app.local.demo.payment_actions import Json
from tests.crash.retrying_client import ANSWER_SECONDS_MAX, PAUSE_SECONDS, Request, RetryingClient
from tests.crash.scenarios import Scenario, ScenarioRunner, draw_scenario

PAYERS = 24
CONNECTIONS_MAX = 32
# At most: a shopper orders nothing more while a payment is under way, so the load fits the machine.
ORDERS_PER_SECOND = 6.0
STOP_SECONDS_MAX = 60.0
ORDERS_PER_BATCH = 500


class BackgroundLoad:
    """From a thread of its own, until `stop`."""

    def __init__(self, url: str, api_keys: list[str], seed: int, log: Path) -> None:
        self.client = RetryingClient(log, random.Random(f"{seed} correspondence"))
        self._url = url
        self._orders = draw_orders(api_keys, seed)
        self._runners = {api_key: ScenarioRunner(api_key, self.client) for api_key in api_keys}
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
            left = [line for runner in self._runners.values() for line in runner.left()]
            self.client.wrong_answers.append(f"after {STOP_SECONDS_MAX:.0f} s something is unanswered or waits: {left}")
        if self._failure is not None:
            raise self._failure

    def create_probe(self) -> Request:
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
        return self.client.log_answer(request, answer).id if answer.is_success else None

    async def _run(self) -> None:
        try:
            limits = httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX)
            async with httpx.AsyncClient(base_url=self._url, timeout=ANSWER_SECONDS_MAX, limits=limits) as client:
                no_more_orders = asyncio.Event()
                runners = asyncio.gather(*(runner.work(client, no_more_orders) for runner in self._runners.values()))
                await asyncio.gather(*(self._run_payer(client) for _ in range(PAYERS)))
                no_more_orders.set()
                await runners
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self._failure = error

    async def _run_payer(self, client: httpx.AsyncClient) -> None:
        for order, story in self._orders:
            runner, reference = self._runners[order.api_key], str(order.body["reference"])
            # Before it is asked for: its first event may be read before its answer is.
            runner.expect(reference, story)
            await self.client.ask(client, order)
            if not await self._is_served(runner, reference):
                return
            await asyncio.sleep(self._lot.uniform(0, 2 * PAYERS / ORDERS_PER_SECOND))

    async def _is_served(self, runner: ScenarioRunner, reference: str) -> bool:
        """Whether the provider has answered about a payment, by the feed; False if the shop closes first."""
        while not self._closing.is_set():
            if reference not in runner.under_way:
                return True
            await asyncio.sleep(PAUSE_SECONDS)
        return False


def draw_orders(api_keys: list[str], seed: int) -> Iterator[tuple[Request, Scenario]]:
    """Orders as in the demo, portion by portion, without end, each with what its merchant will do about it."""
    lot = random.Random(f"{seed} stories")
    portion = 0
    while True:
        for order in create_orders(api_keys, ORDERS_PER_BATCH, seed * 100_000 + portion):
            story, special = draw_scenario(lot)
            body = {**order.body, "reference": order.idempotency_key, **special}
            yield Request(order.api_key, order.idempotency_key, "/v1/payments", body), story
        portion += 1
