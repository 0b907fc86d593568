"""Customers during the kills: a payment saves its method, others charge it without the payer, then it is removed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import httpx

from app.local.demo.payment_actions import Json
from tests.crash.retrying_client import PAUSE_SECONDS, Request, RetryingClient

CHARGES_MAX = 4
SAVED_SECONDS_MAX = 60.0
REST_SECONDS = (0.2, 1.5)
MANDATE: Json = {
    "accepted_at": "2026-11-01T12:00:00Z", "ip_address": "203.0.113.7", "user_agent": "Firefox/150", "text": "I agree."
}  # fmt: skip


class CustomerLoad:
    """One merchant's customers, one after the other."""

    def __init__(self, api_key: str, retrying_client: RetryingClient, chance: random.Random, name: str) -> None:
        self._api_key = api_key
        self._retrying_client = retrying_client
        self._chance = chance
        self._name = name
        self._requests = 0

    async def work(self, client: httpx.AsyncClient, is_over: Callable[[], bool]) -> None:
        """Lead customers through their lives until the load is over."""
        while not is_over():
            email = f"{self._name}-{self._requests}@shop.example"
            customer = await self._ask(client, "/v1/customers", {"email": email, "name": "Ada Lovelace"})
            await self._pay(
                client, customer["id"], {"token": "pm_card_visa"},
                customer_id=customer["id"], save_payment_method="off_session", mandate=MANDATE,
            )  # fmt: skip
            method = await self._until_saved(client, customer["id"], is_over)
            if method is None:
                continue
            for _ in range(self._chance.randint(1, CHARGES_MAX)):
                await self._pay(client, customer["id"], {"saved": method}, off_session=True, return_url=None)
                await asyncio.sleep(self._chance.uniform(*REST_SECONDS))
            await self._ask(client, f"/v1/customers/{customer['id']}", {"phone": "+1 555 0100"})
            if self._chance.random() < 0.7:
                path = f"/v1/customers/{customer['id']}/payment_methods/{method}"
                await self._ask(client, path, {}, method="DELETE")

    async def _pay(self, client: httpx.AsyncClient, customer: str, card: Json, **fields: object) -> None:
        """A payment of a customer."""
        body = {
            "amount": self._chance.randint(100, 20_000), "currency": "usd", "return_url": "https://shop.example/thanks",
            "payment_method": {"type": "card"} | card, "reference": f"{customer}-{self._requests}",
        } | fields  # fmt: skip
        await self._ask(client, "/v1/payments", {name: value for name, value in body.items() if value is not None})

    async def _ask(self, client: httpx.AsyncClient, path: str, body: Json, *, method: str = "POST") -> Json:
        """The document of a request that can't be refused."""
        self._requests += 1
        key = f"{self._name}-{self._requests}"
        document = await self._retrying_client.ask_for(client, Request(self._api_key, key, path, body, method=method))
        assert document is not None, f"{method} {path} was refused"
        return document

    async def _until_saved(self, client: httpx.AsyncClient, customer: str, is_over: Callable[[], bool]) -> str | None:
        """The id of the customer's saved method. None if there is none in time, or the load is over first."""
        headers = {"Authorization": f"Bearer {self._api_key}"}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SAVED_SECONDS_MAX
        while not is_over() and loop.time() < deadline:
            await asyncio.sleep(PAUSE_SECONDS * 3)
            try:
                answer = await client.get(f"/v1/customers/{customer}/payment_methods", headers=headers)
            except httpx.TransportError:
                continue
            if answer.is_success and answer.json()["data"]:
                return str(answer.json()["data"][0]["id"])
        return None
