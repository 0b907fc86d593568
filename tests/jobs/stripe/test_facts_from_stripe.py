"""What Stripe's objects say, as facts: the objects are the sandbox's, which Stripe's description has judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from jobs.stripe.errors import ObjectUnreadable
from jobs.stripe.facts import (
    FactOrigin,
    amount_of_source,
    balance_transaction_facts,
    decline_fact,
    dispute_facts,
    intent_facts,
    payout_facts,
    redacted,
    refund_facts,
)
from jobs.stripe.shown import next_action
from jobs.stripe.webhook_events import SNAPSHOT_EVENTS, ObjectToFetch, StoredWebhook, interpret_webhook
from tests.support.payments import Connection
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox

Json = dict[str, Any]

ORIGIN = FactOrigin("acct_1", livemode=False, source="webhook", source_id="whk_1")
METADATA = {"metadata[surety_payment]": "pay_1", "metadata[surety_environment]": "env_1"}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    folder = tmp_path_factory.mktemp("facts")
    with running_sandbox(folder, "--settlement-currency=usd", "--payout-seconds=0") as sandbox:
        yield sandbox


def kinds(facts: list[Json]) -> dict[str, str]:
    """The object that each kind of fact is about."""
    assert len({fact["kind"] for fact in facts}) == len(facts)
    return {fact["kind"]: fact["object_id"] for fact in facts}


def test_every_fact_names_its_account_mode_source_and_payment(sandbox: SandboxProcess) -> None:
    intent = sandbox.read(sandbox.create(**METADATA))
    [fact] = intent_facts(intent, ORIGIN)
    assert fact == {
        "provider": "stripe",
        "account": "acct_1",
        "livemode": False,
        "object_id": intent["id"],
        "kind": "submitted",
        "metadata_payment": "pay_1",
        "metadata_environment": "env_1",
        "source": "webhook",
        "source_id": "whk_1",
        "intent": intent["id"],
        "objects": [intent["id"]],
        "currency": "usd",
        "amount_minor": 4999,
    }


def test_a_succeeded_intent_was_captured_by_its_charge(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay()
    facts = intent_facts(intent, ORIGIN)
    assert kinds(facts) == {"submitted": intent["id"], "captured": intent["latest_charge"]}
    captured = facts[1]
    assert captured["amount_minor"] == 4999
    assert captured["objects"] == [intent["id"], intent["latest_charge"]]


def test_a_capture_of_less_than_was_held_is_the_amount_received(sandbox: SandboxProcess) -> None:
    held = sandbox.pay(capture_method="manual")
    assert kinds(intent_facts(held, ORIGIN)) == {"submitted": held["id"], "authorized": held["latest_charge"]}
    assert intent_facts(held, ORIGIN)[1]["amount_minor"] == 4999
    taken = sandbox.post(f"/v1/payment_intents/{held['id']}/capture", {"amount_to_capture": 3000})
    assert [fact.get("amount_minor") for fact in intent_facts(taken, ORIGIN)] == [4999, 3000]


def test_requires_action_fact_contains_the_next_action(sandbox: SandboxProcess) -> None:
    id = sandbox.create("pm_card_threeDSecure2Required")
    intent = sandbox.confirm(id, {"return_url": "https://shop.example/"})
    facts = intent_facts(intent, ORIGIN)
    assert kinds(facts) == {"submitted": id, "action": id}
    action = facts[1]["data"]["next_action"]
    assert (action["type"], action["url"].split("?")[0]) == ("redirect", f"{sandbox.url}/3ds/{id}")


def test_script_is_an_action_only_of_a_payment_that_asked_for_it(sandbox: SandboxProcess) -> None:
    card = "pm_card_threeDSecure2Required"
    id = sandbox.create(card, **{"metadata[surety_authentication]": "script"})
    submitted, action = intent_facts(sandbox.confirm(id, {"use_stripe_sdk": "true"}), ORIGIN)
    assert (submitted["kind"], action["kind"], action["object_id"]) == ("submitted", "action", id)
    assert action["data"] == {"next_action": {"type": "script"}}
    intent = sandbox.confirm(other := sandbox.create(card))
    assert intent["next_action"]["type"] == "use_stripe_sdk"
    facts = intent_facts(intent, ORIGIN)
    assert kinds(facts) == {"submitted": other, "attempt_failed": other}
    assert facts[1]["data"]["failure"]["code"] == "authentication_required"


@pytest.mark.parametrize(
    ("action", "shown"),
    [
        (None, None),
        ({}, None),
        ({"type": None}, None),
        ({"type": "redirect_to_url"}, None),
        ({"type": "redirect_to_url", "redirect_to_url": None}, None),
        ({"type": "redirect_to_url", "redirect_to_url": {"url": None}}, None),
        (
            {"type": "redirect_to_url", "redirect_to_url": {"url": "https://b"}},
            {"type": "redirect", "url": "https://b"},
        ),
        ({"type": "card_await_notification"}, {"type": "card_await_notification"}),
    ],
)
def test_next_action_is_shown_only_as_far_as_it_is_answered(action: Any, shown: Any) -> None:
    assert next_action(action) == shown
    intent = {"id": "pi_1", "status": "requires_action", "currency": "usd", "amount": 4999, "metadata": {}}
    intent["next_action"] = action
    assert kinds(intent_facts(intent, ORIGIN)) == {"submitted": "pi_1", **({"action": "pi_1"} if shown else {})}


def test_declined_intent_stays_open_and_fails_once_canceled(sandbox: SandboxProcess) -> None:
    id = sandbox.create("pm_card_visa_chargeDeclinedInsufficientFunds")
    _, error = sandbox.refusal("POST", f"/v1/payment_intents/{id}/confirm")
    failure = {
        "code": "card_declined",
        "decline_code": "insufficient_funds",
        "message": "Your card has insufficient funds.",
    }
    result = decline_fact(error, ORIGIN, id, "usd")
    assert (result["kind"], result["object_id"], result["data"]) == ("attempt_failed", id, {"failure": failure})
    declined = intent_facts(sandbox.read(id), ORIGIN)
    assert kinds(declined) == {"submitted": id, "attempt_failed": id}
    assert {key: declined[1].get(key) for key in ("currency", "amount_minor", "data")} == {
        key: result.get(key) for key in ("currency", "amount_minor", "data")
    }, "each source gives the same fact"
    canceled = intent_facts(sandbox.post(f"/v1/payment_intents/{id}/cancel"), ORIGIN)
    assert kinds(canceled) == {"submitted": id, "failed": id}
    assert canceled[1]["data"] == {"failure": failure}


def test_an_intent_canceled_without_a_decline_was_canceled(sandbox: SandboxProcess) -> None:
    id = sandbox.create()
    canceled = sandbox.post(f"/v1/payment_intents/{id}/cancel", {"cancellation_reason": "abandoned"})
    assert kinds(intent_facts(canceled, ORIGIN)) == {"submitted": id, "canceled": id}


def settled(sandbox: SandboxProcess, **more: Any) -> Json:
    """A payment with its charge and that charge's balance transaction."""
    id = sandbox.pay(**more)["id"]
    expand = {"expand[]": "latest_charge.balance_transaction"}

    def with_money() -> Json | None:
        intent: Json = sandbox.read(id, form=expand)
        return intent if intent["latest_charge"]["balance_transaction"] else None

    return eventually(with_money)


