"""A merchant's client for many payments at once, which costs little beside the service that it measures."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from itertools import chain
from typing import LiteralString

from app.local.demo.merchants import Order
from tests.bench.databases import Connection
from tests.bench.load import exchange

CONNECTIONS = 32
SECONDS_MAX = 60.0
SECONDS_PER_PAYMENT_MAX = 0.2
REPEAT_SECONDS_MAX = 30.0
REPEAT_PAUSE_SECONDS = 0.2
LOOK_SECONDS = 0.05
LOOKED_AT = 20


def create_orders(keys: Sequence[str], count: int, run: str) -> list[Order]:
    """Payments by cards that work."""
    return [
        Order(
            keys[number % len(keys)],
            f"bench-{run}-{number}",
            {
                "amount": 1000 + number,
                "currency": "usd",
                "payment_method": {"type": "card", "token": "pm_card_visa"},
                "return_url": "https://shop.example/return",
                "reference": f"bench-{run}-{number}",
            },
        )
        for number in range(count)
    ]


def encode_request(order: Order) -> bytes:
    """The bytes of POST /v1/payments."""
    body = json.dumps(order.body)
    head = (
        "POST /v1/payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {order.api_key}\r\nIdempotency-Key: {order.idempotency_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


async def post_orders(port: int, orders: Sequence[Order], per_second: float = math.inf) -> list[str]:
    """Post all orders, up to 32 at a time, at a rate; returns the ids of the payments in their order."""
    waiting = iter(enumerate(orders))
    began = time.monotonic()

    async def post_remaining() -> list[str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ids = []
        for number, order in waiting:
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            ids.append(await post_order(reader, writer, order))
        writer.close()
        return ids

    shares = await asyncio.gather(*(post_remaining() for _ in range(min(CONNECTIONS, len(orders)))))
    return sorted(chain.from_iterable(shares))


async def post_order(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: Order) -> str:
    """Post one payment, again while the answer is a 5xx; returns its id."""
    deadline = time.monotonic() + REPEAT_SECONDS_MAX
    while True:
        status, body = await exchange(reader, writer, encode_request(order))
        if status == 201:
            return str(json.loads(body)["id"])
        assert status >= 500, body
        assert time.monotonic() < deadline, body
        await asyncio.sleep(REPEAT_PAUSE_SECONDS)


def wait_until_settled(conn: Connection, payment_ids: Sequence[str], settled_query: LiteralString) -> int:
    """Wait until all payments are settled; returns how many queries it took.

    A query looks up the first few that are missing, so that waiting costs the server little.
    """
    deadline = time.monotonic() + SECONDS_MAX + SECONDS_PER_PAYMENT_MAX * len(payment_ids)
    missing = list(reversed(payment_ids))
    queries = 0
    while missing:
        first = missing[-LOOKED_AT:]
        settled = {row[0] for row in conn.execute(settled_query, (first,))}
        missing[-LOOKED_AT:] = [payment_id for payment_id in first if payment_id not in settled]
        queries += 1
        assert time.monotonic() < deadline, f"{len(missing)} payments are not settled"
        if len(settled) < len(first):
            time.sleep(LOOK_SECONDS)
    return queries
