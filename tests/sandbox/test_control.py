"""The sandbox's control API."""

from pathlib import Path

from tests.support.sandbox_process import running_sandbox


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
