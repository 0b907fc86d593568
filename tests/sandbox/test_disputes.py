"""The sandbox's disputes: inquiries, chargebacks, evidence, every decision of the bank, the money."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sandbox_process import (
    Json,
    SandboxProcess,
    WebhookReceiver,
    eventually,
    running_sandbox,
)
from tests.support.stripe_description import check_event


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, receiver: WebhookReceiver) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox"), webhook_url=receiver.url) as running:
        yield running


def disputed(sandbox: SandboxProcess, card: str = "pm_card_createDispute", **more: Any) -> Json:
    """The dispute of a payment with this card, once there is one."""
    return dispute_of(sandbox, sandbox.pay(card, **more)["id"])


def dispute_of(sandbox: SandboxProcess, intent: str) -> Json:
    (found,) = eventually(lambda: sandbox.get("/v1/disputes", {"payment_intent": intent})["data"])
    return dict(found)


def read(sandbox: SandboxProcess, dispute: Json) -> Json:
    return sandbox.get(f"/v1/disputes/{dispute['id']}")


def wait_for_status(sandbox: SandboxProcess, dispute: Json, status: str) -> Json:
    """The dispute, once it has that status."""
    return eventually(lambda: (current := read(sandbox, dispute))["status"] == status and current)


def answer(sandbox: SandboxProcess, dispute: Json, text: str, **more: Any) -> Json:
    return sandbox.post(f"/v1/disputes/{dispute['id']}", {"evidence[uncategorized_text]": text, **more})


def decide(sandbox: SandboxProcess, dispute: Json, outcome: str, **more: Any) -> Json:
    decided: Json = sandbox.control(f"disputes/{dispute['id']}", {"outcome": outcome, **more})
    return decided


def nets(dispute: Json) -> list[int]:
    return [line["net"] for line in dispute["balance_transactions"]]


def received_events(receiver: WebhookReceiver, dispute: Json) -> list[str]:
    """Types of the events about a dispute, each in Stripe's shape, in order of arrival."""
    events = [event for _, event in list(receiver.received) if event["data"]["object"].get("id") == dispute["id"]]
    for event in events:
        check_event(event)
    return [event["type"].removeprefix("charge.dispute.") for event in events]