def test_expanded_intent_yields_its_money_fact(sandbox: SandboxProcess) -> None:
    intent = settled(sandbox)
    charge = intent["latest_charge"]
    line = charge["balance_transaction"]
    money = {fact["kind"]: fact for fact in intent_facts(intent, ORIGIN)}["money"]
    assert (money["object_id"], money["amount_minor"], money["currency"]) == (line["id"], 4999, "usd")
    assert money["intent"] == intent["id"]
    assert money["data"] == {
        "category": "charge",
        "source": charge["id"],
        "fee": 175,
        "net": 4824,
        "available_at": datetime.fromtimestamp(line["available_on"], UTC).isoformat(),
    }


def test_exchanged_money_names_both_amounts(sandbox: SandboxProcess) -> None:
    intent = settled(sandbox, currency="eur")
    charge = intent["latest_charge"]
    line = charge["balance_transaction"]
    money = balance_transaction_facts(line, ORIGIN, source=charge)[0]
    assert (money["currency"], money["amount_minor"]) == ("usd", line["amount"])
    assert money["data"] | {"other_currency": "eur", "other_gross": 4999} == money["data"]
    assert money["data"]["rate"] == line["exchange_rate"]
    charge = settled(sandbox)["latest_charge"]
    [money, *_] = balance_transaction_facts(charge["balance_transaction"], ORIGIN, source=charge)
    assert "other_currency" not in money["data"]


