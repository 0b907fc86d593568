"""The payment methods of intents: made from test cards, stored, kept for their customers.

A payment method is attached by a payment with `setup_future_usage` that succeeds, or by a request. One that was used
without a customer, or was detached, can't be used again.
"""

from typing import Any

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import invalid_request, not_found
from app.sandbox.stripe.events import emit
from app.sandbox.stripe.objects.cards import CARDS, Card
from app.sandbox.stripe.objects.payloads import method as method_payload
from app.sandbox.stripe.queries import card_of


def method_to_charge(
    sandbox: Sandbox, account: str, given: str | None, customer: str | None
) -> Card | StoredObject | None:
    """A test card, or a stored payment method that an intent with this customer may charge. Raises StripeError."""
    if given is None:
        return None
    if given in CARDS:
        return CARDS[given]
    method = sandbox.memory.find(given)
    if method is None or method.kind != "payment_method" or method.account != account:
        raise not_found("PaymentMethod", given, param="payment_method", status=400)
    refuse_used(method)
    owner = method.body["customer"]
    if owner is None or owner == customer:
        return method
    message = f"The payment method supplied ({given}) belongs to a different Customer."
    if customer is None:
        message = (
            f"The payment method supplied ({given}) belongs to the Customer {owner}. Please include the Customer in the"
            " `customer` parameter on the PaymentIntent."
        )
    raise invalid_request(message, param="payment_method")


def give_method(sandbox: Sandbox, intent: StoredObject, given: Card | StoredObject) -> Card:
    """Give the intent a stored payment method, or one of its own made from a test card. Returns the card behind it."""
    if isinstance(given, StoredObject):
        intent.body["payment_method"] = given.id
        return card_of(sandbox, given.id)
    id, created = sandbox.memory.unused_id("pm", intent.id), sandbox.unix_seconds()
    body = method_payload(id, given, created, livemode=intent.body["livemode"])
    sandbox.memory.save(StoredObject(id, "payment_method", intent.account, created, body))
    intent.body["payment_method"] = id
    return given


def keep_method(sandbox: Sandbox, intent: StoredObject) -> None:
    """After a charge that was approved: attach the payment method to the customer if that was asked for."""
    body, method = intent.body, sandbox.memory.get(intent.body["payment_method"])
    if body["customer"] and body["setup_future_usage"]:
        link(sandbox, method, body["customer"])
    method.label = "used"
    sandbox.memory.save(method)


def link(sandbox: Sandbox, method: StoredObject, customer: str) -> None:
    """Attach a payment method, unless it is attached."""
    if method.body["customer"] == customer:
        return
    method.body["customer"] = method.parent = customer
    sandbox.memory.save(method)
    emit(sandbox, "payment_method.attached", method)


def replace_card(sandbox: Sandbox, method: StoredObject, replaced: dict[str, Any]) -> None:
    """The network replaces the card of a payment method: another number or expiry."""
    card = method.body["card"]
    previous = {name: card[name] for name in replaced}
    card.update(replaced)
    sandbox.memory.save(method)
    emit(sandbox, "payment_method.automatically_updated", method, {"card": previous})


def refuse_used(method: StoredObject) -> None:
    """Raises StripeError for a payment method that was used without a customer, or detached."""
    if method.label == "used" and method.body["customer"] is None:
        raise invalid_request(
            "The provided PaymentMethod was previously used with a PaymentIntent without Customer attachment, shared"
            " with a connected account without Customer attachment, or was detached from a Customer. It may not be used"
            " again. To use a PaymentMethod multiple times, you must attach it to a Customer first.",
            param="payment_method",
        )
