"""What Stripe doesn't have: the sandbox asked about its memory, its clock moved, its faults chosen."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from app.sandbox import intents, outside
from app.sandbox.errors import StripeError, invalid_request
from app.sandbox.faults import PROFILES, WEBHOOK_FAULTS, FaultInjector, FaultProfile, FaultSettings
from app.sandbox.memory import StoredObject, encode
from app.sandbox.parameters import AutomaticMethods, CreateIntent, decode_pairs
from app.sandbox.settings import PLATFORM_ACCOUNT
from app.sandbox.wire import ClientConnection, json_response
from app.sandbox.world import World

CHUNK_RECORDS = 500
DELIVERY_TALLIES = (
    *("sent", "deliveries", "delivered", "refused", "given_up", "overtaken", "extra_deliveries"),
    *WEBHOOK_FAULTS,
)


class Advance(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/clock`."""

    advance: float
    """Seconds to move the sandbox's clock on by."""


class ForeignCharge(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/foreign-charge`."""

    amount: int = 1234
    currency: str = "usd"
    account: str = PLATFORM_ACCOUNT
    metadata: dict[str, str] = {}


async def handle_request(
    world: World, connection: ClientConnection, method: str, path: str, query: str, body: str
) -> None:
    """Answer `/sandbox/…`."""
    what, _, id = path.removeprefix("/sandbox/").partition("/")
    if method == "GET" and path == "/sandbox/charges":
        await connection.send_chunks(_charges(world))
    elif method == "GET" and path.removeprefix("/sandbox/") in CONTROL_QUERIES:
        result = CONTROL_QUERIES[path.removeprefix("/sandbox/")](world, dict(decode_pairs(query)))
        await connection.send(json_response(result))
    elif method == "POST" and (demand := CONTROL_ACTIONS.get(f"{what}/{{id}}" if id else what)):
        try:
            given = msgspec.json.decode(body or "{}", type=demand.body)
        except msgspec.DecodeError as refusal:
            raise invalid_request(str(refusal)) from None
        result = demand.run(world, id, given) if id else demand.run(world, given)
        world.commit()
        await connection.send(json_response(result))
    else:
        raise StripeError(404, f"Unrecognized request URL ({method}: {path}).")


def took_money(record: StoredObject) -> bool:
    """Whether money was taken: a charge that was only authorized, or failed, took none."""
    return bool(record.body["status"] == "succeeded" and record.body["captured"])


def charges_summary(world: World, metadata_key: str) -> dict[str, Any]:
    """How many charges succeeded, for how many payments, and which payments were charged more than once.

    A payment is what the metadata key names on the charge; charges without it count as charges only.
    """
    payments: Counter[str] = Counter()
    charges = 0
    for record in world.memory.all_of_kind("charge"):
        if took_money(record):
            charges += 1
            if payment := record.body["metadata"].get(metadata_key):
                payments[payment] += 1
    double = sorted(payment for payment, times in payments.items() if times > 1)
    return {"charges": charges, "payments": len(payments), "double": double}


def webhook_counts(world: World) -> dict[str, int]:
    """How deliveries went. `sent` counts events that were to be delivered, `delivered` those answers that were 2xx."""
    counted = dict.fromkeys(DELIVERY_TALLIES, 0)
    counted.update(world.memory.tallies("webhooks:"))
    counted["pending"] = sum(plan.what.startswith("deliver") for plan in world.memory.plans())
    return counted


def injected_faults(world: World) -> dict[str, Any]:
    """What went wrong on purpose, by operation and fault, and how often the request had its effect all the same."""
    effects = world.memory.tallies("effects:")
    rows: list[dict[str, Any]] = []
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


def set_faults(world: World, given: FaultSettings) -> dict[str, Any]:
    """Replace the profile, the ordered faults, or both."""
    faults: FaultInjector = world.faults
    if not isinstance(given.profile, msgspec.UnsetType):
        faults.profile = given.profile if isinstance(given.profile, FaultProfile) else PROFILES[given.profile]
    if not isinstance(given.next, msgspec.UnsetType):
        faults.orders = given.next
    if not isinstance(given.hang_seconds, msgspec.UnsetType):
        world.settings.hang_seconds = given.hang_seconds
    if not isinstance(given.slow_seconds, msgspec.UnsetType):
        world.settings.slow_seconds = given.slow_seconds
    return injected_faults(world)


def create_foreign_charge(world: World, given: ForeignCharge) -> dict[str, Any]:
    """A charge that another system made on the same account."""
    intent = intents.create(
        world,
        given.account,
        CreateIntent(
            amount=given.amount,
            currency=given.currency,
            payment_method="pm_card_visa",
            automatic_payment_methods=AutomaticMethods(enabled=True, allow_redirects="never"),
            metadata=given.metadata,
            confirm=True,
        ),
    )
    return {"payment_intent": intent.id, "charge": intent.body["latest_charge"]}


def health(world: World) -> dict[str, Any]:
    """That it lives, and its time in Unix seconds."""
    return {"status": "ok", "now": world.memory.now()}


def advance_clock(world: World, given: Advance) -> dict[str, Any]:
    """Move the clock on; what became due happens at once."""
    world.memory.advance(given.advance)
    world.agenda_changed.set()
    return {"now": world.memory.now()}


def _charges(world: World) -> Iterator[bytes]:
    """Every successful charge of every account, oldest first, as one JSON array in chunks."""
    chunk, separator = [], b"["
    for record in world.memory.all_of_kind("charge"):
        if not took_money(record):
            continue
        body = record.body
        result = {
            "payment_intent": body["payment_intent"],
            "charge": record.id,
            "amount": body["amount_captured"],
            "currency": body["currency"],
            "metadata": body["metadata"],
            "account": record.account,
        }
        chunk.append(separator + encode(result))
        separator = b","
        if len(chunk) == CHUNK_RECORDS:
            yield b"".join(chunk)
            chunk.clear()
    yield b"".join(chunk) + (b"]" if separator == b"," else b"[]")


CONTROL_QUERIES: dict[str, Callable[[World, dict[str, str]], Any]] = {
    "health": lambda world, _: health(world),
    "charges/summary": lambda world, asked: charges_summary(world, asked.get("metadata_key", "")),
    "refunds": lambda world, _: outside.list_with_metadata(world, "refund"),
    "refunds/summary": lambda world, asked: outside.refunds_summary(world, asked.get("metadata_key", "")),
    "disputes": lambda world, _: outside.list_with_metadata(world, "dispute"),
    "webhooks": lambda world, _: webhook_counts(world),
    "faults": lambda world, _: injected_faults(world),
}


class ControlRoute(Struct, frozen=True):
    """What a POST is about: its body, and what is done, with an id where the path has one."""

    body: type[Struct]
    run: Callable[..., dict[str, Any]]


CONTROL_ACTIONS = {
    "faults": ControlRoute(FaultSettings, set_faults),
    "clock": ControlRoute(Advance, advance_clock),
    "foreign-charge": ControlRoute(ForeignCharge, create_foreign_charge),
    "refunds": ControlRoute(outside.DashboardRefund, outside.refund_charge),
    "refunds/{id}": ControlRoute(outside.RefundOutcome, outside.decide_refund),
    "disputes": ControlRoute(outside.CardholderDispute, outside.dispute_charge),
    "disputes/{id}": ControlRoute(outside.BankDecision, outside.decide_dispute),
    "fraud-warnings": ControlRoute(outside.ChargeReference, outside.warn_of_fraud),
}
