"""The sandbox's refunds: every status, every refusal, the money, the dashboard; answers lost and the process killed."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.sandbox_process import (
    Json,
    SandboxProcess,
    WebhookReceiver,
    eventually,
    running_sandbox,
)
from tests.support.stripe_description import check_event

keys = (f"key-{number}" for number in count())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, receiver: WebhookReceiver) -> Iterator[SandboxProcess]:
    folder = tmp_path_factory.mktemp("sandbox")
    with running_sandbox(folder, "--payout-seconds=0.3", "--hang-seconds=0.15", webhook_url=receiver.url) as running:
        yield running


def refund(sandbox: SandboxProcess, intent: str, **form: Any) -> Json:
    return sandbox.post("/v1/refunds", {"payment_intent": intent, **form})


def read(sandbox: SandboxProcess, refund_id: str) -> Json:
    form = {"expand[0]": "balance_transaction", "expand[1]": "failure_balance_transaction"}
    return sandbox.get(f"/v1/refunds/{refund_id}", form)


def wait_for_status(sandbox: SandboxProcess, refund_id: str, status: str) -> Json:
    """The refund, once it has that status."""
    return eventually(lambda: (current := read(sandbox, refund_id))["status"] == status and current)


def charge_of(sandbox: SandboxProcess, intent: str) -> Json:
    charge: Json = sandbox.read(intent, form={"expand[]": "latest_charge"})["latest_charge"]
    return charge


def received_events(receiver: WebhookReceiver, refund_id: str) -> set[str]:
    """Types of the events about a refund, each in Stripe's shape."""
    events = [event for _, event in list(receiver.received) if event["data"]["object"].get("id") == refund_id]
    for event in events:
        check_event(event)
    return {event["type"] for event in events}


# Statuses


def test_refund_succeeds_at_once_and_does_not_return_the_fee(
    sandbox: SandboxProcess, receiver: WebhookReceiver
) -> None:
    intent = sandbox.pay(description="shoes")["id"]
    made = refund(sandbox, intent, reason="duplicate", **{"metadata[surety_refund]": "ref_1"})
    assert (made["status"], made["amount"], made["reason"]) == ("succeeded", 4999, "duplicate")
    assert made["metadata"] == {"surety_refund": "ref_1"}
    line = read(sandbox, made["id"])["balance_transaction"]
    assert (line["type"], line["reporting_category"], line["source"]) == ("refund", "refund", made["id"])
    assert (line["amount"], line["fee"], line["net"]) == (-4999, 0, -4999)
    assert line["description"] == "REFUND FOR CHARGE (shoes)"
    charge = charge_of(sandbox, intent)
    assert (charge["amount_refunded"], charge["refunded"], charge["captured"]) == (4999, True, True)
    eventually(
        lambda: received_events(receiver, made["id"]) == {"refund.created", "refund.updated", "charge.refund.updated"}
    )
    assert "charge.refunded" in sandbox.event_types(intent)
    assert read(sandbox, made["id"])["destination_details"]["card"]["reference_status"] == "available"


