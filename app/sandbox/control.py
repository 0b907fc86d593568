"""The control API, `/sandbox/…`: queries of the sandbox's memory, its clock, its faults, actions of others."""

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from app.sandbox.connections import AnswerByTask, SandboxResponse, json_response
from app.sandbox.faults import PROFILES, WEBHOOK_FAULTS, FaultInjector, FaultProfile, FaultSettings
from app.sandbox.state import Sandbox
from app.sandbox.stripe import control as stripe_control
from app.sandbox.stripe import permissions
from app.sandbox.stripe.errors import StripeError, invalid_request
from app.sandbox.stripe.parameters import decode_pairs

DELIVERY_TALLIES = (
    *("sent", "deliveries", "delivered", "refused", "given_up", "overtaken", "extra_deliveries"),
    *WEBHOOK_FAULTS,
)


class Advance(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/clock`."""

    advance: float
    """Seconds."""


def handle_request(sandbox: Sandbox, method: str, path: str, query: str, body: str) -> SandboxResponse | AnswerByTask:
    """The answer to `/sandbox/…`, or the function that sends it."""
    what, _, id = path.removeprefix("/sandbox/").partition("/")
    if method == "GET" and path == "/sandbox/charges":
        return lambda connection: connection.send_chunks(stripe_control.stream_charges(sandbox))
    if method == "GET" and path.removeprefix("/sandbox/") in CONTROL_QUERIES:
        return json_response(CONTROL_QUERIES[path.removeprefix("/sandbox/")](sandbox, dict(decode_pairs(query))))
    if method == "POST" and (route := CONTROL_ACTIONS.get(f"{what}/{{id}}" if id else what)):
        try:
            given = msgspec.json.decode(body or "{}", type=route.body)
        except msgspec.DecodeError as refusal:
            raise invalid_request(str(refusal)) from None
        result = route.run(sandbox, id, given) if id else route.run(sandbox, given)
        sandbox.commit()
        return json_response(result)
    raise StripeError(404, f"Unrecognized request URL ({method}: {path}).")


def webhook_counts(sandbox: Sandbox) -> dict[str, int]:
    """Counts of deliveries. `sent` counts events to be delivered, `delivered` counts answers with 2xx."""
    counted = dict.fromkeys(DELIVERY_TALLIES, 0)
    counted.update(sandbox.memory.tallies("webhooks:"))
    counted["pending"] = sum(action.what.startswith("deliver") for action in sandbox.memory.scheduled_actions())
    return counted


def injected_faults(sandbox: Sandbox) -> dict[str, Any]:
    """Injected faults by operation and fault, with the number of requests that took effect all the same."""
    effects = sandbox.memory.tallies("effects:")
    rows: list[dict[str, Any]] = []
    for name, count in sandbox.memory.tallies("faults:").items():
        operation, fault = name.split(":")
        rows.append({"operation": operation, "fault": fault, "count": count, "took_effect": effects.get(name, 0)})
    timeouts = [row for row in rows if row["fault"].startswith("timeout")]
    return {
        "profile": sandbox.faults.profile,
        "next": sandbox.faults.orders,
        "injected": rows,
        "timeouts": {
            "count": sum(row["count"] for row in timeouts),
            "took_effect": sum(row["took_effect"] for row in timeouts),
        },
    }


def set_faults(sandbox: Sandbox, given: FaultSettings) -> dict[str, Any]:
    """Replace the profile, the ordered faults, or both."""
    faults: FaultInjector = sandbox.faults
    if not isinstance(given.profile, msgspec.UnsetType):
        faults.profile = given.profile if isinstance(given.profile, FaultProfile) else PROFILES[given.profile]
    if not isinstance(given.next, msgspec.UnsetType):
        faults.orders = given.next
    if not isinstance(given.hang_seconds, msgspec.UnsetType):
        sandbox.settings.hang_seconds = given.hang_seconds
    if not isinstance(given.slow_seconds, msgspec.UnsetType):
        sandbox.settings.slow_seconds = given.slow_seconds
    return injected_faults(sandbox)


def health(sandbox: Sandbox) -> dict[str, Any]:
    """A constant status, and the sandbox's time in Unix seconds."""
    return {"status": "ok", "now": sandbox.memory.now()}


def advance_clock(sandbox: Sandbox, given: Advance) -> dict[str, Any]:
    """Advance the clock; actions that became due run at once."""
    sandbox.memory.advance(given.advance)
    sandbox.schedule_changed.set()
    return {"now": sandbox.memory.now()}


class ControlRoute(Struct, frozen=True):
    """A POST's body, and the function that runs it; the function takes an id where the path has one."""

    body: type[Struct]
    run: Callable[..., dict[str, Any]]


CONTROL_QUERIES: dict[str, Callable[[Sandbox, dict[str, str]], Any]] = {
    "health": lambda sandbox, _: health(sandbox),
    "charges/summary": lambda sandbox, asked: stripe_control.charges_summary(sandbox, asked.get("metadata_key", "")),
    "refunds": lambda sandbox, _: stripe_control.list_with_metadata(sandbox, "refund"),
    "refunds/summary": lambda sandbox, asked: stripe_control.refunds_summary(sandbox, asked.get("metadata_key", "")),
    "disputes": lambda sandbox, _: stripe_control.list_with_metadata(sandbox, "dispute"),
    "webhooks": lambda sandbox, _: webhook_counts(sandbox),
    "faults": lambda sandbox, _: injected_faults(sandbox),
}
CONTROL_ACTIONS = {
    "faults": ControlRoute(FaultSettings, set_faults),
    "clock": ControlRoute(Advance, advance_clock),
    "foreign-charge": ControlRoute(stripe_control.ForeignCharge, stripe_control.create_foreign_charge),
    "refunds": ControlRoute(stripe_control.DashboardRefund, stripe_control.refund_charge),
    "payment-methods/{id}": ControlRoute(stripe_control.ReplacedCard, stripe_control.replace_card),
    "refunds/{id}": ControlRoute(stripe_control.RefundOutcome, stripe_control.decide_refund),
    "disputes": ControlRoute(stripe_control.CardholderDispute, stripe_control.dispute_charge),
    "payouts": ControlRoute(stripe_control.PayoutsNow, stripe_control.pay_out_now),
    "payouts/{id}": ControlRoute(stripe_control.PayoutOutcome, stripe_control.decide_payout),
    "disputes/{id}": ControlRoute(stripe_control.BankDecision, stripe_control.decide_dispute),
    "key-state": ControlRoute(permissions.AllKeys, permissions.set_key_state),
    "keys": ControlRoute(permissions.RestrictedKey, permissions.restrict_key),
    "accounts": ControlRoute(permissions.Connection, permissions.connect_account),
    "fraud-warnings": ControlRoute(stripe_control.ChargeReference, stripe_control.warn_of_fraud),
}
