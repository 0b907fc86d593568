"""The sandbox's customers and payment methods: attached by payments, charged without the payer, detached."""

from __future__ import annotations

import pytest

from tests.support.sandbox_process import Json, SandboxProcess


def saved_method(sandbox: SandboxProcess, card: str = "pm_card_visa") -> tuple[str, str]:
    """A customer, and a payment method that a payment has saved for it."""
    customer = sandbox.post("/v1/customers", {"email": "ada@shop.example", "metadata[surety_customer]": "cus_1"})["id"]
    intent = sandbox.create(card, customer=customer, setup_future_usage="off_session")
    assert sandbox.get(f"/v1/customers/{customer}/payment_methods")["data"] == []
    form = {
        "return_url": "https://shop.example",
        "mandate_data[customer_acceptance][type]": "online",
        "mandate_data[customer_acceptance][online][ip_address]": "203.0.113.7",
        "mandate_data[customer_acceptance][online][user_agent]": "Firefox",
    }
    if sandbox.confirm(intent, form)["status"] == "requires_action":
        sandbox.answer_as_payer(intent, "approve")
    [method] = sandbox.get("/v1/payment_methods", {"customer": customer, "type": "card"})["data"]
    assert method["customer"] == customer
    return customer, method["id"]


def charge(sandbox: SandboxProcess, customer: str, method: str) -> Json:
    intent = sandbox.create(method, customer=customer)
    return sandbox.confirm(intent, {"off_session": "true"})


def test_customer_is_changed_and_listed(sandbox: SandboxProcess) -> None:
    email = "grace@shop.example"
    customer = sandbox.post("/v1/customers", {"email": email, "phone": "1", "metadata[a]": "b"})["id"]
    form = {"phone": "", "name": "Grace", "shipping[name]": "Grace", "shipping[address][line1]": "1 Main Street"}
    changed = sandbox.post(f"/v1/customers/{customer}", form)
    assert (changed["phone"], changed["name"], changed["metadata"]) == (None, "Grace", {"a": "b"})
    assert changed["shipping"]["address"]["line1"] == "1 Main Street"
    assert sandbox.post(f"/v1/customers/{customer}", {"shipping": ""})["shipping"] is None
    assert [each["id"] for each in sandbox.get("/v1/customers", {"email": email})["data"]] == [customer]
    assert sandbox.get(f"/v1/customers/{customer}")["email"] == email


def test_saved_method_is_charged_without_the_payer(sandbox: SandboxProcess) -> None:
    customer, method = saved_method(sandbox)
    paid = charge(sandbox, customer, method)
    assert (paid["status"], paid["payment_method"], paid["customer"]) == ("succeeded", method, customer)


@pytest.mark.parametrize("card", ["pm_card_authenticationRequiredOnSetup", "pm_card_authenticationRequired"])
def test_saved_card_requires_authentication_again_only_if_its_bank_always_does(
    sandbox: SandboxProcess, card: str
) -> None:
    customer, method = saved_method(sandbox, card)
    if card == "pm_card_authenticationRequiredOnSetup":
        assert charge(sandbox, customer, method)["status"] == "succeeded"
        return
    intent = sandbox.create(method, customer=customer)
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm", {"off_session": "true"})
    assert (status, error["code"]) == (402, "authentication_required")
    after = sandbox.read(intent)
    assert (after["status"], after["last_payment_error"]["code"]) == (
        "requires_payment_method",
        "authentication_required",
    )


def test_method_of_another_customer_is_refused(sandbox: SandboxProcess) -> None:
    _, method = saved_method(sandbox)
    form = {"amount": 4999, "currency": "usd", "payment_method": method}
    status, error = sandbox.refusal("POST", "/v1/payment_intents", form)
    assert (status, error["param"]) == (400, "payment_method")
    other = sandbox.post("/v1/customers")["id"]
    status, error = sandbox.refusal("POST", "/v1/payment_intents", form | {"customer": other})
    assert (status, error["param"]) == (400, "payment_method")


def test_detached_method_is_not_charged_again(sandbox: SandboxProcess) -> None:
    customer, method = saved_method(sandbox)
    assert sandbox.post(f"/v1/payment_methods/{method}/detach")["customer"] is None
    assert sandbox.get(f"/v1/customers/{customer}/payment_methods")["data"] == []
    status, _ = sandbox.refusal("POST", f"/v1/payment_methods/{method}/detach")
    assert status == 400
    form = {"amount": 4999, "currency": "usd", "payment_method": method, "customer": customer}
    status, error = sandbox.refusal("POST", "/v1/payment_intents", form)
    assert (status, error["param"]) == (400, "payment_method")


def test_method_is_attached_by_a_request(sandbox: SandboxProcess) -> None:
    customer = sandbox.post("/v1/customers")["id"]
    method = sandbox.post("/v1/payment_methods/pm_card_visa/attach", {"customer": customer})["id"]
    assert charge(sandbox, customer, method)["status"] == "succeeded"


def test_unknown_customer_is_refused(sandbox: SandboxProcess) -> None:
    form = {"amount": 4999, "currency": "usd", "customer": "cus_unknown"}
    status, error = sandbox.refusal("POST", "/v1/payment_intents", form)
    assert (status, error["code"], error["param"]) == (400, "resource_missing", "customer")
