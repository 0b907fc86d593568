"""The sandbox's faults: ordered and drawn ones, webhooks, kills of the process."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from app.sandbox.faults import DEMO_FAULTS, FaultInjector
from tests.support.sandbox_process import (
    CARD_PAYMENT,
    KEY,
    SECRET,
    Json,
    SandboxProcess,
    WebhookReceiver,
    eventually,
    running_receiver,
    running_sandbox,
)
from tests.support.stripe_description import check_event

keys = (f"key-{number}" for number in count())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, receiver: WebhookReceiver) -> Iterator[SandboxProcess]:
    folder = tmp_path_factory.mktemp("sandbox")
    # Automatic payouts would emit events in between.
    options = (
        *("--hang-seconds=0.15", "--slow-seconds=0.2", "--reorder-seconds=0.3", "--delay-seconds=0.2"),
        "--payout-seconds=0",
    )
    with running_sandbox(folder, *options, webhook_url=receiver.url) as running:
        yield running


@pytest.fixture
def sandbox(shared: SandboxProcess) -> Iterator[SandboxProcess]:
    """The shared sandbox, without faults before and after."""
    yield shared
    shared.control("faults", {"profile": "none", "next": []})


def confirmation(intent: str) -> str:
    return f"/v1/payment_intents/{intent}/confirm"


def raw_confirm(sandbox: SandboxProcess, intent: str, key: str) -> httpx.Response:
    """A confirmation whose answer is not validated."""
    headers = {"Authorization": f"Bearer {KEY}", "Idempotency-Key": key}
    return sandbox.client.post(confirmation(intent), headers=headers)


def charges(sandbox: SandboxProcess, intent: str) -> list[Json]:
    listed: list[Json] = sandbox.get("/v1/charges", {"payment_intent": intent})["data"]
    return listed


def took_effect(sandbox: SandboxProcess, fault: str) -> tuple[int, int]:
    """The number of confirmations with a fault, and of those that took effect."""
    rows = sandbox.control("faults")["injected"]
    for row in rows:
        if (row["operation"], row["fault"]) == ("payment_intents.confirm", fault):
            return row["count"], row["took_effect"]
    return 0, 0


# Requests


@pytest.mark.parametrize(("fault", "effect"), [("timeout_before", 0), ("timeout_after", 1)])
def test_retry_after_a_timeout_charges_once(sandbox: SandboxProcess, fault: str, effect: int) -> None:
    intent, key = sandbox.create(), next(keys)
    sandbox.order("payment_intents.confirm", fault)
    with pytest.raises(httpx.TimeoutException):
        sandbox.send("POST", confirmation(intent), key=key, timeout=0.05)
    assert len(charges(sandbox, intent)) == effect
    assert took_effect(sandbox, fault) == (1, effect)
    retried = sandbox.send("POST", confirmation(intent), key=key)
    assert retried.json()["status"] == "succeeded"
    assert (retried.headers.get("idempotent-replayed") == "true") is bool(effect)
    assert len(charges(sandbox, intent)) == 1


def test_hanging_request_ends_with_a_closed_connection(sandbox: SandboxProcess) -> None:
    intent = sandbox.create()
    sandbox.order("payment_intents.confirm", "timeout_before")
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        sandbox.send("POST", confirmation(intent), key=next(keys))


def test_reset_cuts_the_answer_in_the_middle(sandbox: SandboxProcess) -> None:
    intent, key = sandbox.create(), next(keys)
    sandbox.order("payment_intents.confirm", "reset")
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        raw_confirm(sandbox, intent, key)
    assert took_effect(sandbox, "reset") == (1, 1)
    assert sandbox.confirm(intent, key=key)["status"] == "succeeded"


@pytest.mark.parametrize(("fault", "effect"), [("error_500_before", 0), ("error_500_after", 1)])
def test_error_500_is_stored_and_replayed(sandbox: SandboxProcess, fault: str, effect: int) -> None:
    intent, key = sandbox.create(), next(keys)
    sandbox.order("payment_intents.confirm", fault)
    first, again = (sandbox.send("POST", confirmation(intent), key=key) for _ in range(2))
    assert (first.status_code, again.status_code, again.content) == (500, 500, first.content)
    assert again.headers["idempotent-replayed"] == "true"
    assert first.json()["error"]["type"] == "api_error"
    assert len(charges(sandbox, intent)) == effect
    assert took_effect(sandbox, fault) == (1, effect)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("conflict_409", 409, "idempotency_key_in_use"), ("rate_limit_429", 429, "rate_limit")],
)
def test_unstored_refusal_may_be_retried_under_its_key(
    sandbox: SandboxProcess, fault: str, status: int, code: str
) -> None:
    intent, key = sandbox.create(), next(keys)
    sandbox.order("payment_intents.confirm", fault)
    refused = sandbox.send("POST", confirmation(intent), key=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert refused.headers["stripe-should-retry"] == "true"
    assert (refused.headers.get("retry-after") == "1") is (status == 429)
    assert charges(sandbox, intent) == []
    assert sandbox.confirm(intent, key=key)["status"] == "succeeded"


def test_garbled_answer_hides_a_request_that_took_effect(sandbox: SandboxProcess) -> None:
    intent, key = sandbox.create(), next(keys)
    sandbox.order("payment_intents.confirm", "garbage_200")
    answered = raw_confirm(sandbox, intent, key)
    assert answered.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        answered.json()
    assert sandbox.confirm(intent, key=key)["status"] == "succeeded"
    assert len(charges(sandbox, intent)) == 1


def test_key_of_a_slow_request_is_in_use(sandbox: SandboxProcess) -> None:
    intent, key = sandbox.create(), next(keys)
    sandbox.order("payment_intents.confirm", "slow")
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(raw_confirm, sandbox, intent, key)
        eventually(lambda: not sandbox.control("faults")["next"])
        refused = eventually(lambda: _conflict(sandbox, intent, key))
        assert refused.json()["error"]["code"] == "idempotency_key_in_use"
        assert slow.result().json()["status"] == "succeeded"
    assert len(charges(sandbox, intent)) == 1


def _conflict(sandbox: SandboxProcess, intent: str, key: str) -> httpx.Response | None:
    answered = sandbox.send("POST", confirmation(intent), key=key)
    return answered if answered.status_code == 409 else None


def test_webhook_may_arrive_before_the_answer(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    intent = sandbox.create()
    sandbox.order("payment_intents.confirm", "webhook_first")
    sandbox.confirm(intent)
    assert {"charge.succeeded", "payment_intent.succeeded"} <= set(receiver.types(intent))


def test_fault_may_be_ordered_for_several_requests(sandbox: SandboxProcess) -> None:
    first, second = sandbox.create(), sandbox.create()
    sandbox.order("payment_intents.confirm", "rate_limit_429", match=second, times=2)
    assert sandbox.confirm(first)["status"] == "succeeded"
    statuses = [sandbox.send("POST", confirmation(second)).status_code for _ in range(3)]
    assert statuses == [429, 429, 200]


def test_reads_may_fail(sandbox: SandboxProcess) -> None:
    sandbox.order("charges.list", "error_500_before")
    assert sandbox.send("GET", "/v1/charges").status_code == 500
    assert sandbox.send("GET", "/v1/charges").status_code == 200


def test_unknown_fault_is_refused_with_the_known_ones(sandbox: SandboxProcess) -> None:
    order = {"next": [{"operation": "payment_intents.confirm", "fault": "earthquake"}]}
    refused = sandbox.client.post("/sandbox/faults", json=order)
    assert refused.status_code == 400
    assert "timeout_before" in refused.json()["error"]["message"]


# Webhooks


def test_events_arrive_signed_and_in_stripes_shape(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    intent = sandbox.pay()["id"]
    eventually(lambda: "charge.updated" in receiver.types(intent))
    for raw, (signature, event) in zip(list(receiver.raw), list(receiver.received), strict=True):
        if event["data"]["object"].get("id") == intent:
            assert stripe.WebhookSignature.verify_header(raw.decode(), signature, SECRET, tolerance=300)
            check_event(event)
            assert (event["api_version"], event["livemode"], "account" in event) == ("2026-10-28.endive", False, False)


def test_event_names_its_connected_account_and_request(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    key = next(keys)
    intent = sandbox.create(account="acct_one", key=key)
    eventually(lambda: receiver.types(intent))
    (event,) = [event for _, event in receiver.received if event["data"]["object"]["id"] == intent]
    assert (event["account"], event["request"]["idempotency_key"]) == ("acct_one", key)


def test_refused_webhook_is_retried(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    # Events of earlier payments must not use up the refusals.
    eventually(lambda: sandbox.control("webhooks")["pending"] == 0)
    receiver.statuses = [500, 302]
    intent = sandbox.create()
    eventually(lambda: len(receiver.types(intent)) == 3)
    ids = {event["id"] for _, event in receiver.received if event["data"]["object"].get("id") == intent}
    assert len(ids) == 1


def deliveries(sandbox: SandboxProcess, receiver: WebhookReceiver, fault: str) -> list[str]:
    """Types of the webhooks of a payment whose success gets this fault, once none is pending."""
    sandbox.order("webhook:payment_intent.succeeded", fault)
    intent = sandbox.pay()["id"]
    eventually(lambda: "charge.updated" in receiver.types(intent))
    eventually(lambda: sandbox.control("webhooks")["pending"] == 0)
    return receiver.types(intent)


def test_lost_webhook_never_arrives(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    assert "payment_intent.succeeded" not in deliveries(sandbox, receiver, "lost")
    assert sandbox.control("webhooks")["lost"] == 1


def test_repeated_webhook_arrives_2_to_10_times(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    assert deliveries(sandbox, receiver, "repeated").count("payment_intent.succeeded") == 10
    by_chance = {FaultInjector(1, DEMO_FAULTS).repetitions(f"evt_{number}") for number in range(200)}
    assert by_chance == set(range(2, 11))


def test_webhook_fault_may_be_ordered_by_payment_id_or_metadata(
    sandbox: SandboxProcess, receiver: WebhookReceiver
) -> None:
    sandbox.order("webhook:payment_intent.created", "lost", match="the-second")
    first, second = (sandbox.create(**{"metadata[order]": name}) for name in ("the-first", "the-second"))
    sandbox.order("webhook:payment_intent.canceled", "lost", match=second)
    for intent in (first, second):
        sandbox.post(f"/v1/payment_intents/{intent}/cancel")
    eventually(lambda: sandbox.control("webhooks")["pending"] == 0)
    assert (receiver.types(first), receiver.types(second)) == (
        ["payment_intent.created", "payment_intent.canceled"], []
    )  # fmt: skip


def test_read_with_webhook_first_delivers_held_webhooks(sandbox: SandboxProcess, receiver: WebhookReceiver) -> None:
    sandbox.control("faults", {"next": [{"operation": "webhook:payment_intent.created", "fault": "reordered"}]})
    intent = sandbox.create()
    assert receiver.types(intent) == []
    sandbox.order("payment_intents.retrieve", "webhook_first", match=intent)
    sandbox.get(f"/v1/payment_intents/{intent}")
    assert receiver.types(intent) == ["payment_intent.created"]


@pytest.mark.parametrize("fault", ["reordered", "delayed"])
def test_held_webhook_arrives_after_later_ones(sandbox: SandboxProcess, receiver: WebhookReceiver, fault: str) -> None:
    before = sandbox.control("webhooks")["overtaken"]
    assert deliveries(sandbox, receiver, fault)[-1] == "payment_intent.succeeded"
    assert sandbox.control("webhooks")["overtaken"] > before


def test_refused_forged_webhook_is_followed_by_the_genuine_one(
    sandbox: SandboxProcess, receiver: WebhookReceiver
) -> None:
    intent = sandbox.create()
    eventually(lambda: sandbox.control("webhooks")["pending"] == 0)
    receiver.statuses = [400]
    sandbox.order("webhook:payment_intent.canceled", "forged")
    sandbox.post(f"/v1/payment_intents/{intent}/cancel")
    eventually(lambda: receiver.types(intent).count("payment_intent.canceled") == 2)
    forged, true = zip(receiver.raw[-2:], receiver.received[-2:], strict=True)
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.WebhookSignature.verify_header(forged[0].decode(), forged[1][0], SECRET)
    assert stripe.WebhookSignature.verify_header(true[0].decode(), true[1][0], SECRET)


# The payer


@pytest.mark.parametrize(("declines", "status"), [(0.0, "succeeded"), (1.0, "requires_payment_method")])
def test_simulated_payer_acts_automatically(tmp_path: Path, declines: float, status: str) -> None:
    with running_sandbox(tmp_path, "--auto-payer") as sandbox:
        sandbox.control("faults", {"profile": {"payer_declines": declines}})
        intent = sandbox.pay("pm_card_threeDSecure2Required")
        assert intent["status"] == "requires_action"
        assert eventually(lambda: sandbox.read(intent["id"])["status"] == status)


# Kills


def test_answers_and_scheduled_actions_survive_a_kill(tmp_path: Path) -> None:
    with running_receiver() as receiver:
        receiver.statuses = [503] * 4
        with running_sandbox(tmp_path, "--transaction-seconds=1", webhook_url=receiver.url) as sandbox:
            intent = sandbox.create()
            first = sandbox.send("POST", confirmation(intent), key="k")
            sandbox.control("clock", {"advance": 3600})
            sandbox.kill()
            sandbox.start()
            again = sandbox.send("POST", confirmation(intent), key="k")
            assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
            assert [charge["payment_intent"] for charge in sandbox.control("charges")] == [intent]
            assert sandbox.control("health")["now"] > time.time() + 3000
            eventually(lambda: "charge.updated" in receiver.types(intent))
            expected = {"payment_intent.created", "charge.succeeded", "payment_intent.succeeded", "charge.updated"}
            eventually(lambda: set(receiver.types(intent)) == expected)
            assert charges(sandbox, intent)[0]["balance_transaction"] is not None


def test_sandbox_stops_cleanly_while_a_request_hangs(tmp_path: Path) -> None:
    with running_sandbox(tmp_path) as sandbox:
        intent = sandbox.create()
        sandbox.order("payment_intents.confirm", "timeout_before")
        with pytest.raises(httpx.TimeoutException):
            sandbox.send("POST", confirmation(intent), timeout=0.05)
        assert sandbox.stop() == 0


# Drawn faults


def drawn(seed: int) -> list[str | None]:
    faults = FaultInjector(seed, DEMO_FAULTS)
    return [faults.of_request("payment_intents.confirm", f"pay_{n}:confirm", writes=True) for n in range(1000)]


def test_faults_follow_from_the_seed_and_the_request_alone() -> None:
    assert drawn(8311) == drawn(8311)
    assert drawn(8311) != drawn(8312)


def test_demo_profile_produces_the_faults_that_the_demo_reports() -> None:
    faults = FaultInjector(8311, DEMO_FAULTS)
    calls: list[Any] = [
        faults.of_request(f"payment_intents.{verb}", f"{n}", writes=True) for n in range(5000) for verb in ("a", "b")
    ]
    webhooks: list[Any] = [faults.of_webhook("charge.updated", f"evt_{n}") for n in range(15000)]
    # Ten times 500 payments with two writes and three webhooks each.
    assert 250 < calls.count("timeout_before") + calls.count("timeout_after") < 350
    assert 340 < webhooks.count("repeated") < 470
    assert 200 < webhooks.count("reordered") < 310
    assert 80 < webhooks.count("lost") < 160


def test_retry_draws_its_own_fault() -> None:
    faults = FaultInjector(8311, DEMO_FAULTS)
    calls = [faults.of_request("payment_intents.confirm", "the same", writes=True) for _ in range(200)]
    assert None in calls
    assert any(calls)


def test_same_seed_and_keys_give_the_same_ids(tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with running_sandbox(tmp_path / name) as sandbox:
            made.append(sandbox.post("/v1/payment_intents", CARD_PAYMENT, key="pay_1:create")["id"])
    assert made[0] == made[1]
