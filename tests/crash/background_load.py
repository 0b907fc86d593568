"""Merchants' requests during the kills: payments without end, some of which continue with a scenario."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from app.local.demo.merchants import USUAL_TOKENS, create_orders
from app.local.demo.payment_actions import Json
from tests.crash.customers import CustomerLoad
from tests.crash.limits import LIMITED_MERCHANT, REVIEWED_PAYER, REVIEWED_SHARE, decide_holds
from tests.crash.retrying_client import ANSWER_SECONDS_MAX, PAUSE_SECONDS, Request, RetryingClient
from tests.crash.scenarios import Scenario, ScenarioRunner, draw_scenario

PAYERS = 24
CONNECTIONS_MAX = 32
# At most: a payer starts no further payment before the last was answered, so the load adapts to the machine.
ORDERS_PER_SECOND = 6.0
STOP_SECONDS_MAX = 60.0
ORDERS_PER_BATCH = 500
CUSTOMER_MERCHANTS = 3


class BackgroundLoad:
    """Sends payments from a thread of its own until `stop`."""

    def __init__(self, url: str, api_keys: list[str], operator_key: str, seed: int, log: Path) -> None:
        self.client = RetryingClient(log, random.Random(f"{seed} client"))
        self._url = url
        self._payments = draw_payments(api_keys, seed)
        self._runners = {api_key: ScenarioRunner(api_key, self.client) for api_key in api_keys}
        self._chance = random.Random(f"{seed} load")
        self._probes = 0
        self._api_key = api_keys[0]
        self._limited_key = api_keys[LIMITED_MERCHANT]
        self._operator_key = operator_key
        self._customers = [
            CustomerLoad(api_key, self.client, random.Random(f"{seed} {number} customers"), f"payer-{seed}-{number}")
            for number, api_key in enumerate(api_keys[-CUSTOMER_MERCHANTS:])
        ]
        self._seed = seed
        self._closing = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Start no further payment. Scenarios that have begun continue."""
        self._closing.set()

    @property
    def is_busy(self) -> bool:
        """Whether a request is unanswered or a scenario unfinished."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Return when all requests and scenarios have ended."""
        self.close()
        self._thread.join(STOP_SECONDS_MAX)
        if self._thread.is_alive():
            left = [line for runner in self._runners.values() for line in runner.left()]
            self.client.wrong_answers.append(f"after {STOP_SECONDS_MAX:.0f} s unanswered or unfinished: {left}")
        if self._failure is not None:
            raise self._failure

    def create_probe(self) -> Request:
        """A payment beside the load."""
        self._probes += 1
        card = {"type": "card", "token": USUAL_TOKENS[0]}
        body: Json = {"amount": 5000, "currency": "usd", "payment_method": card, "off_session": True}
        return Request(self._api_key, f"probe-{self._seed}-{self._probes}", "/v1/payments", body)

    def probe(self, request: Request) -> str | None:
        """Send the request once from this thread; returns the payment's id, or None if it was not accepted."""
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
                no_more_payments = asyncio.Event()
                runners = asyncio.gather(*(runner.work(client, no_more_payments) for runner in self._runners.values()))
                chance = random.Random(f"{self._seed} decisions")
                over = no_more_payments.is_set
                operator = asyncio.create_task(decide_holds(client, self._operator_key, self.client, chance, over))
                await asyncio.gather(
                    *(self._run_payer(client) for _ in range(PAYERS)),
                    *(customers.work(client, self._closing.is_set) for customers in self._customers),
                )
                no_more_payments.set()
                await asyncio.gather(runners, operator)
        except BaseException as error:  # noqa: BLE001  # raised in the main thread
            self._failure = error

    async def _run_payer(self, client: httpx.AsyncClient) -> None:
        for order, scenario in self._payments:
            runner, reference = self._runners[order.api_key], str(order.body["reference"])
            # Before the request: the payment's first event may be read before its answer.
            runner.expect(reference, scenario)
            may_be_refused = order.api_key == self._limited_key
            if not await self.client.ask(client, order, may_be_refused=may_be_refused):
                runner.forget(reference)
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if not await self._is_served(runner, reference):
                return
            await asyncio.sleep(self._chance.uniform(0, 2 * PAYERS / ORDERS_PER_SECOND))

    async def _is_served(self, runner: ScenarioRunner, reference: str) -> bool:
        """Whether the event feed shows the provider's answer to a payment. False if the load is closed first."""
        while not self._closing.is_set():
            if reference not in runner.under_way:
                return True
            await asyncio.sleep(PAUSE_SECONDS)
        return False


def draw_payments(api_keys: list[str], seed: int) -> Iterator[tuple[Request, Scenario]]:
    """Payments as in the demo, in batches without end, each with its scenario."""
    chance = random.Random(f"{seed} scenarios")
    batch = 0
    while True:
        for order in create_orders(api_keys, ORDERS_PER_BATCH, seed * 100_000 + batch):
            scenario, special = draw_scenario(chance)
            reviewed = REVIEWED_PAYER if chance.random() < REVIEWED_SHARE else {}
            body = {**order.body, "reference": order.idempotency_key, **special, **reviewed}
            yield Request(order.api_key, order.idempotency_key, "/v1/payments", body), scenario
        batch += 1
