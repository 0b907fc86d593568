"""The sandbox's mode: one for all objects and events, and for the keys that it accepts."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sandbox_process import eventually, running_receiver, running_sandbox


def objects_with_mode(value: Any) -> Iterator[tuple[str, bool]]:
    """(kind, livemode) of each object with `livemode` within a JSON value."""
    if isinstance(value, dict):
        if "livemode" in value:
            yield value["object"], value["livemode"]
        for part in value.values():
            yield from objects_with_mode(part)
    elif isinstance(value, list):
        for part in value:
            yield from objects_with_mode(part)


@pytest.mark.parametrize("options", [(), ("--live",)], ids=["test", "live"])
def test_all_objects_and_events_have_the_mode_of_the_sandbox(tmp_path: Path, options: tuple[str, ...]) -> None:
    with (
        running_receiver() as receiver,
        running_sandbox(tmp_path, "--payout-seconds=0.2", *options, webhook_url=receiver.url) as sandbox,
    ):
        for card in ("pm_card_visa", "pm_card_createDispute", "pm_card_createIssuerFraudRecord"):
            intent = sandbox.pay(card, key=card)
        sandbox.post("/v1/refunds", {"payment_intent": intent["id"], "amount": 100}, key="refund")
        wanted = {"charge.dispute.created", "radar.early_fraud_warning.created", "payout.paid", "balance.available"}
        eventually(lambda: wanted <= {event["type"] for _, event in receiver.received}, 20)
        read = [
            [event for _, event in receiver.received],
            sandbox.get("/v1/events", {"limit": 100}),
            sandbox.get("/v1/payment_intents", {"expand[]": "data.latest_charge"}),
            sandbox.get("/v1/balance"),
        ]
    found = set(objects_with_mode(read))
    assert {livemode for _, livemode in found} == {options == ("--live",)}
    kinds = {"payment_intent", "charge", "dispute", "payout", "balance", "event", "radar.early_fraud_warning"}
    assert kinds <= {kind for kind, _ in found}


def test_sandbox_in_live_mode_accepts_no_real_key(tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--live") as sandbox:

        def status(key: str) -> int:
            answered = sandbox.client.get("/v1/balance", auth=(key, ""))
            if answered.status_code != 200:
                error = answered.json()["error"]
                assert error["message"].startswith(f"Invalid API Key provided: {key[:8]}*")
            return answered.status_code

        assert {status(key) for key in ("sk_live_sandbox", "rk_live_sandbox", "sk_live_sandbox_2")} == {200}
        refused = ("sk_live_123", "rk_live_123", "sk_live_sandbox2", "sk_test_sandbox", "rk_test_1")
        assert {status(key) for key in refused} == {401}


@pytest.mark.parametrize("first", [(), ("--live",)], ids=["test", "live"])
def test_memory_keeps_its_mode(tmp_path: Path, first: tuple[str, ...]) -> None:
    with running_sandbox(tmp_path, *first) as sandbox:
        intent = sandbox.create()
    with running_sandbox(tmp_path, *first) as sandbox:
        assert sandbox.read(intent)["id"] == intent
    other = [] if first else ["--live"]
    memory = f"--memory={tmp_path / 'sandbox.sqlite'}"
    ended = subprocess.run(
        [sys.executable, "-m", "app.sandbox", memory, *other], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert f"is the memory of a sandbox in {'live' if first else 'test'} mode" in ended.stderr