HELD = {"id": "ch_1", "currency": "eur", "amount": 10000, "amount_captured": 7000, "metadata": {}}
LINE = {"id": "txn_1", "source": "ch_1", "fee": 0, "net": 0, "available_on": 1, "created": 1, "status": "pending"}


def line(category: str, amount: int, rate: float | None = 1.085, currency: str = "usd") -> Json:
    return LINE | {"reporting_category": category, "amount": amount, "exchange_rate": rate, "currency": currency}


@pytest.mark.parametrize(
    ("result", "of_source"),
    [
        (line("charge", 7595), 7000),
        (line("charge", 10850), 10000),
        (line("partial_capture_reversal", -3255), -3000),
        (line("dispute", -10900, 1.09), -10000),
        (line("dispute_reversal", 4340), 4000),
        (line("charge", 10850, None), 7000),
        (line("partial_capture_reversal", -3255, None), -3000),
        (line("charge", 10000, None, "eur"), 10000),
    ],
)
def test_exchanged_amount_has_the_sign_of_its_balance_transaction(result: Json, of_source: int) -> None:
    assert amount_of_source(result, HELD) == of_source


def test_rounded_exchange_rate_yields_the_exact_amount() -> None:
    yen = {"id": "re_1", "currency": "jpy", "amount": 9876543}
    assert amount_of_source(line("refund", -6617313, 0.67000), yen) == -9876543
    assert amount_of_source(line("refund", -6617300, 0.67), yen) == -9876543
    assert amount_of_source(line("refund", -5000000, 0.67), yen) == -7462687


def test_reversed_charge_is_a_return() -> None:
    [money, returned] = balance_transaction_facts(line("charge_failure", -5000, None, "eur"), ORIGIN, source=HELD)
    assert (money["kind"], money["amount_minor"], money["data"]["category"]) == ("money", -5000, "charge_failure")
    assert (returned["kind"], returned["amount_minor"], returned["currency"]) == ("returned", 5000, "eur")
    assert (returned["object_id"], returned["data"]) == ("txn_1", {"source": "ch_1"})


def test_available_money_is_a_fact_of_its_own(sandbox: SandboxProcess) -> None:
    id = sandbox.pay("pm_card_bypassPending")["latest_charge"]
    line = eventually(
        lambda: sandbox.get("/v1/balance_transactions", {"source": id, "expand[]": "data.source"})["data"]
    )[0]
    assert kinds(balance_transaction_facts(line, ORIGIN)) == {"money": line["id"], "available": line["id"]}
    pending = line | {"status": "pending"}
    assert kinds(balance_transaction_facts(pending, ORIGIN)) == {"money": line["id"]}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("pending", "refund_pending"),
        ("requires_action", "refund_action"),
        ("succeeded", "refund_succeeded"),
        ("failed", "refund_failed"),
        ("canceled", "refund_canceled"),
    ],
)
def test_refund_status_determines_the_fact(status: str, kind: str) -> None:
    refund = {
        "id": "re_1",
        "status": status,
        "amount": 500,
        "currency": "usd",
        "payment_intent": "pi_1",
        "metadata": {},
    }
    [fact] = refund_facts(refund, ORIGIN)
    assert (fact["kind"], fact["object_id"], fact["amount_minor"], fact["intent"]) == (kind, "re_1", 500, "pi_1")


