"""Customers: created, changed, payment methods attached and detached by requests."""

from typing import Any

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import invalid_request
from app.sandbox.stripe.events import emit
from app.sandbox.stripe.objects.cards import CARDS
from app.sandbox.stripe.objects.methods import link, refuse_used
from app.sandbox.stripe.objects.payloads import method as method_payload
from app.sandbox.stripe.parameters import AttachMethod, SetCustomer, merge_metadata
from app.sandbox.stripe.queries import find_owned


def create(sandbox: Sandbox, account: str, given: SetCustomer) -> StoredObject:
    """A new customer."""
    memory, created = sandbox.memory, sandbox.unix_seconds()
    id = memory.unused_id("cus", account, (sandbox.call and sandbox.call.key) or f"#{memory.next_seq()}")
    body: dict[str, Any] = {
        "id": id,
        "object": "customer",
        "address": None,
        "balance": 0,
        "created": created,
        "currency": None,
        "default_source": None,
        "delinquent": False,
        "description": None,
        "discount": None,
        "email": None,
        "invoice_prefix": id[4:12].upper(),
        "invoice_settings": {
            "custom_fields": None,
            "default_payment_method": None,
            "footer": None,
            "rendering_options": None,
        },
        "livemode": sandbox.settings.livemode,
        "metadata": {},
        "name": None,
        "phone": None,
        "preferred_locales": [],
        "shipping": None,
        "tax_exempt": "none",
        "test_clock": None,
    }
    customer = StoredObject(id, "customer", account, created, body)
    _set(customer, given)
    memory.save(customer)
    emit(sandbox, "customer.created", customer)
    return customer


def update(sandbox: Sandbox, customer: StoredObject, given: SetCustomer) -> StoredObject:
    """Change the given fields; an empty text removes one."""
    _set(customer, given)
    sandbox.memory.save(customer)
    emit(sandbox, "customer.updated", customer)
    return customer


def _set(customer: StoredObject, given: SetCustomer) -> None:
    body = customer.body
    if given.email and ("@" not in given.email or given.email.endswith(".invalid")):
        raise invalid_request(f"Invalid email address: {given.email}", param="email", code="email_invalid")
    for name in ("description", "email", "name", "phone"):
        value = getattr(given, name)
        if value is not None:
            body[name] = value or None
    if given.shipping is not None:
        body["shipping"] = _shipping(given.shipping)
    body["metadata"] = merge_metadata(body["metadata"], given.metadata)
    customer.label = body["email"] or ""


def _shipping(given: Any) -> dict[str, Any] | None:
    if isinstance(given, str):
        return None
    address = dict.fromkeys(("city", "country", "line1", "line2", "postal_code", "state")) | given.address
    return {"address": address, "name": given.name, "phone": given.phone}


def attach(sandbox: Sandbox, account: str, id: str, given: AttachMethod) -> StoredObject:
    """Attach a payment method, or a new one made from a test card, to a customer."""
    find_owned(sandbox, "customer", account, given.customer, param="customer", status=400)
    if id in CARDS:
        created = sandbox.unix_seconds()
        new = sandbox.memory.unused_id("pm", given.customer, (sandbox.call and sandbox.call.key) or id)
        body = method_payload(new, CARDS[id], created, livemode=sandbox.settings.livemode)
        method = StoredObject(new, "payment_method", account, created, body)
    else:
        method = find_owned(sandbox, "payment_method", account, id, param="payment_method")
        refuse_used(method)
        if method.body["customer"] not in (None, given.customer):
            raise invalid_request(
                "The payment method you provided has already been attached to a customer.", param="payment_method"
            )
    link(sandbox, method, given.customer)
    return method


def detach(sandbox: Sandbox, method: StoredObject, given: Any) -> StoredObject:
    """Detach a payment method from its customer, for ever."""
    if method.body["customer"] is None:
        raise invalid_request(
            "The payment method you provided is not attached to a customer so detachment is impossible.",
            param="payment_method",
        )
    previous = {"customer": method.body["customer"]}
    method.body["customer"] = None
    method.parent, method.label = "", "used"
    sandbox.memory.save(method)
    emit(sandbox, "payment_method.detached", method, previous)
    return method
