"""What Stripe doesn't have: the sandbox asked about its memory, its clock moved, its faults chosen."""

from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from msgspec import Struct

from app.sandbox import intents
from app.sandbox.errors import StripeError, invalid
from app.sandbox.faults import PROFILES, Faults, FaultSettings, Profile
from app.sandbox.memory import Record, encode
from app.sandbox.parameters import CreateIntent, decode_pairs
from app.sandbox.settings import PLATFORM
from app.sandbox.world import World

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CHUNK_RECORDS = 500


class Advance(Struct, forbid_unknown_fields=True):
    advance: float
    """Seconds to move the sandbox's clock on by."""


class ForeignCharge(Struct, forbid_unknown_fields=True):
    amount: int = 1234
    currency: str = "usd"
    account: str = PLATFORM
    metadata: dict[str, str] = {}


async def answer(world: World, method: str, path: str, query: str, body: str, send: Send) -> None:
    """Answer `/sandbox/…`."""
    asked = dict(decode_pairs(query))
    try:
        match method, path:
            case "GET", "/sandbox/health":
                told: Any = {"status": "ok", "now": world.memory.now()}
            case "GET", "/sandbox/charges":
                await _stream_charges(world, send)
                return
            case "GET", "/sandbox/charges/summary":
                told = summary(world, asked.get("metadata_key", ""))
            case "GET", "/sandbox/webhooks":
                told = webhooks(world)
            case "GET", "/sandbox/faults":
                told = injected(world)
            case "POST", "/sandbox/faults":
                told = choose(world, msgspec.json.decode(body, type=FaultSettings))
            case "POST", "/sandbox/clock":
                world.memory.advance(msgspec.json.decode(body, type=Advance).advance)
                world.agenda_changed.set()
                told = {"now": world.memory.now()}
            case "POST", "/sandbox/foreign-charge":
                told = charge_foreign(world, msgspec.json.decode(body or "{}", type=ForeignCharge))
            case _:
                raise StripeError(404, f"Unrecognized request URL ({method}: {path}).")
    except msgspec.DecodeError as refusal:
        raise invalid(str(refusal)) from None
    await _start(send)
    await send({"type": "http.response.body", "body": encode(told)})


def succeeded(record: Record) -> bool:
    """Whether money was taken: a charge that was only authorized, or failed, took none."""
    return bool(record.body["status"] == "succeeded" and record.body["captured"])


def summary(world: World, metadata_key: str) -> dict[str, Any]:
    """How many charges succeeded, for how many payments, and which payments were charged more than once.

    A payment is what the metadata key names on the charge; charges without it count as charges only.
    """
    payments: Counter[str] = Counter()
    charges = 0
    for record in world.memory.every("charge"):
        if succeeded(record):
            charges += 1
            if payment := record.body["metadata"].get(metadata_key):
                payments[payment] += 1
    double = sorted(payment for payment, times in payments.items() if times > 1)
    return {"charges": charges, "payments": len(payments), "double": double}


def webhooks(world: World) -> dict[str, int]:
    """How deliveries went. `sent` counts events that were to be delivered, `delivered` those answers that were 2xx."""
    counted = dict.fromkeys(
        ("sent", "deliveries", "delivered", "refused", "given_up", "lost", "repeated", "extra_deliveries")
        + ("reordered", "overtaken", "delayed", "forged"),
        0,
    )
    counted.update(world.memory.tallies("webhooks:"))
    counted["pending"] = sum(plan.what.startswith("deliver") for plan in world.memory.plans())
    return counted


def injected(world: World) -> dict[str, Any]:
    """What went wrong on purpose, by operation and fault, and how often the request had its effect all the same."""
    effects = world.memory.tallies("effects:")
    rows = []
    for name, count in world.memory.tallies("faults:").items():
        operation, fault = name.split(":")
        rows.append({"operation": operation, "fault": fault, "count": count, "took_effect": effects.get(name, 0)})
    timeouts = [row for row in rows if row["fault"].startswith("timeout")]
    return {
        "profile": world.faults.profile,
        "next": world.faults.orders,
        "injected": rows,
        "timeouts": {
            "count": sum(row["count"] for row in timeouts),
            "took_effect": sum(row["took_effect"] for row in timeouts),
        },
    }


def choose(world: World, given: FaultSettings) -> dict[str, Any]:
    """Replace the profile, the ordered faults, or both."""
    faults: Faults = world.faults
    if not isinstance(given.profile, msgspec.UnsetType):
        faults.profile = given.profile if isinstance(given.profile, Profile) else PROFILES[given.profile]
    if not isinstance(given.next, msgspec.UnsetType):
        faults.orders = given.next
    if not isinstance(given.hang_seconds, msgspec.UnsetType):
        world.settings.hang_seconds = given.hang_seconds
    if not isinstance(given.slow_seconds, msgspec.UnsetType):
        world.settings.slow_seconds = given.slow_seconds
    return injected(world)


def charge_foreign(world: World, given: ForeignCharge) -> dict[str, Any]:
    """A charge that another system made on the same account."""
    intent = intents.create(
        world,
        given.account,
        CreateIntent(
            amount=given.amount,
            currency=given.currency,
            payment_method="pm_card_visa",
            payment_method_types=["card"],
            metadata=given.metadata,
            confirm=True,
        ),
    )
    world.commit()
    return {"payment_intent": intent.id, "charge": intent.body["latest_charge"]}


async def _stream_charges(world: World, send: Send) -> None:
    """Every successful charge of every account, oldest first, as one JSON array."""
    await _start(send)
    chunk, separator = [], b"["
    for record in world.memory.every("charge"):
        if not succeeded(record):
            continue
        body = record.body
        told = {
            "payment_intent": body["payment_intent"],
            "charge": record.id,
            "amount": body["amount_captured"],
            "currency": body["currency"],
            "metadata": body["metadata"],
            "account": record.account,
        }
        chunk.append(separator + encode(told))
        separator = b","
        if len(chunk) == CHUNK_RECORDS:
            await send({"type": "http.response.body", "body": b"".join(chunk), "more_body": True})
            chunk.clear()
    ending = b"]" if separator == b"," else b"[]"
    await send({"type": "http.response.body", "body": b"".join(chunk) + ending})


async def _start(send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