def dispute(status: str, *amounts: int) -> Json:
    lines: list[Json] = [
        {
            "id": f"txn_{n}", "amount": amount, "fee": 1500 if amount < 0 else 0, "net": amount, "currency": "usd",
            "created": 1, "available_on": 1, "status": "available", "reporting_category": "dispute", "source": "dp_1",
        }
        for n, amount in enumerate(amounts)
    ]  # fmt: skip
    common: Json = {"amount": 5000, "currency": "usd", "payment_intent": "pi_1", "reason": "fraudulent", "metadata": {}}
    return {"id": "dp_1", "status": status, "balance_transactions": lines, **common}


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (dispute("warning_needs_response"), "dispute_flagged"),
        (dispute("warning_closed"), "dispute_flagged"),
        (dispute("needs_response", -5000), "dispute_opened"),
        (dispute("under_review", -5000), "dispute_opened"),
        (dispute("under_review"), "dispute_flagged"),
        (dispute("under_review", -5000, 5000), "dispute_flagged"),
        (dispute("won", -5000, 5000), "dispute_won"),
        (dispute("prevented"), "dispute_won"),
        (dispute("prevented", -5000, 5000), "dispute_won"),
        (dispute("prevented", -5000), "dispute_lost"),
        (dispute("lost", -5000), "dispute_lost"),
    ],
)
def test_dispute_status_and_money_determine_the_fact(result: Json, kind: str) -> None:
    facts = dispute_facts(result, ORIGIN, 7)
    assert [fact["kind"] for fact in facts if fact["object_id"] == "dp_1"] == [kind]
    assert facts[0]["revision"] == 7
    assert sum(fact["kind"] == "money" for fact in facts) == len(result["balance_transactions"])


def test_withdrawn_amount_is_in_the_currency_of_the_dispute() -> None:
    exchanged = {"currency": "usd", "exchange_rate": 1.085}
    result = dispute("lost", -5425, 2170)
    result |= {
        "currency": "eur",
        "balance_transactions": [transaction | exchanged for transaction in result["balance_transactions"]],
    }
    lost, *moved = dispute_facts(result, ORIGIN, 1)
    assert (lost["kind"], lost["amount_minor"], lost["currency"]) == ("dispute_lost", 3000, "eur")
    assert [fact["data"]["other_gross"] for fact in moved if fact["kind"] == "money"] == [-5000, 2000]


@pytest.mark.parametrize(
    ("amounts", "of_dispute"),
    [
        ((-7053,), (-6500,)),
        ((-7053, 3527), (-6500, 3250)),
        ((-7053, 54), (-6500, 50)),
        ((-7053, 7053), (-6500, 6500)),
        # The rate has moved between the withdrawal and the return.
        ((-7053, 7001), (-6500, 6500)),
        ((-7053, 54, 54), (-6500, 50, 50)),
        ((54, -7053), (50, -6500)),
    ],
)
def test_dispute_without_an_exchange_rate_implies_it(amounts: tuple[int, ...], of_dispute: tuple[int, ...]) -> None:
    result: Json = dispute("lost", *amounts) | {"object": "dispute", "amount": 6500, "currency": "eur"}
    transactions = [line | {"exchange_rate": None} for line in result["balance_transactions"]]
    lost, *moved = dispute_facts(result | {"balance_transactions": transactions}, ORIGIN, 1)
    assert (lost["kind"], lost["amount_minor"], lost["currency"]) == ("dispute_lost", -sum(of_dispute), "eur")
    money = [fact for fact in moved if fact["kind"] == "money"]
    assert tuple(fact["data"]["other_gross"] for fact in money) == of_dispute
    assert {fact["data"]["other_currency"] for fact in money} == {"eur"}


def test_adjustment_of_a_lost_dispute_returns_a_part_of_it() -> None:
    result: Json = dispute("lost", -5000, 50) | {"object": "dispute"}
    result["balance_transactions"][1]["reporting_category"] = "other_adjustment"
    lost, *moved = dispute_facts(result, ORIGIN, 1)
    assert lost["amount_minor"] == 4950
    assert [fact["data"]["category"] for fact in moved if fact["kind"] == "money"] == ["dispute", "dispute_reversal"]


def test_fee_of_a_dispute_is_no_part_of_the_disputed_amount() -> None:
    result = dispute("lost", -5000, -1500)
    result["balance_transactions"][1]["reporting_category"] = "fee"
    lost, *_ = dispute_facts(result, ORIGIN, 1)
    assert lost["amount_minor"] == 5000


@pytest.mark.parametrize(
    ("status", "kind"), [("paid", "payout"), ("in_transit", "payout"), ("failed", "payout_failed")]
)
def test_a_payout_belongs_to_no_payment(status: str, kind: str) -> None:
    payout = {"id": "po_1", "status": status, "amount": 9680, "currency": "usd", "created": 1, "arrival_date": 2}
    [fact] = payout_facts(payout, ORIGIN)
    assert (fact["kind"], fact["amount_minor"]) == (kind, 9680)
    assert not {"payment_id", "intent", "objects"} & fact.keys()


