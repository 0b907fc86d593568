"""Limits and holds during the kills: a limited merchant, reviewed payers, and an operator who decides."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable

import httpx

from app.local.demo.checks import query_count
from app.local.demo.payment_actions import Json
from tests.crash.processes import Connection
from tests.crash.retrying_client import RetryingClient

LIMITED_MERCHANT = 1
REVIEWED_SHARE = 0.06
REVIEWED_PAYER: Json = {"customer": {"email": "Reviewed@shop.example"}}
"""Each of its payments is put on hold."""
DECISIONS = {"release": "released", "refuse": "refused"}
DECIDE_SECONDS = 0.5


def set_limits(conn: Connection, api_keys: list[str], payments_max: int) -> None:
    """Limit one merchant's payments of the day in usd, and put all payments of payers with an address on hold."""
    key_hash = hashlib.sha256(api_keys[LIMITED_MERCHANT].encode()).digest()
    conn.execute(
        "select surety.set_money_limit(k.merchant_id, 'usd', %s, null, 'crash') from surety.api_keys as k"
        " where k.hash = %s",
        (payments_max, key_hash),
    )
    conn.execute("select surety.add_velocity_rule(null, 'email', '1 hour', 0, null, null, 'hold', 'crash')")


async def decide_holds(
    client: httpx.AsyncClient,
    operator_key: str,
    retrying_client: RetryingClient,
    chance: random.Random,
    is_over: Callable[[], bool],
) -> None:
    """Release or refuse payments on hold until no payment can come and none is left."""
    headers = {"Authorization": f"Bearer {operator_key}"}
    while True:
        was_over = is_over()
        await asyncio.sleep(DECIDE_SECONDS)
        try:
            page = await client.get("/v1/operator/holds?status=open&limit=100", headers=headers)
            if not page.is_success:
                continue
            if was_over and not page.json()["data"]:
                return
            for hold in page.json()["data"]:
                decision = chance.choice(("release", "release", "refuse"))
                answer = await client.post(
                    f"/v1/operator/holds/{hold['id']}/{decision}", headers=headers, json={"reason": "a crash run"}
                )
                if answer.is_success and answer.json()["outcome"] == DECISIONS[decision]:
                    retrying_client.decisions[hold["id"]] = DECISIONS[decision]
        except httpx.TransportError:
            continue


def count_broken_limits(conn: Connection, decisions: dict[str, str]) -> dict[str, int]:
    """Days with more payments than their limit, and acknowledged decisions that do not stand."""
    return {
        "a day has no more payments than its limit": query_count(
            conn,
            """
            select count(*) from (
                select from surety.payments as p
                join surety.money_limits as l on l.merchant_id = p.merchant_id and l.currency = p.currency
                group by p.merchant_id, p.currency, (p.created_at at time zone 'UTC')::date
                having count(*) > min(l.count_max)
            ) as broken
            """,
        ),
        "an acknowledged decision stands": query_count(
            conn,
            "select count(*) from unnest(%s::text[], %s::text[]) as made (id, outcome) where not exists"
            " (select from surety.payment_holds as h where h.payment_id = made.id and h.outcome = made.outcome)",
            list(decisions),
            list(decisions.values()),
        ),
    }
