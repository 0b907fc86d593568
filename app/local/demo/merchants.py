"""The demo's traffic: merchants post payments, and repeat unanswered requests under the same key."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import psycopg

from app.web.keys import new_key, new_operator_key

CONNECTIONS = 32
REPEAT_SECONDS_MAX = 30.0

# Shares of the payments; the rest are cards without an exception.
UNUSUAL_TOKENS = (
    ("pm_card_visa_chargeDeclined", 0.02),
    ("pm_card_visa_chargeDeclinedInsufficientFunds", 0.03),
    ("pm_card_visa_chargeDeclinedExpiredCard", 0.01),
    ("pm_card_authenticationRequired", 0.04),
    ("pm_card_threeDSecure2Required", 0.02),
)
USUAL_TOKENS = ("pm_card_visa", "pm_card_mastercard", "pm_card_amex")
NAMES = ("Books", "Bakery", "Bikes", "Garden", "Records", "Tea", "Toys", "Wine", "Yarn", "Optics")


@dataclass(frozen=True, slots=True)
class Order:
    """One payment; its idempotency key makes every repetition the same request."""

    api_key: str
    idempotency_key: str
    body: dict[str, object]


@dataclass(slots=True)
class TrafficResult:
    """The results of the requests: acknowledged payment ids, refusals, the number of repetitions."""

    acknowledged: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    repeated: int = 0
    refused_actions: list[str] = field(default_factory=list)
    """Refused captures, cancellations, refunds and evidence."""


def create_merchants(
    conn: psycopg.Connection[tuple[object, ...]], count: int, seed: int, *, livemode: bool = False
) -> list[str]:
    """Create merchants with an API key each; returns the keys."""
    keys = []
    chance = random.Random(f"{seed} merchants")
    for number in range(count):
        name = f"{chance.choice(('Acme', 'Corner', 'Harbour', 'Old Town', 'Sunny'))} {NAMES[number % len(NAMES)]}"
        row = conn.execute("select surety.add_merchant(%s)", (f"{name} {number + 1}",)).fetchone()
        assert row is not None
        key = new_key(livemode=livemode)
        conn.execute("select surety.add_api_key(%s, %s, %s)", (row[0], key.hash, key.hint))
        keys.append(key.text)
    return keys


def create_admin(conn: psycopg.Connection[tuple[object, ...]]) -> str:
    """Create an operator; returns its personal key."""
    key = new_operator_key()
    conn.execute("select surety.add_first_admin('demo', 'demo@localhost', %s, %s, 'demo')", (key.hash, key.hint))
    return key.text


def create_orders(keys: list[str], count: int, seed: int) -> list[Order]:
    """The payments of a seed, the same each time except for the API keys."""
    chance = random.Random(f"{seed} orders")
    orders = []
    for number in range(count):
        draw, token = chance.random(), chance.choice(USUAL_TOKENS)
        for unusual, share in UNUSUAL_TOKENS:
            if (draw := draw - share) < 0:
                token = unusual
                break
        orders.append(
            Order(
                keys[number % len(keys)],
                f"demo-{seed}-{number}",
                {
                    "amount": chance.randint(100, 50_000),
                    "currency": chance.choice(("usd", "usd", "usd", "eur")),
                    "payment_method": {"type": "card", "token": token},
                    "reference": f"order-{1000 + number}",
                    "return_url": "https://shop.example/thanks",
                    "metadata": {"demo": str(seed)},
                },
            )
        )
    return orders


async def post_orders(url: str, orders: list[Order], on_acknowledged: Callable[[], None]) -> TrafficResult:
    """Post all orders, 32 at a time; `on_acknowledged` is called after each acknowledgement."""
    result = TrafficResult()
    waiting = iter(orders)
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, timeout=10, limits=limits) as client:

        async def post_remaining() -> None:
            for order in waiting:
                await post_order(client, order, result)
                on_acknowledged()

        await asyncio.gather(*(post_remaining() for _ in range(CONNECTIONS)))
    return result


async def post_order(client: httpx.AsyncClient, order: Order, result: TrafficResult) -> None:
    """Post one payment; repeat it under its key while there is no answer, or a 5xx."""
    headers = {"Authorization": f"Bearer {order.api_key}", "Idempotency-Key": order.idempotency_key}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + REPEAT_SECONDS_MAX
    while True:
        try:
            answer = await client.post("/v1/payments", json=order.body, headers=headers)
        except httpx.TransportError as error:
            problem = repr(error)
        else:
            if answer.is_success:
                result.acknowledged.append(answer.json()["id"])
                return
            problem = f"{answer.status_code} {answer.text}"
            if answer.status_code < 500:
                result.refused.append(problem)
                return
        if loop.time() > deadline:
            result.refused.append(problem)
            return
        result.repeated += 1
        await asyncio.sleep(0.2)