def test_every_fact_kind_exists_in_the_database(conn: Connection, sandbox: SandboxProcess) -> None:
    known = {row[0] for row in conn.execute("select kind from surety.fact_kinds").fetchall()}
    made = {fact["kind"] for fact in intent_facts(settled(sandbox), ORIGIN)}
    assert made <= known


def test_refund_with_an_unknown_status_is_pending_and_one_without_is_unreadable() -> None:
    refund: Json = {"id": "re_1", "status": "under_review", "amount": 1, "currency": "usd", "metadata": {}}
    [fact] = refund_facts(refund, ORIGIN)
    assert fact["kind"] == "refund_pending"
    with pytest.raises(ObjectUnreadable, match="no status"):
        refund_facts(refund | {"status": None}, ORIGIN)


def test_audit_snapshots_contain_no_secrets(sandbox: SandboxProcess) -> None:
    intent = settled(sandbox)
    assert intent["client_secret"]
    kept = redacted(intent)
    assert "secret" not in json.dumps(kept)
    assert kept["id"] == intent["id"]
    assert kept["latest_charge"] == intent["latest_charge"]["id"]
    assert not {"client_secret", "payment_method", "metadata", "description", "receipt_email"} & kept.keys()


def webhook(type: str, result: Json, version: str | None = "2026-10-28.endive") -> StoredWebhook:
    body = json.dumps({"api_version": version, "data": {"object": result}})
    return StoredWebhook("evt_1", "whk_1", "webhook", "acct_1", livemode=False, type=type, body=body)


INTENT = {
    "id": "pi_1", "object": "payment_intent", "amount": 1, "currency": "usd", "latest_charge": "ch_1", "metadata": {}
}  # fmt: skip
CHARGE = {"id": "ch_1", "object": "charge", "payment_intent": "pi_1", "balance_transaction": "txn_1"}


@pytest.mark.parametrize(
    ("type", "result", "fetched", "unless"),
    [
        ("payment_intent.payment_failed", INTENT, "pi_1", "pi_1"),
        ("charge.succeeded", CHARGE, "pi_1", "ch_1"),
        ("charge.captured", CHARGE, "pi_1", "ch_1"),
        ("charge.updated", CHARGE, "pi_1", "txn_1"),
        ("charge.failed", CHARGE, "pi_1", "pi_1"),
        ("charge.expired", CHARGE, "pi_1", "pi_1"),
        ("charge.pending", CHARGE, "pi_1", "pi_1"),
        ("charge.dispute.created", {"id": "dp_1", "object": "dispute"}, "dp_1", ""),
        ("charge.dispute.closed", {"id": "dp_1", "object": "dispute"}, "dp_1", ""),
        ("refund.failed", {"id": "re_1", "object": "refund"}, "re_1", ""),
    ],
)
def test_failures_disputes_and_thin_events_are_fetched(type: str, result: Json, fetched: str, unless: str) -> None:
    wanted = interpret_webhook(webhook(type, result))
    assert isinstance(wanted, ObjectToFetch)
    assert (wanted.source.id, wanted.unless_object) == (fetched, unless)


@pytest.mark.parametrize("type", SNAPSHOT_EVENTS)
def test_snapshot_event_is_trusted_only_in_our_api_version(type: str) -> None:
    result = {
        **INTENT,
        "status": "succeeded",
        "amount_received": 1,
        "object": type.partition(".")[0],
        "created": 1,
        "actionable": True,
        "fraud_type": "misc",
        "charge": "ch_1",
    }
    assert isinstance(interpret_webhook(webhook(type, result)), list)
    for other in ("2024-06-20", None):
        assert isinstance(interpret_webhook(webhook(type, result, other)), ObjectToFetch)


@pytest.mark.parametrize(
    ("type", "result"),
    [
        ("customer.created", {"id": "cus_1", "object": "customer"}),
        ("charge.refunded", CHARGE),
        ("charge.refund.updated", CHARGE),
        ("charge.updated", CHARGE | {"balance_transaction": None}),
        ("charge.succeeded", CHARGE | {"payment_intent": None}),
    ],
)
def test_irrelevant_event_is_ignored(type: str, result: Json) -> None:
    assert interpret_webhook(webhook(type, result)) == []
