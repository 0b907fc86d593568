"""The sandbox as a well-behaved Stripe: lives of payments, money, lists, refusals, idempotency keys."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from app.sandbox.stripe.objects.cards import CARDS
from tests.support.sandbox_process import CARD_PAYMENT, KEY, Json, SandboxProcess, eventually, running_sandbox

keys = (f"key-{number}" for number in count())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox"), "--payout-seconds=0.3") as running:
        yield running


def booked_charge(sandbox: SandboxProcess, intent: str) -> Json:
    """The charge of a payment with its balance transaction, once it has one."""

    def look() -> Json | None:
        asked = {"payment_intent": intent, "expand[]": "data.balance_transaction"}
        (charge,) = sandbox.get("/v1/charges", asked)["data"]
        return charge if charge["balance_transaction"] else None

    return eventually(look)


def form(**change: Any) -> Json:
    """What creates a card payment."""
    return {**CARD_PAYMENT, **change}


# A payment's life


def test_a_payment_is_created_unconfirmed_and_charged_when_it_is_confirmed(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(**{"metadata[surety_payment]": "pay_1"})
    assert sandbox.read(intent)["status"] == "requires_confirmation"
    assert sandbox.get("/v1/charges", {"payment_intent": intent})["data"] == []
    confirmed = sandbox.confirm(intent, {"expand[]": "latest_charge"})
    assert (confirmed["status"], confirmed["amount_received"]) == ("succeeded", 4999)
    assert confirmed["latest_charge"]["metadata"] == {"surety_payment": "pay_1"}


def test_without_a_payment_method_it_waits_for_one(sandbox: SandboxProcess) -> None:
    intent = sandbox.post("/v1/payment_intents", form(currency="USD"))
    assert (intent["status"], intent["currency"]) == ("requires_payment_method", "usd")
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent['id']}/confirm")
    assert (status, error["code"]) == (400, "payment_intent_unexpected_state")
    assert error["payment_intent"]["id"] == intent["id"]
    assert sandbox.confirm(intent["id"], {"payment_method": "pm_card_mastercard"})["status"] == "succeeded"


def test_the_balance_transaction_comes_after_the_charge_and_is_announced(sandbox: SandboxProcess) -> None:
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


def test_under_automatic_capture_the_balance_transaction_is_there_at_once(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(capture_method="automatic")
    confirmed = sandbox.confirm(intent, {"expand[]": "latest_charge.balance_transaction"})
    assert confirmed["latest_charge"]["balance_transaction"]["net"] == 4824


def test_an_authorization_is_captured_in_part_without_a_refund_and_with_one_balance_transaction(
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


def test_a_succeeded_payment_can_neither_be_confirmed_again_nor_canceled(sandbox: SandboxProcess) -> None:
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


# Declines


DECLINES = {
    "pm_card_visa_chargeDeclined": ("card_declined", "generic_decline"),
    "pm_card_visa_chargeDeclinedInsufficientFunds": ("card_declined", "insufficient_funds"),
    "pm_card_visa_chargeDeclinedLostCard": ("card_declined", "lost_card"),
    "pm_card_chargeDeclinedExpiredCard": ("expired_card", None),
    "pm_card_chargeDeclinedIncorrectCvc": ("incorrect_cvc", None),
    "pm_card_chargeDeclinedProcessingError": ("processing_error", None),
}


@pytest.mark.parametrize("card", DECLINES)
def test_a_decline_is_402_and_takes_the_payment_back_to_wanting_a_method(sandbox: SandboxProcess, card: str) -> None:
    intent = sandbox.create(card)
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm")
    assert (status, error["type"]) == (402, "card_error")
    assert (error["code"], error.get("decline_code")) == DECLINES[card]
    assert error["payment_intent"]["status"] == "requires_payment_method"
    after = sandbox.read(intent, form={"expand[]": "latest_charge"})
    assert (after["payment_method"], after["last_payment_error"]["code"]) == (None, error["code"])
    assert (after["latest_charge"]["status"], after["latest_charge"]["captured"]) == ("failed", False)
    assert sandbox.event_types(intent)[1:] == ["charge.failed", "payment_intent.payment_failed"]


def test_after_a_decline_another_card_may_still_pay(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_visa_chargeDeclined")
    sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm")
    paid = sandbox.confirm(intent, {"payment_method": "pm_card_visa"})
    assert (paid["status"], paid["last_payment_error"]) == ("succeeded", None)
    assert len(sandbox.get("/v1/charges", {"payment_intent": intent})["data"]) == 2


def test_every_card_of_the_table_can_be_used(sandbox: SandboxProcess) -> None:
    for card in CARDS.values():
        answered = sandbox.send("POST", f"/v1/payment_intents/{sandbox.create(card.token)}/confirm")
        if card.challenge == "required":
            assert answered.json()["status"] == "requires_action"
        else:
            assert answered.status_code == (402 if card.decline else 200)


# 3-D Secure


def challenged(sandbox: SandboxProcess, card: str = "pm_card_threeDSecure2Required") -> tuple[str, str]:
    """A payment that waits for its payer, and the page he is sent to."""
    intent = sandbox.create(card)
    asked = sandbox.confirm(intent, {"return_url": "https://shop.example/back?order=7"})
    assert (asked["status"], asked["next_action"]["type"]) == ("requires_action", "redirect_to_url")
    url: str = asked["next_action"]["redirect_to_url"]["url"]
    return intent, url


@pytest.mark.parametrize(
    ("outcome", "status", "told"),
    [("approve", "succeeded", "succeeded"), ("decline", "requires_payment_method", "failed")],
)
def test_the_payer_answers_on_the_page_and_is_sent_back(
    sandbox: SandboxProcess, outcome: str, status: str, told: str
) -> None:
    intent, url = challenged(sandbox)
    page = httpx.get(url)
    assert f'value="{outcome}"' in page.text
    back = httpx.post(url, data={"outcome": outcome})
    assert (back.status_code, back.headers["location"].partition("?")[0]) == (303, "https://shop.example/back")
    assert f"redirect_status={told}" in back.headers["location"]
    after = sandbox.read(intent)
    assert (after["status"], after["next_action"]) == (status, None)
    if outcome == "decline":
        assert after["last_payment_error"]["code"] == "payment_intent_authentication_failure"
        assert after["latest_charge"] is None
    assert "form" not in httpx.get(url).text


def test_a_card_can_be_declined_after_its_payer_approved(sandbox: SandboxProcess) -> None:
    intent, url = challenged(sandbox, "pm_card_threeDSecureRequiredChargeDeclined")
    httpx.post(url, data={"outcome": "approve"})
    assert sandbox.read(intent)["last_payment_error"]["decline_code"] == "generic_decline"


def test_payer_page_requires_the_client_secret(sandbox: SandboxProcess) -> None:
    _, url = challenged(sandbox)
    assert httpx.get(url.replace("_secret_", "_guess_")).status_code == 404


def test_an_absent_payer_can_not_authenticate(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_authenticationRequired")
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm", {"off_session": "true"})
    assert (status, error["code"]) == (402, "authentication_required")


def test_authentication_can_be_requested(sandbox: SandboxProcess) -> None:
    intent = sandbox.create("pm_card_threeDSecureOptional")
    form = {"payment_method_options[card][request_three_d_secure]": "any", "return_url": "https://shop.example"}
    assert sandbox.confirm(intent, form)["status"] == "requires_action"
    assert sandbox.pay("pm_card_threeDSecureOptional")["status"] == "succeeded"


# Money


def test_a_payout_consists_of_what_was_available(sandbox: SandboxProcess) -> None:
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


def test_a_charge_settles_in_another_currency_where_that_is_set(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--settlement-currency=usd") as sandbox:
        intent = sandbox.pay(currency="eur", amount=10000)["id"]
        line = booked_charge(sandbox, intent)["balance_transaction"]
        assert (line["currency"], line["amount"], line["fee"], line["exchange_rate"]) == ("usd", 10850, 345, 1.085)


# Reading


def test_payment_is_invisible_to_other_accounts(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(account="acct_one")
    assert sandbox.read(intent, account="acct_one")["id"] == intent
    for account in ("acct_two", None):
        status, error = sandbox.refusal("GET", f"/v1/payment_intents/{intent}", account=account)
        assert (status, error["code"]) == (404, "resource_missing")
    assert sandbox.get("/v1/events", account="acct_one")["data"][0]["account"] == "acct_one"


def test_a_list_is_walked_in_both_directions(sandbox: SandboxProcess) -> None:
    account = "acct_of_pages"
    made = [sandbox.create(account=account) for _ in range(5)][::-1]
    path = "/v1/payment_intents"

    def page(**form: Any) -> tuple[list[str], bool]:
        answered = sandbox.get(path, form, account=account)
        return [intent["id"] for intent in answered["data"]], answered["has_more"]

    assert page(limit=2) == (made[:2], True)
    assert page(limit=2, starting_after=made[1]) == (made[2:4], True)
    assert page(limit=2, starting_after=made[3]) == (made[4:], False)
    assert page(limit=2, ending_before=made[4]) == (made[2:4], True)
    assert page(limit=3, ending_before=made[1]) == (made[:1], False)
    first, last = sandbox.read(made[-1], account=account)["created"], sandbox.read(made[0], account=account)["created"]
    assert page(**{"created[gte]": first, "created[lte]": last})[0] == made
    assert page(**{"created[lt]": first})[0] == page(**{"created[gt]": last})[0] == []


def test_a_list_by_customer_or_by_source_holds_only_theirs(sandbox: SandboxProcess) -> None:
    mine, _ = sandbox.create(customer="cus_mine"), sandbox.create(customer="cus_other")
    listed = sandbox.get("/v1/payment_intents", {"customer": "cus_mine"})["data"]
    assert [intent["id"] for intent in listed] == [mine]


def test_unknown_expand_is_refused(sandbox: SandboxProcess) -> None:
    status, error = sandbox.refusal("GET", "/v1/charges", {"expand[]": "data.amount"})
    assert (status, error["message"]) == (400, "This property cannot be expanded (amount).")


def test_the_account_can_be_read_as_a_probe(sandbox: SandboxProcess) -> None:
    assert sandbox.get("/v1/account")["object"] == "account"


# Refusals


def test_a_key_that_is_no_test_key_is_401(sandbox: SandboxProcess) -> None:
    for authorization in ("", "Bearer sk_live_123", "Bearer rk_test_123"):
        answered = sandbox.client.get("/v1/balance", headers={"Authorization": authorization})
        assert (answered.status_code, answered.json()["error"]["type"]) == (401, "invalid_request_error")
    assert sandbox.client.get("/v1/balance", auth=(KEY, "")).status_code == 200


BAD_PARAMETERS: list[tuple[Json, str | None, str]] = [
    ({"colour": "red"}, "parameter_unknown", "colour"),
    ({"metadata[a][b]": "1"}, None, "metadata"),
    ({"automatic_payment_methods[enabled]": "true", "automatic_payment_methods[x]": "1"}, "parameter_unknown",
     "automatic_payment_methods[x]"),
    ({"automatic_payment_methods[allow_redirects]": "never"}, "parameter_missing",
     "automatic_payment_methods[enabled]"),
    ({"amount": None}, "parameter_missing", "amount"),
    ({"currency": None}, "parameter_missing", "currency"),
    ({"amount": "ten"}, "parameter_invalid_integer", "amount"),
    ({"amount": "10.50"}, "parameter_invalid_integer", "amount"),
    ({"amount": ""}, "parameter_invalid_empty", "amount"),
    ({"amount": 0}, "parameter_invalid_integer", "amount"),
    ({"amount": -5}, "parameter_invalid_integer", "amount"),
    ({"amount": 49}, "amount_too_small", "amount"),
    ({"amount": 100_000_000}, "amount_too_large", "amount"),
    ({"amount": 1005, "currency": "kwd"}, "parameter_invalid_integer", "amount"),
    ({"currency": "usx"}, None, "currency"),
    ({"capture_method": "later"}, None, "capture_method"),
    ({"payment_method": "pm_card_unheard_of"}, "resource_missing", "payment_method"),
    ({"statement_descriptor": "SHOP"}, None, "statement_descriptor"),
    ({"statement_descriptor_suffix": "x" * 23}, None, "statement_descriptor_suffix"),
    ({"payment_method_types[]": "card"}, "payment_method_types_no_longer_supported", "payment_method_types"),
    ({"allowed_payment_method_types[]": "us_bank_account"}, None, "allowed_payment_method_types"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "param"), BAD_PARAMETERS)
def test_a_bad_parameter_is_named(sandbox: SandboxProcess, change: Json, code: str | None, param: str) -> None:
    good = {"amount": 4999, "currency": "usd", "payment_method": "pm_card_visa"}
    form = {name: value for name, value in {**good, **change}.items() if value is not None}
    status, error = sandbox.refusal("POST", "/v1/payment_intents", form, is_valid=False)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert (error.get("code"), error["param"]) == (code, param)


def test_redirecting_payment_methods_require_a_return_url(sandbox: SandboxProcess) -> None:
    form = {"amount": 4999, "currency": "usd", "payment_method": "pm_card_visa"}
    intent = sandbox.post("/v1/payment_intents", form)["id"]
    status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm")
    assert (status, error["param"]) == (400, "return_url")
    assert sandbox.confirm(intent, {"return_url": "https://shop.example"})["status"] == "succeeded"


def test_unknown_paths_and_objects_are_404(sandbox: SandboxProcess) -> None:
    assert sandbox.refusal("GET", "/v1/teapots", is_valid=False)[0] == 404
    assert sandbox.refusal("GET", "/v1/payment_intents/pi_none")[1]["code"] == "resource_missing"
    assert sandbox.refusal("POST", "/v1/payment_intents/pi_none/confirm")[1]["code"] == "resource_missing"
    assert sandbox.refusal("GET", "/v1/charges", {"starting_after": "ch_none"})[0] == 400


def test_another_api_version_is_refused(sandbox: SandboxProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Stripe-Version": "2020-08-27"}
    assert sandbox.client.get("/v1/balance", headers=headers).status_code == 400


# Idempotency keys


def test_a_repeated_key_gets_the_first_answer_byte_for_byte(sandbox: SandboxProcess) -> None:
    key = next(keys)
    first = sandbox.send("POST", "/v1/payment_intents", form(), key=key)
    again = sandbox.send("POST", "/v1/payment_intents", dict(reversed(form().items())), key=key)
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["original-request"] == first.headers["request-id"]
    assert "idempotent-replayed" not in first.headers
    assert first.headers["idempotency-key"] == key


def test_a_decline_is_replayed_too(sandbox: SandboxProcess) -> None:
    key, intent = next(keys), sandbox.create("pm_card_visa_chargeDeclined")
    path = f"/v1/payment_intents/{intent}/confirm"
    first, again = (sandbox.send("POST", path, key=key) for _ in range(2))
    assert (first.status_code, again.status_code, again.content) == (402, 402, first.content)
    assert len(sandbox.get("/v1/charges", {"payment_intent": intent})["data"]) == 1


def test_other_parameters_or_another_path_under_one_key_are_an_error(sandbox: SandboxProcess) -> None:
    key = next(keys)
    intent = sandbox.post("/v1/payment_intents", form(), key=key)["id"]
    for path, changed in (("/v1/payment_intents", form(amount=5000)), (f"/v1/payment_intents/{intent}", {})):
        status, error = sandbox.refusal("POST", path, changed, key=key)
        assert (status, error["type"]) == (400, "idempotency_error")


def test_a_request_that_failed_validation_does_not_use_its_key_up(sandbox: SandboxProcess) -> None:
    key = next(keys)
    assert sandbox.refusal("POST", "/v1/payment_intents", form(amount=1), key=key)[0] == 400
    assert sandbox.send("POST", "/v1/payment_intents", form(), key=key).status_code == 200


def test_a_key_belongs_to_its_account(sandbox: SandboxProcess) -> None:
    key = next(keys)
    one, two = (sandbox.create(key=key, account=account) for account in ("acct_one", "acct_two"))
    assert one != two


def test_a_key_is_forgotten_after_24_hours_but_not_before(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        first = sandbox.create(key="k")
        sandbox.control("clock", {"advance": 23 * 3600})
        assert sandbox.create(key="k") == first
        sandbox.control("clock", {"advance": 3601})
        assert sandbox.create(key="k") != first


def test_one_of_50_concurrent_requests_with_one_key_takes_effect(sandbox: SandboxProcess) -> None:
    key, intent = next(keys), sandbox.create()
    with ThreadPoolExecutor(16) as threads:
        sent = [
            threads.submit(sandbox.send, "POST", f"/v1/payment_intents/{intent}/confirm", key=key) for _ in range(50)
        ]
        answers = [answered.result() for answered in sent]
    assert {answered.content for answered in answers} == {answers[0].content}
    assert len(sandbox.get("/v1/charges", {"payment_intent": intent})["data"]) == 1


# The rest


def test_uncaptured_authorization_is_released_after_seven_days(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        intent = sandbox.pay(capture_method="manual")["id"]
        sandbox.control("clock", {"advance": 7 * 86400})
        assert eventually(lambda: sandbox.read(intent)["cancellation_reason"]) == "expired"
        assert {"charge.expired", "payment_intent.canceled"} <= set(sandbox.event_types(intent))
        status, error = sandbox.refusal("POST", f"/v1/payment_intents/{intent}/capture")
        assert (status, error["payment_intent"]["status"]) == (400, "canceled")


def test_a_slow_network_leaves_the_payment_processing_for_a_while(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--processing-seconds=0.1") as sandbox:
        intent = sandbox.pay()
        assert intent["status"] == "processing"
        assert eventually(lambda: sandbox.read(intent["id"])["status"] == "succeeded")
        assert "payment_intent.processing" in sandbox.event_types(intent["id"])


def test_the_summary_counts_charges_per_payment_and_names_doubles(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        assert sandbox.control("charges") == []
        for payment in ("pay_1", "pay_2", "pay_2"):
            sandbox.pay(**{"metadata[surety_payment]": payment})
        foreign = sandbox.control("foreign-charge", {"amount": 777})
        assert sandbox.control("charges/summary?metadata_key=surety_payment") == {
            "charges": 4,
            "payments": 2,
            "double": ["pay_2"],
        }
        (last,) = [charge for charge in sandbox.control("charges") if charge["charge"] == foreign["charge"]]
        assert (last["amount"], last["metadata"]) == (777, {})


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how the SDK calls httpx
async def test_stripes_own_client_works_with_it(sandbox: SandboxProcess) -> None:
    http = stripe.HTTPXClient(timeout=5)
    client = stripe.StripeClient(KEY, base_addresses={"api": sandbox.url}, http_client=http, max_network_retries=0)
    intent = await client.v1.payment_intents.create_async(
        {
            "amount": 4999,
            "currency": "usd",
            "payment_method": "pm_card_visa_chargeDeclined",
            "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
            "metadata": {"surety_payment": "pay_9"},
        },
        {"idempotency_key": next(keys)},
    )
    with pytest.raises(stripe.CardError) as declined:
        await client.v1.payment_intents.confirm_async(intent.id)
    assert declined.value.code == "card_declined"
    paid = await client.v1.payment_intents.confirm_async(
        intent.id, {"payment_method": "pm_card_visa", "expand": ["latest_charge"]}
    )
    assert isinstance(paid.latest_charge, stripe.Charge)
    assert paid.latest_charge.metadata["surety_payment"] == "pay_9"
    with pytest.raises(stripe.InvalidRequestError):
        await client.v1.payment_intents.confirm_async(intent.id)
    listed = await client.v1.charges.list_async({"payment_intent": intent.id, "limit": 1})
    assert [charge.id async for charge in listed.auto_paging_iter()] == [
        paid.latest_charge.id,
        declined.value.error.charge if declined.value.error else None,
    ]
    await http.close_async()  # type: ignore[no-untyped-call]
