"""The sandbox's requests: accounts, lists, refusals, idempotency keys, Stripe's own client."""

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from tests.support.sandbox_process import CARD_PAYMENT, KEY, Json, SandboxProcess, running_sandbox

keys = (f"key-{number}" for number in count())


def form(**change: Any) -> Json:
    """Parameters of a card payment."""
    return {**CARD_PAYMENT, **change}


def test_payment_is_invisible_to_other_accounts(sandbox: SandboxProcess) -> None:
    intent = sandbox.create(account="acct_one")
    assert sandbox.read(intent, account="acct_one")["id"] == intent
    for account in ("acct_two", None):
        status, error = sandbox.refusal("GET", f"/v1/payment_intents/{intent}", account=account)
        assert (status, error["code"]) == (404, "resource_missing")
    assert sandbox.get("/v1/events", account="acct_one")["data"][0]["account"] == "acct_one"


def test_list_is_paged_in_both_directions(sandbox: SandboxProcess) -> None:
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


def test_list_is_filtered_by_customer(sandbox: SandboxProcess) -> None:
    ours, other = (sandbox.post("/v1/customers")["id"] for _ in range(2))
    mine, _ = sandbox.create(customer=ours), sandbox.create(customer=other)
    listed = sandbox.get("/v1/payment_intents", {"customer": ours})["data"]
    assert [intent["id"] for intent in listed] == [mine]


def test_unknown_expand_is_refused(sandbox: SandboxProcess) -> None:
    sandbox.pay()
    status, error = sandbox.refusal("GET", "/v1/charges", {"expand[]": "data.amount"})
    assert (status, error["message"]) == (400, "This property cannot be expanded (amount).")


def test_account_can_be_read(sandbox: SandboxProcess) -> None:
    assert sandbox.get("/v1/account")["object"] == "account"


def test_request_without_a_test_key_is_401(sandbox: SandboxProcess) -> None:
    for authorization in ("", "Bearer sk_live_123", "Bearer sk_live_sandbox", "Bearer pk_live_123", "Bearer sk_test_"):
        answered = sandbox.client.get("/v1/balance", headers={"Authorization": authorization})
        assert (answered.status_code, answered.json()["error"]["type"]) == (401, "invalid_request_error")
    for key in (KEY, "rk_test_123"):
        assert sandbox.client.get("/v1/balance", auth=(key, "")).status_code == 200


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
    ({"amount": 1050, "currency": "isk"}, "parameter_invalid_integer", "amount"),
    ({"currency": "usx"}, None, "currency"),
    ({"capture_method": "later"}, None, "capture_method"),
    ({"payment_method": "pm_card_unknown"}, "resource_missing", "payment_method"),
    ({"statement_descriptor": "SHOP"}, None, "statement_descriptor"),
    ({"statement_descriptor_suffix": "x" * 23}, None, "statement_descriptor_suffix"),
    ({"payment_method_types[]": "card"}, "payment_method_types_no_longer_supported", "payment_method_types"),
    ({"allowed_payment_method_types[]": "us_bank_account"}, None, "allowed_payment_method_types"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "param"), BAD_PARAMETERS)
def test_invalid_parameter_is_refused_by_name(
    sandbox: SandboxProcess, change: Json, code: str | None, param: str
) -> None:
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


def test_limits_of_connections_are_those_of_the_services(sandbox: SandboxProcess) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Idempotency-Key", "one"), ("Idempotency-Key", "two")]
    repeated = httpx.post(f"{sandbox.url}/v1/payment_intents", headers=headers)
    assert repeated.status_code == 400
    assert repeated.json()["error"] == {
        "message": "the header Idempotency-Key is given twice",
        "type": "invalid_request_error",
    }
    large = httpx.get(f"{sandbox.url}/v1/account", headers={"Authorization": "a" * 20_000})
    assert (large.status_code, large.json()["error"]["type"]) == (431, "invalid_request_error")


def test_unknown_paths_and_objects_are_404(sandbox: SandboxProcess) -> None:
    assert sandbox.refusal("GET", "/v1/teapots", is_valid=False)[0] == 404
    assert sandbox.refusal("GET", "/v1/payment_intents/pi_none")[1]["code"] == "resource_missing"
    assert sandbox.refusal("POST", "/v1/payment_intents/pi_none/confirm")[1]["code"] == "resource_missing"
    assert sandbox.refusal("GET", "/v1/charges", {"starting_after": "ch_none"})[0] == 400


def test_other_api_versions_are_refused(sandbox: SandboxProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Stripe-Version": "2020-08-27"}
    assert sandbox.client.get("/v1/balance", headers=headers).status_code == 400


def test_repeated_key_gets_the_first_answer_byte_for_byte(sandbox: SandboxProcess) -> None:
    key = next(keys)
    first = sandbox.send("POST", "/v1/payment_intents", form(), key=key)
    again = sandbox.send("POST", "/v1/payment_intents", dict(reversed(form().items())), key=key)
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["original-request"] == first.headers["request-id"]
    assert "idempotent-replayed" not in first.headers
    assert first.headers["idempotency-key"] == key


def test_decline_is_replayed(sandbox: SandboxProcess) -> None:
    key, intent = next(keys), sandbox.create("pm_card_visa_chargeDeclined")
    path = f"/v1/payment_intents/{intent}/confirm"
    first, again = (sandbox.send("POST", path, key=key) for _ in range(2))
    assert (first.status_code, again.status_code, again.content) == (402, 402, first.content)
    assert len(sandbox.get("/v1/charges", {"payment_intent": intent})["data"]) == 1


def test_repeated_key_with_other_parameters_or_path_is_refused(sandbox: SandboxProcess) -> None:
    key = next(keys)
    intent = sandbox.post("/v1/payment_intents", form(), key=key)["id"]
    for path, changed in (("/v1/payment_intents", form(amount=5000)), (f"/v1/payment_intents/{intent}", {})):
        status, error = sandbox.refusal("POST", path, changed, key=key)
        assert (status, error["type"]) == (400, "idempotency_error")


def test_invalid_request_does_not_use_its_key(sandbox: SandboxProcess) -> None:
    key = next(keys)
    assert sandbox.refusal("POST", "/v1/payment_intents", form(amount=1), key=key)[0] == 400
    assert sandbox.send("POST", "/v1/payment_intents", form(), key=key).status_code == 200


def test_idempotency_keys_belong_to_accounts(sandbox: SandboxProcess) -> None:
    key = next(keys)
    one, two = (sandbox.create(key=key, account=account) for account in ("acct_one", "acct_two"))
    assert one != two


def test_idempotency_key_is_forgotten_after_24_hours(tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how the SDK calls httpx
async def test_stripes_own_client_works_with_the_sandbox(sandbox: SandboxProcess) -> None:
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


@pytest.mark.parametrize("amount", ["1e3", "1050.0", "null", "+1050", " 1050", "1_050"])
def test_amount_is_digits_and_null_is_not_all(sandbox: SandboxProcess, amount: str) -> None:
    form = {"amount": amount, "currency": "usd"}
    assert sandbox.send("POST", "/v1/payment_intents", form, is_valid=False).status_code == 400
    intent = sandbox.pay()["id"]
    refused = sandbox.send("POST", "/v1/refunds", {"payment_intent": intent, "amount": amount}, is_valid=False)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "amount")
    assert sandbox.get("/v1/refunds", {"payment_intent": intent})["data"] == []