def test_chargeback_withdraws_amount_and_fee_and_forbids_refunds(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay("pm_card_createDispute", amount=10000)["id"]
    dispute = dispute_of(sandbox, intent)
    assert (dispute["status"], dispute["reason"], dispute["amount"]) == ("needs_response", "fraudulent", 10000)
    assert dispute["evidence_details"]["due_by"] > dispute["created"]
    (line,) = dispute["balance_transactions"]
    assert (line["type"], line["reporting_category"], line["source"]) == ("adjustment", "dispute", dispute["id"])
    assert (line["amount"], line["fee"], line["net"]) == (-10000, 1500, -11500)
    charge = sandbox.get(f"/v1/charges/{dispute['charge']}")
    assert (charge["disputed"], charge["refunded"]) == (True, False)
    status, error = sandbox.refusal("POST", "/v1/refunds", {"payment_intent": intent})
    assert (status, error["code"]) == (400, "charge_disputed")


@pytest.mark.parametrize(
    ("card", "reason"),
    [("pm_card_createDispute", "fraudulent"), ("pm_card_createDisputeProductNotReceived", "product_not_received")],
)
def test_card_determines_the_dispute_reason(sandbox: SandboxProcess, card: str, reason: str) -> None:
    assert disputed(sandbox, card)["reason"] == reason


def test_uncaptured_authorization_is_not_disputed(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay("pm_card_createDispute", capture_method="manual", amount=10000)["id"]
    assert sandbox.get("/v1/disputes", {"payment_intent": intent})["data"] == []
    sandbox.post(f"/v1/payment_intents/{intent}/capture", {"amount_to_capture": 7000})
    assert dispute_of(sandbox, intent)["amount"] == 7000


def test_winning_evidence_reinstates_the_amount_but_not_the_fee(
    sandbox: SandboxProcess, receiver: WebhookReceiver
) -> None:
    dispute = disputed(sandbox, amount=10000)
    assert answer(sandbox, dispute, "winning_evidence")["status"] == "under_review"
    won = wait_for_status(sandbox, dispute, "won")
    assert nets(won) == [-11500, 10000]
    assert won["balance_transactions"][1]["reporting_category"] == "dispute_reversal"
    assert won["is_charge_refundable"] is True
    expected = ["created", "funds_withdrawn", "updated", "funds_reinstated", "closed"]
    eventually(lambda: sorted(received_events(receiver, dispute)) == sorted(expected))
    assert sandbox.post("/v1/refunds", {"payment_intent": dispute["payment_intent"]})["amount"] == 10000


def test_losing_evidence_reinstates_nothing(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox, amount=10000)
    answer(sandbox, dispute, "losing_evidence")
    assert nets(wait_for_status(sandbox, dispute, "lost")) == [-11500]
    assert sandbox.refusal("POST", "/v1/refunds", {"charge": dispute["charge"]})[1]["code"] == "charge_disputed"


def test_evidence_may_be_saved_repeatedly_and_submitted_once(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox)
    path = f"/v1/disputes/{dispute['id']}"
    staged = sandbox.post(path, {"evidence[customer_name]": "Ada", "submit": "false"})
    assert (staged["status"], staged["evidence_details"]["has_evidence"]) == ("needs_response", True)
    assert staged["evidence_details"]["submission_count"] == 0
    submitted = sandbox.post(path, {"evidence[product_description]": "shoes", "submit": "true"})
    assert submitted["status"] == "under_review"
    assert (submitted["evidence"]["customer_name"], submitted["evidence_details"]["submission_count"]) == ("Ada", 1)
    assert sandbox.refusal("POST", path, {"evidence[customer_name]": "Bob"})[0] == 400
    assert sandbox.post(path, {"metadata[a]": "1"})["metadata"] == {"a": "1"}
    assert read(sandbox, dispute)["evidence"]["customer_name"] == "Ada"


def test_unknown_evidence_is_refused_by_name(sandbox: SandboxProcess) -> None:
    form = {"evidence[colour]": "red"}
    status, error = sandbox.refusal("POST", f"/v1/disputes/{disputed(sandbox)['id']}", form, is_valid=False)
    assert (status, error["param"]) == (400, "evidence[colour]")


def test_accepted_dispute_takes_no_more_evidence(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox)
    assert sandbox.post(f"/v1/disputes/{dispute['id']}/close")["status"] == "lost"
    for path in (f"/v1/disputes/{dispute['id']}/close", f"/v1/disputes/{dispute['id']}"):
        status, error = sandbox.refusal("POST", path, {} if path.endswith("close") else {"metadata[a]": "1"})
        assert (status, error["message"]) == (400, "This dispute is already closed")


def test_unanswered_dispute_is_lost_at_its_deadline(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        dispute = disputed(sandbox)
        sandbox.control("clock", {"advance": 8 * 86400})
        assert wait_for_status(sandbox, dispute, "lost")["evidence_details"]["past_due"] is True


# Inquiries


def test_inquiry_moves_no_money_and_permits_refunds(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox, "pm_card_createDisputeInquiry")
    assert (dispute["status"], dispute["balance_transactions"]) == ("warning_needs_response", [])
    assert dispute["payment_method_details"]["card"]["case_type"] == "inquiry"
    assert sandbox.post("/v1/refunds", {"charge": dispute["charge"], "amount": 100})["status"] == "succeeded"
    answer(sandbox, dispute, "winning_evidence")
    assert nets(wait_for_status(sandbox, dispute, "warning_closed")) == []


def test_escalated_inquiry_withdraws_the_amount_and_fails_pending_refunds(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox, "pm_card_createDisputeInquiry", amount=10000)
    answer(sandbox, dispute, "escalate_inquiry_evidence")
    assert nets(wait_for_status(sandbox, dispute, "needs_response")) == [-11500]
    intent = sandbox.pay("pm_card_sandboxRefundRequiresAction")["id"]
    refund = sandbox.post("/v1/refunds", {"payment_intent": intent, "amount": 999})
    opened = sandbox.control("disputes", {"payment_intent": intent})
    failed = sandbox.get(f"/v1/refunds/{refund['id']}")
    assert (failed["status"], failed["failure_reason"]) == ("failed", "charge_for_pending_refund_disputed")
    assert opened["amount"] == 4000


def test_unescalated_inquiry_closes_after_120_days(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        dispute = disputed(sandbox, "pm_card_createDisputeInquiry")
        sandbox.control("clock", {"advance": 8 * 86400})
        assert eventually(lambda: read(sandbox, dispute)["evidence_details"]["past_due"])
        sandbox.control("clock", {"advance": 112 * 86400})
        assert wait_for_status(sandbox, dispute, "warning_closed")


# Decisions of banks


DECISIONS: list[tuple[list[tuple[str, Json]], str, list[int]]] = [
    ([("won", {})], "won", [-11500, 10000]),
    ([("lost", {})], "lost", [-11500]),
    ([("partly_lost", {"returned": 4000})], "lost", [-11500, 4000]),
    ([("partly_lost", {"returned": 4000}), ("reinstated", {})], "won", [-11500, 4000, 6000]),
    ([("lost", {}), ("reinstated", {})], "won", [-11500, 10000]),
    ([("lost", {}), ("adjusted", {"returned": 50})], "lost", [-11500, 50]),
    ([("lost", {}), ("adjusted", {"returned": 50}), ("adjusted", {"returned": 60})], "lost", [-11500, 50, 60]),
    ([("lost", {}), ("appealed", {})], "appeal_needs_response", [-11500]),
    ([("lost", {}), ("appealed", {}), ("won", {})], "won", [-11500, 10000]),
    ([("lost", {}), ("appealed", {}), ("lost", {})], "lost", [-11500]),
]


@pytest.mark.parametrize(("decisions", "status", "moved"), DECISIONS)
def test_bank_decision_moves_money_and_status(
    sandbox: SandboxProcess, decisions: list[tuple[str, Json]], status: str, moved: list[int]
) -> None:
    dispute = sandbox.control("disputes", {"payment_intent": sandbox.pay(amount=10000)["id"]})
    for outcome, more in decisions:
        decide(sandbox, dispute, outcome, **more)
    ended = read(sandbox, dispute)
    assert (ended["status"], nets(ended)) == (status, moved)


def test_appeal_accepts_evidence(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox)
    decide(sandbox, dispute, "lost")
    decide(sandbox, dispute, "appealed")
    assert answer(sandbox, dispute, "winning_evidence")["status"] == "appeal_under_review"
    assert wait_for_status(sandbox, dispute, "won")


def test_inquiry_may_be_prevented(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox, "pm_card_createDisputeInquiry", amount=10000)
    assert decide(sandbox, dispute, "prevented")["status"] == "prevented"
    assert nets(read(sandbox, dispute)) == [-10000]


@pytest.mark.parametrize("outcome", ["reinstated", "appealed", "escalated", "closed", "partly_lost", "adjusted"])
def test_impossible_decision_is_refused(sandbox: SandboxProcess, outcome: str) -> None:
    path = f"/sandbox/disputes/{disputed(sandbox)['id']}"
    assert sandbox.client.post(path, json={"outcome": outcome}).status_code == 400


def test_dispute_amount_is_at_most_the_captured_amount(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay(amount=10000)["id"]
    sandbox.post("/v1/refunds", {"payment_intent": intent, "amount": 3000})
    assert sandbox.control("disputes", {"payment_intent": intent})["amount"] == 7000
    refused = sandbox.client.post("/sandbox/disputes", json={"payment_intent": intent, "amount": 10001})
    assert refused.status_code == 400
    assert sandbox.client.post("/sandbox/disputes", json={"payment_intent": "pi_none"}).status_code == 404


def test_balance_transactions_of_disputes_are_not_listed_by_source(sandbox: SandboxProcess) -> None:
    dispute = disputed(sandbox)
    assert sandbox.get("/v1/balance_transactions", {"source": dispute["id"]})["data"] == []
    (line,) = dispute["balance_transactions"]
    expanded = sandbox.get(f"/v1/balance_transactions/{line['id']}", {"expand[]": "source"})
    assert expanded["source"]["id"] == dispute["id"]


def test_dispute_survives_a_kill(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--decision-seconds=1") as sandbox:
        dispute = disputed(sandbox)
        answer(sandbox, dispute, "winning_evidence")
        sandbox.kill()
        sandbox.start()
        assert nets(wait_for_status(sandbox, dispute, "won"))[1:] == [4999]


# Warnings


def test_early_fraud_warning_is_actionable_until_refunded_or_disputed(
    sandbox: SandboxProcess, receiver: WebhookReceiver
) -> None:
    intent = sandbox.pay("pm_card_createIssuerFraudRecord")["id"]
    path = "/v1/radar/early_fraud_warnings"
    (warning,) = eventually(lambda: sandbox.get(path, {"payment_intent": intent})["data"])
    assert warning["actionable"] is True
    sandbox.post("/v1/refunds", {"payment_intent": intent})
    assert sandbox.get(f"{path}/{warning['id']}")["actionable"] is False
    # Webhooks may overtake each other, as Stripe's may.
    types = ["radar.early_fraud_warning.created", "radar.early_fraud_warning.updated"]
    eventually(lambda: sorted(type for type in receiver.types(intent) if type.startswith("radar")) == types)
    assert sandbox.refusal("GET", f"{path}/issfr_none")[1]["message"] == "No such early fraud warning: 'issfr_none'"
    late = sandbox.control("fraud-warnings", {"payment_intent": intent})
    assert late["actionable"] is False


def test_events_can_be_read_for_30_days(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        sandbox.create()
        assert len(sandbox.get("/v1/events")["data"]) == 1
        sandbox.control("clock", {"advance": 30 * 86400 + 2})
        assert sandbox.get("/v1/events")["data"] == []
        assert sandbox.get("/v1/events", {"created[gte]": 1})["data"] == []


def test_payout_contains_disputes_and_their_reversals(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--payout-seconds=0.3") as sandbox:
        for outcome in ("won", "lost"):
            dispute = sandbox.control("disputes", {"payment_intent": sandbox.pay(amount=10000)["id"]})
            decide(sandbox, dispute, outcome)
        sandbox.pay(amount=50000)
        net = 2 * 9680 + 48520 - 11500 - 1500

        def paid() -> list[Json]:
            payouts = sandbox.get("/v1/payouts")["data"]
            return payouts if sum(payout["amount"] for payout in payouts) == net else []

        lines = [
            line
            for payout in eventually(paid)
            for line in sandbox.get("/v1/balance_transactions", {"payout": payout["id"]})["data"]
        ]
        categories = [line["reporting_category"] for line in lines if line["type"] == "adjustment"]
        assert sorted(categories) == ["dispute", "dispute", "dispute_reversal"]
        balance = sandbox.get("/v1/balance")
        assert sum(line["amount"] for line in balance["available"] + balance["pending"]) == 0


@pytest.mark.parametrize(
    ("fault", "status"), [("error_500_before", "needs_response"), ("error_500_after", "under_review")]
)
def test_evidence_with_a_lost_response_can_be_looked_up(sandbox: SandboxProcess, fault: str, status: str) -> None:
    dispute = disputed(sandbox)
    sandbox.order("disputes.update", fault)
    path, form = f"/v1/disputes/{dispute['id']}", {"evidence[customer_name]": "Ada"}
    assert sandbox.send("POST", path, form, key=f"evidence-{fault}").status_code == 500
    assert read(sandbox, dispute)["status"] == status
    assert sandbox.send("POST", path, form, key=f"evidence-{fault}").status_code == 500
    assert sandbox.send("POST", path, form).status_code == (400 if status == "under_review" else 200)
