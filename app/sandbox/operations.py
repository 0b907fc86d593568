"""The API's operations: name, path, parameters and what is done, one row each."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from app.sandbox import intents, money
from app.sandbox.errors import invalid
from app.sandbox.memory import Record
from app.sandbox.parameters import (
    CancelIntent,
    CaptureIntent,
    ConfirmIntent,
    CreateIntent,
    ListBalanceTransactions,
    ListCharges,
    ListEvents,
    ListIntents,
    ListPayouts,
    Parameters,
    RetrieveIntent,
    UpdateIntent,
)
from app.sandbox.reading import listed, owned, shown
from app.sandbox.settings import PLATFORM
from app.sandbox.world import World

Run = Callable[[World, str, str, Any], dict[str, Any]]
"""World, account, object id ("" where there is none), parameters; returns the answer's body."""


class Operation(Struct, frozen=True):
    name: str
    parameters: type[Parameters]
    run: Run


def _retrieve(kind: str) -> Run:
    def run(world: World, account: str, id: str, given: Parameters) -> dict[str, Any]:
        return shown(world, owned(world, kind, account, id, param="id"), given.expand)

    return run


def _create_intent(world: World, account: str, id: str, given: CreateIntent) -> dict[str, Any]:
    return shown(world, intents.create(world, account, given), given.expand)


def _on_intent(change: Callable[[World, Record, Any], Record]) -> Run:
    def run(world: World, account: str, id: str, given: Parameters) -> dict[str, Any]:
        intent = owned(world, "payment_intent", account, id, param="intent")
        return shown(world, change(world, intent, given), given.expand)

    return run


def _retrieve_intent(world: World, account: str, id: str, given: RetrieveIntent) -> dict[str, Any]:
    intent = owned(world, "payment_intent", account, id, param="intent")
    if given.client_secret not in (None, intent.body["client_secret"]):
        raise invalid("The client_secret provided does not match.", param="client_secret")
    return shown(world, intent, given.expand)


def _list_intents(world: World, account: str, id: str, given: ListIntents) -> dict[str, Any]:
    return listed(world, "payment_intent", account, given, "/v1/payment_intents", parent=given.customer)


def _list_charges(world: World, account: str, id: str, given: ListCharges) -> dict[str, Any]:
    return listed(world, "charge", account, given, "/v1/charges", parent=given.payment_intent)


def _list_balance_transactions(world: World, account: str, id: str, given: ListBalanceTransactions) -> dict[str, Any]:
    return listed(
        world, "balance_transaction", account, given, "/v1/balance_transactions",
        parent=given.source, payout=given.payout, label=given.type, currency=given.currency,
    )  # fmt: skip


def _list_payouts(world: World, account: str, id: str, given: ListPayouts) -> dict[str, Any]:
    return listed(world, "payout", account, given, "/v1/payouts", label=given.status)


def _list_events(world: World, account: str, id: str, given: ListEvents) -> dict[str, Any]:
    if given.type and given.types:
        raise invalid("You may only specify one of these parameters: type, types.", code="parameters_exclusive")
    return listed(world, "event", account, given, "/v1/events", label=given.types or given.type)


def _balance(world: World, account: str, id: str, given: Parameters) -> dict[str, Any]:
    return money.balance(world, account)


def _account(world: World, account: str, id: str, given: Parameters) -> dict[str, Any]:
    return {
        "id": account,
        "object": "account",
        "business_type": "company",
        "charges_enabled": True,
        "country": "US",
        "default_currency": world.settings.settlement_currency or "usd",
        "details_submitted": True,
        "email": "platform@example.com" if account == PLATFORM else "merchant@example.com",
        "metadata": {},
        "payouts_enabled": True,
        "type": "standard",
    }


OPERATIONS = {
    "POST /v1/payment_intents": Operation("payment_intents.create", CreateIntent, _create_intent),
    "GET /v1/payment_intents": Operation("payment_intents.list", ListIntents, _list_intents),
    "GET /v1/payment_intents/{id}": Operation("payment_intents.retrieve", RetrieveIntent, _retrieve_intent),
    "POST /v1/payment_intents/{id}": Operation("payment_intents.update", UpdateIntent, _on_intent(intents.update)),
    "POST /v1/payment_intents/{id}/confirm": Operation(
        "payment_intents.confirm", ConfirmIntent, _on_intent(intents.confirm)
    ),
    "POST /v1/payment_intents/{id}/capture": Operation(
        "payment_intents.capture", CaptureIntent, _on_intent(intents.capture)
    ),
    "POST /v1/payment_intents/{id}/cancel": Operation(
        "payment_intents.cancel", CancelIntent, _on_intent(intents.cancel)
    ),
    "GET /v1/payment_methods/{id}": Operation("payment_methods.retrieve", Parameters, _retrieve("payment_method")),
    "GET /v1/charges": Operation("charges.list", ListCharges, _list_charges),
    "GET /v1/charges/{id}": Operation("charges.retrieve", Parameters, _retrieve("charge")),
    "GET /v1/balance_transactions": Operation(
        "balance_transactions.list", ListBalanceTransactions, _list_balance_transactions
    ),
    "GET /v1/balance_transactions/{id}": Operation(
        "balance_transactions.retrieve", Parameters, _retrieve("balance_transaction")
    ),
    "GET /v1/balance": Operation("balance.retrieve", Parameters, _balance),
    "GET /v1/payouts": Operation("payouts.list", ListPayouts, _list_payouts),
    "GET /v1/payouts/{id}": Operation("payouts.retrieve", Parameters, _retrieve("payout")),
    "GET /v1/events": Operation("events.list", ListEvents, _list_events),
    "GET /v1/events/{id}": Operation("events.retrieve", Parameters, _retrieve("event")),
    "GET /v1/account": Operation("accounts.retrieve_current", Parameters, _account),
}


def find_operation(method: str, path: str) -> tuple[Operation, str]:
    """The operation and the object id that its path names."""
    parts = path.split("/")
    if len(parts) < 4:
        shape, id = path, ""
    else:
        id = parts[3]
        shape = "/".join((*parts[:3], "{id}", *parts[4:]))
    operation = OPERATIONS.get(f"{method} {shape}")
    if operation is None:
        error = invalid(f"Unrecognized request URL ({method}: {path}).")
        error.status = 404
        raise error
    return operation, id
