"""The sandbox's control API."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sandbox_process import running_sandbox
from tests.support.workers import ROOT


def test_charges_summary_names_payments_charged_twice(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("url", ["https://shop.example/stripe", "shop.example", "http://", "http://host:x/stripe"])
def test_address_for_webhooks_that_the_sandbox_cannot_use_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app.sandbox", "--webhook-url", url],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "Invalid value for '--webhook-url'" in ended.stderr and "Traceback" not in ended.stderr
