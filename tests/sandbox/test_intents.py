"""The sandbox's PaymentIntents: creation, confirmation, capture, cancellation, declines, 3-D Secure, the money."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.sandbox.stripe.objects.cards import CARDS
from tests.support.sandbox_process import CARD_PAYMENT, Json, SandboxProcess, eventually, running_sandbox


def booked_charge(sandbox: SandboxProcess, intent: str) -> Json:
    """The charge of a payment with its balance transaction, once it has one."""

    def look() -> Json | None:
        asked = {"payment_intent": intent, "expand[]": "data.balance_transaction"}
        (charge,) = sandbox.get("/v1/charges", asked)["data"]
        return charge if charge["balance_transaction"] else None

    return eventually(look)


def form(**change: Any) -> Json:
    """Parameters of a card payment."""
    return {**CARD_PAYMENT, **change}


def test_payment_is_charged_when_it_is_confirmed(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(**{"metadata[surety_payment]": "pay_1"})
    assert sandbox.read(intent)["status"] == "requires_confirmation"
    assert sandbox.get("/v1/charges", {"payment_intent": intent})["data"] == []
    confirmed = sandbox.confirm(intent, {"expand[]": "latest_charge"})
    assert (confirmed["status"], confirmed["amount_received"]) == ("succeeded", 4999)
    assert confirmed["latest_charge"]["metadata"] == {"surety_payment": "pay_1"}


def test_intent_without_payment_method_is_not_confirmed(sandbox: SandboxProcess) -> None:
    intent = sandbox.post("/v1/payment_intents", form(currency="USD"))
    assert (intent["status"], intent["currency"]) == ("requires_payment_method", "usd")
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent['id']}/confirm")
    assert (status, error["code"]) == (400, "payment_intent_unexpected_state")
    assert error["payment_intent"]["id"] == intent["id"]
    assert sandbox.confirm(intent["id"], {"payment_method": "pm_card_mastercard"})["status"] == "succeeded"


def test_balance_transaction_follows_the_charge_with_an_event(sandbox: SandboxProcess) -> None:
    intent = sandbox.create()
    charge = sandbox.confirm(intent, {"expand[]": "latest_charge.balance_transaction"})["latest_charge"]
    assert charge["balance_transaction"] is None
    line = booked_charge(sandbox, intent)["balance_transaction"]
    assert (line["amount"], line["fee"], line["net"]) == (4999, 175, 4824)
    assert (line["type"], line["reporting_category"], line["source"]) == ("charge", "charge", charge["id"])
    assert sandbox.event_types(intent) == [
        "payment_intent.created",
        "charge.succeeded",
        "payment_intent.succeeded",
        "charge.updated",
    ]
    path = f"/v1/balance_transactions/{line['id']}"
    assert eventually(lambda: sandbox.get(path)["status"] == "available")
    assert isinstance(line["available_on"], int)


def test_automatic_capture_has_its_balance_transaction_at_once(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(capture_method="automatic")
    confirmed = sandbox.confirm(intent, {"expand[]": "latest_charge.balance_transaction"})
    assert confirmed["latest_charge"]["balance_transaction"]["net"] == 4824


def test_partial_capture_makes_one_balance_transaction_and_no_refund(
    sandbox: SandboxProcess,
) -> None:
    intent = sandbox.create(capture_method="manual", amount=10000)
    held = sandbox.confirm(intent)
    assert (held["status"], held["amount_capturable"], held["amount_received"]) == ("requires_capture", 10000, 0)
    captured = sandbox.post(f"/v1/payment_intents/{intent}/capture", {"amount_to_capture": 7000})
    assert (captured["status"], captured["amount_capturable"], captured["amount_received"]) == ("succeeded", 0, 7000)
    charge = booked_charge(sandbox, intent)
    assert (charge["amount"], charge["amount_captured"], charge["amount_refunded"]) == (10000, 7000, 0)
    assert (charge["balance_transaction"]["amount"], charge["balance_transaction"]["fee"]) == (7000, 233)
    assert len(sandbox.get("/v1/balance_transactions", {"source": charge["id"]})["data"]) == 1
    assert sandbox.event_types(intent)[-3:] == [
        "payment_intent.amount_capturable_updated",
        "charge.captured",
        "payment_intent.succeeded",
    ]


def test_capture_beyond_authorization_is_refused(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay(capture_method="manual")["id"]
    for amount in (5000, 0):
        status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/capture", {"amount_to_capture": amount})
        assert (status, error["param"]) == (400, "amount_to_capture")
    assert sandbox.read(intent)["status"] == "requires_capture"


@pytest.mark.parametrize("held", [False, True])
def test_canceled_payment_stays_canceled_and_charges_nothing(sandbox: SandboxProcess, held: bool) -> None:
    intent = sandbox.create(capture_method="manual")
    if held:
        sandbox.confirm(intent)
    form = {"cancellation_reason": "abandoned"}
    canceled = sandbox.post(f"/v1/payment_intents/{intent}/cancel", form)
    assert (canceled["status"], canceled["cancellation_reason"]) == ("canceled", "abandoned")
    for charge in sandbox.get("/v1/charges", {"payment_intent": intent})["data"]:
        assert (charge["amount_captured"], charge["amount_refunded"], charge["refunded"]) == (0, 0, False)
    assert "charge.refunded" not in sandbox.event_types(intent)
    for verb in ("confirm", "capture", "cancel"):
        status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/{verb}")
        assert (status, error["code"]) == (400, "payment_intent_unexpected_state")
    assert intent not in [charge["payment_intent"] for charge in sandbox.control("charges")]


def test_succeeded_payment_is_neither_confirmed_again_nor_canceled(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay()["id"]
    for verb in ("confirm", "capture", "cancel"):
        status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/{verb}")
        assert (status, error["code"]) == (400, "payment_intent_unexpected_state")
        assert error["payment_intent"]["status"] == "succeeded"
    assert len(sandbox.get("/v1/charges", {"payment_intent": intent})["data"]) == 1


def test_metadata_is_merged_and_removed_by_empty_values(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(**{"metadata[a]": "1", "metadata[b]": "2"})
    form = {"metadata[a]": "", "metadata[c]": "3", "description": "shoes"}
    changed = sandbox.post(f"/v1/payment_intents/{intent}", form)
    assert (changed["metadata"], changed["description"]) == ({"b": "2", "c": "3"}, "shoes")


def test_uncaptured_authorization_is_released_after_seven_days(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        intent = sandbox.pay(capture_method="manual")["id"]
        sandbox.control("clock", {"advance": 7 * 86400})
        assert eventually(lambda: sandbox.read(intent)["cancellation_reason"]) == "expired"
        assert {"charge.expired", "payment_intent.canceled"} <= set(sandbox.event_types(intent))
        status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/capture")
        assert (status, error["payment_intent"]["status"]) == (400, "canceled")


def test_payment_is_processing_before_it_succeeds(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--processing-seconds=0.1") as sandbox:
        intent = sandbox.pay()
        assert intent["status"] == "processing"
        assert eventually(lambda: sandbox.read(intent["id"])["status"] == "succeeded")
        assert "payment_intent.processing" in sandbox.event_types(intent["id"])


DECLINES = {
    "pm_card_visa_chargeDeclined": ("card_declined", "generic_decline"),
    "pm_card_visa_chargeDeclinedInsufficientFunds": ("card_declined", "insufficient_funds"),
    "pm_card_visa_chargeDeclinedLostCard": ("card_declined", "lost_card"),
    "pm_card_chargeDeclinedExpiredCard": ("expired_card", None),
    "pm_card_chargeDeclinedIncorrectCvc": ("incorrect_cvc", None),
    "pm_card_chargeDeclinedProcessingError": ("processing_error", None),
}


@pytest.mark.parametrize("card", DECLINES)
def test_decline_is_402_and_the_intent_requires_a_payment_method_again(sandbox: SandboxProcess, card: str) -> None:
    intent = sandbox.create(card)
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm")
    assert (status, error["type"]) == (402, "card_error")
    assert (error["code"], error.get("decline_code")) == DECLINES[card]
    assert error["payment_intent"]["status"] == "requires_payment_method"
    after = sandbox.read(intent, form={"expand[]": "latest_charge"})
    assert (after["payment_method"], after["last_payment_error"]["code"]) == (None, error["code"])
    assert (after["latest_charge"]["status"], after["latest_charge"]["captured"]) == ("failed", False)
    assert sandbox.event_types(intent)[1:] == ["charge.failed", "payment_intent.payment_failed"]


def test_another_card_may_pay_after_a_decline(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_visa_chargeDeclined")
    sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm")
    paid = sandbox.confirm(intent, {"payment_method": "pm_card_visa"})
    assert (paid["status"], paid["last_payment_error"]) == ("succeeded", None)
    assert len(sandbox.get("/v1/charges", {"payment_intent": intent})["data"]) == 2


def test_every_test_card_can_be_used(sandbox: SandboxProcess) -> None:
    for card in CARDS.values():
        answered = sandbox.send("POST", f"/v1/payment_intents/{sandbox.create(card.token)}/confirm")
        if card.challenge == "required":
            assert answered.json()["status"] == "requires_action"
        else:
            assert answered.status_code == (402 if card.decline else 200)


def challenged(sandbox: SandboxProcess, card: str = "pm_card_threeDSecure2Required") -> tuple[str, str]:
    """A payment that waits for its payer, and the page of its challenge."""
    intent = sandbox.create(card)
    asked = sandbox.confirm(intent, {"return_url": "https://shop.example/back?order=7"})
    assert (asked["status"], asked["next_action"]["type"]) == ("requires_action", "redirect_to_url")
    url: str = asked["next_action"]["redirect_to_url"]["url"]
    return intent, url


@pytest.mark.parametrize(
    ("outcome", "status", "redirect_status"),
    [("approve", "succeeded", "succeeded"), ("decline", "requires_payment_method", "failed")],
)
def test_payer_answers_on_the_page_and_is_redirected(
    sandbox: SandboxProcess, outcome: str, status: str, redirect_status: str
) -> None:
    intent, url = challenged(sandbox)
    page = httpx.get(url)
    assert f'value="{outcome}"' in page.text
    back = httpx.post(url, data={"outcome": outcome})
    assert (back.status_code, back.headers["location"].partition("?")[0]) == (303, "https://shop.example/back")
    assert f"redirect_status={redirect_status}" in back.headers["location"]
    after = sandbox.read(intent)
    assert (after["status"], after["next_action"]) == (status, None)
    if outcome == "decline":
        assert after["last_payment_error"]["code"] == "payment_intent_authentication_failure"
        assert after["latest_charge"] is None
    assert "form" not in httpx.get(url).text


def test_card_may_be_declined_after_authentication(sandbox: SandboxProcess) -> None:
    intent, url = challenged(sandbox, "pm_card_threeDSecureRequiredChargeDeclined")
    httpx.post(url, data={"outcome": "approve"})
    assert sandbox.read(intent)["last_payment_error"]["decline_code"] == "generic_decline"


def test_payer_page_requires_the_client_secret(sandbox: SandboxProcess) -> None:
    _, url = challenged(sandbox)
    assert httpx.get(url.replace("_secret_", "_guess_")).status_code == 404


def test_payer_of_a_script_answers_by_the_client_secret(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_threeDSecure2Required")
    asked = sandbox.confirm(intent, {"use_stripe_sdk": "true", "return_url": "https://shop.example"})
    assert (asked["status"], asked["next_action"]["type"]) == ("requires_action", "use_stripe_sdk")
    assert sandbox.answer_by_script(asked["client_secret"], "approve")["status"] == "succeeded"


def test_publishable_key_only_reads_an_intent_by_its_secret(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_visa")
    headers = {"Authorization": "Bearer pk_test_page"}

    def status(path: str) -> int:
        return sandbox.client.get(path, headers=headers).status_code

    assert status(f"/v1/payment_intents/{intent}") == status("/v1/charges") == 401
    assert status(f"/v1/payment_intents/{intent}?client_secret={intent}_secret_guess") == 400
    secret = sandbox.read(intent)["client_secret"]
    assert status(f"/v1/payment_intents/{intent}?client_secret={secret}") == 200


def test_off_session_payment_that_requires_authentication_is_declined(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_authenticationRequired")
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm", {"off_session": "true"})
    assert (status, error["code"]) == (402, "authentication_required")


def test_receipt_goes_to_a_valid_address_that_may_be_removed(sandbox: SandboxProcess) -> None:
    form = {"amount": 4999, "currency": "usd"}
    for invalid in ("ada", "ada@nowhere", "ada@shop.example\n", "a b@shop.example"):
        status, error = sandbox.refusal("POST", "/v1/payment_intents", {**form, "receipt_email": invalid})
        assert (status, error["code"], error["param"]) == (400, "email_invalid", "receipt_email")
        assert error["message"] == f"Invalid email address: {invalid}"
    intent = sandbox.create(receipt_email="ada@shop.example")
    assert sandbox.read(intent)["receipt_email"] == "ada@shop.example"
    assert sandbox.confirm(intent, {"receipt_email": ""})["receipt_email"] is None


def test_merchant_may_request_authentication(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_threeDSecureOptional")
    form = {"payment_method_options[card][request_three_d_secure]": "any", "return_url": "https://shop.example"}
    assert sandbox.confirm(intent, form)["status"] == "requires_action"
    assert sandbox.pay("pm_card_threeDSecureOptional")["status"] == "succeeded"


def test_payout_equals_its_available_balance_transactions(sandbox: SandboxProcess) -> None:
    account = "acct_with_payouts"
    for _ in range(3):
        sandbox.confirm(sandbox.create(account=account), account=account)

    def paid() -> Json | None:
        payouts = sandbox.get("/v1/payouts", account=account)["data"]
        done = [payout for payout in payouts if payout["reconciliation_status"] == "completed"]
        return done[0] if sum(payout["amount"] for payout in done) == 3 * 4824 else None

    payout = eventually(paid)
    assert (payout["status"], payout["automatic"]) == ("paid", True)
    lines = sandbox.get("/v1/balance_transactions", {"payout": payout["id"], "limit": 100}, account=account)["data"]
    assert sum(line["net"] for line in lines if line["type"] != "payout") == payout["amount"]
    assert sum(line["net"] for line in lines) == 0
    balance = sandbox.get("/v1/balance", account=account)
    assert [line["amount"] for line in balance["available"] + balance["pending"]] == [0, 0]
    types = [event["type"] for event in sandbox.get("/v1/events", {"limit": 100}, account=account)["data"]]
    assert {"balance.available", "payout.created", "payout.paid", "payout.reconciliation_completed"} <= set(types)


def test_charge_is_converted_to_the_settlement_currency(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--settlement-currency=usd") as sandbox:
        intent = sandbox.pay(currency="eur", amount=10000)["id"]
        line = booked_charge(sandbox, intent)["balance_transaction"]
        assert (line["currency"], line["amount"], line["fee"], line["exchange_rate"]) == ("usd", 10850, 345, 1.085)