def test_refunds_beyond_the_charge_are_refused(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay(amount=10000)["id"]
    refund(sandbox, intent, amount=3000)
    assert charge_of(sandbox, intent)["refunded"] is False
    status, error = sandbox.refusal("POST", "/v1/refunds", {"payment_intent": intent, "amount": 7001})
    assert (status, error["param"], error.get("code")) == (400, "amount", None)
    assert error["message"] == "Refund amount ($70.01) is greater than unrefunded amount on charge ($70.00)"
    assert refund(sandbox, intent)["amount"] == 7000
    assert charge_of(sandbox, intent)["refunded"] is True
    status, error = sandbox.refusal("POST", "/v1/refunds", {"payment_intent": intent})
    assert (status, error["code"]) == (400, "charge_already_refunded")
    assert len(sandbox.get("/v1/refunds", {"payment_intent": intent})["data"]) == 2


def test_refund_beyond_the_captured_amount_is_refused(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay(capture_method="manual", amount=10000)["id"]
    assert sandbox.refusal("POST", "/v1/refunds", {"payment_intent": intent})[0] == 400
    sandbox.post(f"/v1/payment_intents/{intent}/capture", {"amount_to_capture": 7000})
    assert sandbox.refusal("POST", "/v1/refunds", {"payment_intent": intent, "amount": 7001})[1]["param"] == "amount"
    assert refund(sandbox, intent)["amount"] == 7000


def test_pending_refund_succeeds_later(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    intent = sandbox.pay("pm_card_pendingRefund")["id"]
    made = refund(sandbox, intent, amount=1000)
    assert (made["status"], made["pending_reason"]) == ("pending", "processing")
    assert "pending_reason" not in wait_for_status(sandbox, made["id"], "succeeded")
    eventually(lambda: received_events(receiver, made["id"]) >= {"refund.created", "refund.updated"})


def test_succeeded_refund_may_fail_and_its_amount_returns(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    intent = sandbox.pay("pm_card_refundFail", amount=10000)["id"]
    made = refund(sandbox, intent, amount=3000)
    assert made["status"] == "succeeded"
    failed = wait_for_status(sandbox, made["id"], "failed")
    assert failed["failure_reason"] == "expired_or_canceled_card"
    line = failed["failure_balance_transaction"]
    assert (line["type"], line["reporting_category"], line["amount"]) == ("refund_failure", "refund_failure", 3000)
    assert (line["source"], line["fee"]) == (made["id"], 0)
    charge = charge_of(sandbox, intent)
    assert (charge["amount_refunded"], charge["refunded"]) == (0, False)
    eventually(lambda: "refund.failed" in received_events(receiver, made["id"]))
    assert refund(sandbox, intent)["amount"] == 10000


def test_only_a_refund_that_requires_action_is_cancelable(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay("pm_card_sandboxRefundRequiresAction")["id"]
    made = refund(sandbox, intent, amount=1000, instructions_email="p@example.com")
    assert made["status"] == "requires_action"
    assert made["next_action"]["display_details"]["email_sent"]["email_sent_to"] == "p@example.com"
    canceled = sandbox.post(f"/v1/refunds/{made['id']}/cancel")
    assert (canceled["status"], canceled["failure_reason"]) == ("canceled", "merchant_request")
    lines = sandbox.get("/v1/balance_transactions", {"source": made["id"]})["data"]
    assert sum(line["net"] for line in lines) == 0
    for other in (made["id"], refund(sandbox, sandbox.pay()["id"])["id"]):
        status, error = sandbox.refusal("POST", f"/v1/refunds/{other}/cancel")
        assert (status, error["message"]) == (400, "Canceling this refund is unsupported.")


def test_refund_is_canceled_if_its_payer_never_acts(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        made = refund(sandbox, sandbox.pay("pm_card_sandboxRefundRequiresAction")["id"])
        sandbox.control("clock", {"advance": 45 * 86400})
        assert wait_for_status(sandbox, made["id"], "failed")["failure_reason"] == "unknown"


def test_only_the_metadata_of_a_refund_is_changeable(sandbox: SandboxProcess) -> None:
    made = refund(sandbox, sandbox.pay()["id"], **{"metadata[a]": "1"})
    changed = sandbox.post(f"/v1/refunds/{made['id']}", {"metadata[b]": "2"})
    assert changed["metadata"] == {"a": "1", "b": "2"}
    assert sandbox.refusal("POST", f"/v1/refunds/{made['id']}", {"amount": 1}, is_valid=False)[0] == 400


# Refusals, lists, accounts


def test_refund_requires_an_existing_paid_payment(sandbox: SandboxProcess) -> None:
    status, error = sandbox.refusal("POST", "/v1/refunds", {"amount": 100})
    assert (status, "payment_intent or charge" in error["message"]) == (400, True)
    for form in ({"charge": "ch_none"}, {"payment_intent": "pi_none"}):
        assert sandbox.refusal("POST", "/v1/refunds", form)[1]["code"] == "resource_missing"
    status, error = sandbox.refusal("POST", "/v1/refunds", {"payment_intent": sandbox.create()})
    assert (status, "does not have a successful charge" in error["message"]) == (400, True)
    paid = sandbox.pay()["id"]
    for amount in (0, -5):
        status, error = sandbox.refusal("POST", "/v1/refunds", {"payment_intent": paid, "amount": amount})
        assert (status, error["code"]) == (400, "parameter_invalid_integer")


def test_refunds_are_listed_by_intent_and_by_charge(sandbox: SandboxProcess) -> None:
    account = "acct_of_refunds"
    intents = [sandbox.confirm(sandbox.create(account=account), account=account) for _ in range(2)]
    made = [
        sandbox.post("/v1/refunds", {"charge": intent["latest_charge"], "amount": amount}, account=account)["id"]
        for intent in intents
        for amount in (100, 200)
    ]

    def listed(**form: Any) -> list[str]:
        return [found["id"] for found in sandbox.get("/v1/refunds", form, account=account)["data"]]

    assert listed() == made[::-1]
    assert listed(payment_intent=intents[0]["id"]) == listed(charge=intents[0]["latest_charge"]) == made[1::-1]
    assert listed(payment_intent=intents[0]["id"], charge=intents[1]["latest_charge"]) == []
    assert listed(payment_intent="pi_none") == []
    assert sandbox.refusal("GET", f"/v1/refunds/{made[0]}")[1]["code"] == "resource_missing"


# Money


def test_payout_contains_refunds_and_their_failures(sandbox: SandboxProcess) -> None:
    account = "acct_paid_out_less"

    def confirm(card: str) -> str:
        intent = sandbox.create(card, account=account, amount=10000)
        sandbox.confirm(intent, account=account)
        return intent

    sandbox.post("/v1/refunds", {"payment_intent": confirm("pm_card_visa"), "amount": 2500}, account=account)
    sandbox.post("/v1/refunds", {"payment_intent": confirm("pm_card_refundFail"), "amount": 700}, account=account)
    net = 2 * 9680 - 2500

    def paid() -> list[Json]:
        payouts = sandbox.get("/v1/payouts", account=account)["data"]
        return payouts if sum(payout["amount"] for payout in payouts) == net else []

    lines = [
        line
        for payout in eventually(paid)
        for line in sandbox.get("/v1/balance_transactions", {"payout": payout["id"]}, account=account)["data"]
    ]
    assert {"charge", "refund", "refund_failure", "payout"} == {line["type"] for line in lines}
    assert sum(line["net"] for line in lines) == 0
    of_type = sandbox.get("/v1/balance_transactions", {"type": "refund"}, account=account)["data"]
    assert sorted(line["amount"] for line in of_type) == [-2500, -700]


def test_refund_is_converted_at_the_rate_of_its_charge(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--settlement-currency=usd") as sandbox:
        made = refund(sandbox, sandbox.pay(currency="eur", amount=10000)["id"], amount=5000)
        line = read(sandbox, made["id"])["balance_transaction"]
        assert (line["currency"], line["amount"], line["exchange_rate"]) == ("usd", -5425, 1.085)


# Dashboard and control API


def test_dashboard_refund_has_no_request_id_and_no_metadata(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    intent = sandbox.pay()["id"]
    made = sandbox.control("refunds", {"payment_intent": intent, "amount": 999, "reason": "fraudulent"})
    assert (made["status"], made["metadata"]) == ("succeeded", {})
    eventually(lambda: received_events(receiver, made["id"]))
    events = [event for _, event in receiver.received if event["data"]["object"].get("id") == made["id"]]
    assert events[0]["request"] == {"id": None, "idempotency_key": None}


def test_refund_outcome_can_be_set_by_control(sandbox: SandboxProcess) -> None:
    made = refund(sandbox, sandbox.pay()["id"])
    failed = sandbox.control(f"refunds/{made['id']}", {"outcome": "failed", "failure_reason": "declined"})
    assert (failed["status"], failed["failure_reason"]) == ("failed", "declined")
    waiting = refund(sandbox, sandbox.pay("pm_card_sandboxRefundRequiresAction")["id"])
    assert sandbox.control(f"refunds/{waiting['id']}", {"outcome": "succeeded"})["status"] == "succeeded"
    assert sandbox.client.post("/sandbox/refunds/re_none", json={"outcome": "failed"}).status_code == 404
    assert sandbox.client.post(f"/sandbox/refunds/{made['id']}", json={"outcome": "lost"}).status_code == 400


def test_summary_counts_active_refunds_and_names_doubles(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        assert sandbox.control("refunds") == []
        intent = sandbox.pay(amount=10000, **{"metadata[surety_payment]": "pay_1"})["id"]
        made = [
            refund(sandbox, intent, amount=100, **{"metadata[surety_refund]": demand})
            for demand in ("ref_1", "ref_2", "ref_2", "ref_3", "ref_3")
        ]
        sandbox.control(f"refunds/{made[-1]['id']}", {"outcome": "failed"})
        sandbox.control("refunds", {"payment_intent": intent, "amount": 50})
        assert sandbox.control("refunds/summary?metadata_key=surety_refund") == {
            "refunds": 5,
            "amounts": {"usd": 450},
            "payments": 1,
            "double": ["ref_2"],
        }
        assert sandbox.control("refunds")[0]["payment_metadata"] == {"surety_payment": "pay_1"}


# Faults


@pytest.mark.parametrize(
    ("fault", "refunds"),
    [("timeout_before", 0), ("timeout_after", 1), ("reset", 1), ("error_500_before", 0), ("error_500_after", 1),
     ("garbage_200", 1), ("rate_limit_429", 0)],
)  # fmt: skip
def test_refund_with_a_lost_response_can_be_found_and_is_made_once(
    sandbox: SandboxProcess, fault: str, refunds: int
) -> None:
    intent, key = sandbox.pay()["id"], next(keys)
    form = {"payment_intent": intent, "amount": 1000}
    sandbox.order("refunds.create", fault)
    with suppress(httpx.HTTPError):
        sandbox.client.post(
            "/v1/refunds",
            data=form,
            headers={"Authorization": "Bearer sk_test_surety", "Idempotency-Key": key},
            timeout=0.05,
        )
    assert len(sandbox.get("/v1/refunds", {"payment_intent": intent})["data"]) == refunds
    again = sandbox.send("POST", "/v1/refunds", form, key=key)
    assert again.status_code == (500 if fault.startswith("error_500") else 200)
    assert len(sandbox.get("/v1/refunds", {"payment_intent": intent})["data"]) == (
        refunds if fault.startswith("error_500") else 1
    )


def test_refunds_and_scheduled_actions_survive_a_kill(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--refund-seconds=1") as sandbox:
        intent = sandbox.pay("pm_card_refundFail")["id"]
        form = {"payment_intent": intent}
        first = sandbox.send("POST", "/v1/refunds", form, key="k")
        sandbox.kill()
        sandbox.start()
        assert sandbox.send("POST", "/v1/refunds", form, key="k").content == first.content
        wait_for_status(sandbox, first.json()["id"], "failed")
