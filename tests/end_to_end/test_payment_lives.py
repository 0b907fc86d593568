"""What comes after the charge, end to end: real processes, real HTTP, answers lost on the way, others at work too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded import temporary_database
from tests.support.http_client import SECRETS, Merchant, fresh, service
from tests.support.payments import Connection, ledger_of, path_of, violations
from tests.support.sandbox_process import Json, Sandbox, eventually, running_sandbox
from tests.support.workers import hasten, wait_for_worker, worker_process

WITHIN_SECONDS = 30.0


class House:
    """Surety's processes, the sandbox, and a merchant."""

    def __init__(self, conn: Connection, sandbox: Sandbox, url: str) -> None:
        self.conn, self.sandbox = conn, sandbox
        self.merchant = Merchant(conn, url)

    def pay(self, token: str = "pm_card_visa", **fields: Any) -> str:
        """A payment of 100.00 USD."""
        method = {"type": "card", "token": token}
        return str(self.merchant.pay(amount=10000, payment_method=method, **fields)["id"])

    def ask(self, path: str, **body: Any) -> Json:
        """The answer to a POST that is accepted, under a key of its own."""
        answer = self.send(path, **body)
        assert answer.is_success, answer.text
        told: Json = answer.json()
        return told

    def send(self, path: str, **body: Any) -> httpx.Response:
        return self.merchant.client.post(path, json=body, headers={"Idempotency-Key": fresh("key")})

    def becomes(self, payment: str, *states: str) -> Json:
        """The payment, once it is in one of the states."""
        return self.found(f"/v1/payments/{payment}", *states)

    def found(self, path: str, *states: str) -> Json:
        """What the path names, once it is in one of the states."""

        def look() -> Json | None:
            told = self.merchant.get(path)
            return told if told["state"] in states else None

        return eventually(look, WITHIN_SECONDS)

    def intent(self, payment: str) -> str:
        return str(self.merchant.get(f"/v1/payments/{payment}")["provider"]["id"])

    def refund_becomes(self, refund: str, state: str) -> Json:
        """The refund, once it is in the state."""
        return self.found(f"/v1/refunds/{refund}", state)

    def refunds_at_stripe(self, payment: str) -> list[Json]:
        refunds: list[Json] = self.sandbox.get("/v1/refunds", {"payment_intent": self.intent(payment)})["data"]
        return refunds

    def balances(self, payment: str, expected: dict[str, int]) -> None:
        """Waits until the payment's transfers come to these balances."""
        eventually(lambda: ledger_of(self.conn, payment) == expected, WITHIN_SECONDS)


@pytest.fixture(scope="module")
def house(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database(server, "surety_test"))
        deploy(database)
        conn = stack.enter_context(psycopg.connect(harden(database, "deploy"), autocommit=True))
        hasten(conn)
        api = stack.enter_context(service("api", database))
        webhooks = stack.enter_context(service("webhooks", database))
        told = (f"--webhook-url={webhooks.url}/stripe", f"--webhook-secret={SECRETS[0]}", "--hang-seconds=1")
        sandbox = stack.enter_context(running_sandbox(tmp_path_factory.mktemp("afterwards"), *told))
        stack.enter_context(worker_process(database, sandbox.url, SURETY_PROVIDER_TIMEOUT="1"))
        wait_for_worker(conn)
        running = House(conn, sandbox, api.url)
        stack.enter_context(running.merchant.client)
        yield running
        assert not violations(conn)


def test_a_hold_is_captured_in_part_and_the_rest_released(house: House) -> None:
    payment = house.pay(capture_method="manual")
    house.becomes(payment, "authorized")
    assert house.ask(f"/v1/payments/{payment}/capture", amount=7000)["state"] == "processing"
    assert house.becomes(payment, "settled")["amount_captured"] == 7000
    charge = house.sandbox.read(house.intent(payment), form={"expand[]": "latest_charge"})["latest_charge"]
    assert (charge["amount_captured"], charge["amount_refunded"]) == (7000, 0)
    assert ledger_of(house.conn, payment) == {"avail": 6727, "stripe": 6767, "rev": 273, "cost": 233}


def test_a_hold_that_is_called_off_takes_nothing(house: House) -> None:
    payment = house.pay(capture_method="manual")
    house.becomes(payment, "authorized")
    house.ask(f"/v1/payments/{payment}/cancel")
    house.becomes(payment, "canceled")
    assert house.sandbox.read(house.intent(payment))["cancellation_reason"] == "requested_by_customer"
    assert ledger_of(house.conn, payment) == {}


def test_a_part_is_given_back_before_or_after_it_is_settled(house: House) -> None:
    payment = house.pay()
    house.becomes(payment, "confirmed", "settled")
    asked = house.ask(f"/v1/payments/{payment}/refunds", amount=2500, reason="duplicate", metadata={"case": "7"})
    assert (asked["state"], asked["amount"], asked["payment"]) == ("pending", 2500, payment)
    house.refund_becomes(asked["id"], "succeeded")
    assert house.becomes(payment, "partially_refunded")["amount_refunded"] == 2500
    house.balances(payment, {"avail": 7125, "stripe": 7180, "rev": 375, "cost": 320})
    [at_stripe] = house.refunds_at_stripe(payment)
    assert (at_stripe["reason"], at_stripe["metadata"]["surety_refund"]) == ("duplicate", asked["id"])


def test_a_refund_that_comes_back_late_is_the_merchants_money_again(house: House) -> None:
    payment = house.pay("pm_card_refundFail")
    house.becomes(payment, "settled")
    asked = house.ask(f"/v1/payments/{payment}/refunds", amount=3000)
    failed = house.refund_becomes(asked["id"], "failed")
    assert failed["failure"]["code"] == "expired_or_canceled_card"
    assert house.becomes(payment, "settled")["amount_refunded"] == 0
    house.balances(payment, {"avail": 9625, "stripe": 9680, "rev": 375, "cost": 320})
    again = house.ask(f"/v1/payments/{payment}/refunds", amount=3000)
    assert again["id"] != asked["id"]


def test_a_refund_in_the_dashboard_is_known_and_booked(house: House) -> None:
    payment = house.pay()
    house.becomes(payment, "settled")
    house.sandbox.control("refunds", {"payment_intent": house.intent(payment), "amount": 10000})
    house.becomes(payment, "refunded")
    [found] = house.merchant.get("/v1/refunds", payment=payment)["data"]
    assert (found["state"], found["amount"]) == ("succeeded", 10000)
    house.balances(payment, {"avail": -375, "stripe": -320, "rev": 375, "cost": 320})
    assert house.send(f"/v1/payments/{payment}/refunds", amount=1).status_code in (400, 409)


LOST = ("timeout_before", "timeout_after", "reset", "error_500_before", "error_500_after", "garbage_200")


# Every fault of these two calls: tests/support/provider_faults.py.
def test_a_refund_whose_answer_is_lost_is_made_once(house: House) -> None:
    payment = house.pay()
    house.becomes(payment, "settled")
    house.sandbox.order("refunds.create", "timeout_after")
    asked = house.ask(f"/v1/payments/{payment}/refunds", amount=2500)
    house.refund_becomes(asked["id"], "succeeded")
    assert [refund["amount"] for refund in house.refunds_at_stripe(payment)] == [2500]
    house.balances(payment, {"avail": 7125, "stripe": 7180, "rev": 375, "cost": 320})


def test_a_capture_whose_answer_is_lost_is_made_once(house: House) -> None:
    payment = house.pay(capture_method="manual")
    house.becomes(payment, "authorized")
    house.sandbox.order("payment_intents.capture", "timeout_after")
    house.ask(f"/v1/payments/{payment}/capture", amount=7000)
    assert house.becomes(payment, "settled")["amount_captured"] == 7000
    house.balances(payment, {"avail": 6727, "stripe": 6767, "rev": 273, "cost": 233})


def disputed(house: House) -> tuple[str, str]:
    """A settled payment that is disputed, and the dispute at the provider."""
    payment = house.pay()
    house.becomes(payment, "settled")
    dispute = house.sandbox.control("disputes", {"payment_intent": house.intent(payment)})
    house.becomes(payment, "disputed")
    house.balances(
        payment, {"avail": -1875, "held": 10000, "network": 10000, "stripe": -1820, "rev": 1875, "cost": 1820}
    )
    return payment, str(dispute["id"])


def test_a_dispute_that_is_lost_takes_amount_and_fee(house: House) -> None:
    payment, dispute = disputed(house)
    house.sandbox.control(f"disputes/{dispute}", {"outcome": "lost"})
    house.becomes(payment, "reversed")
    house.balances(payment, {"avail": -1875, "stripe": -1820, "rev": 1875, "cost": 1820})
    house.sandbox.control(f"disputes/{dispute}", {"outcome": "reinstated"})
    house.becomes(payment, "settled")
    house.balances(payment, {"avail": 8125, "stripe": 8180, "rev": 1875, "cost": 1820})


def test_a_dispute_that_is_won_takes_the_fee_only(house: House) -> None:
    payment, dispute = disputed(house)
    house.sandbox.control(f"disputes/{dispute}", {"outcome": "won"})
    house.becomes(payment, "settled")
    house.balances(payment, {"avail": 8125, "stripe": 8180, "rev": 1875, "cost": 1820})


def test_an_inquiry_changes_nothing(house: House) -> None:
    payment = house.pay()
    house.becomes(payment, "settled")
    told = {"payment_intent": house.intent(payment), "inquiry": True}
    dispute = house.sandbox.control("disputes", told)
    house.sandbox.control(f"disputes/{dispute['id']}", {"outcome": "closed"})
    heard = "select count(*) from surety.inbox where type like 'charge.dispute.%%' and body like %s"
    eventually(lambda: (house.conn.execute(heard, (f"%{dispute['id']}%",)).fetchone() or (0,))[0] == 2)
    assert path_of(house.conn, payment)[-1] == "settled"
    assert ledger_of(house.conn, payment) == {"avail": 9625, "stripe": 9680, "rev": 375, "cost": 320}


def answered(house: House, evidence: str, fault: str | None = None) -> str:
    """A disputed payment whose merchant has submitted evidence."""
    payment, _ = disputed(house)
    [dispute] = house.merchant.get("/v1/disputes", payment=payment)["data"]
    assert (dispute["status"], dispute["amount"], dispute["payment"]) == ("needs_response", 10000, payment)
    if fault:
        house.sandbox.order("disputes.update", fault)
    told = {"uncategorized_text": evidence, "customer_name": "Ada"}
    house.ask(f"/v1/disputes/{dispute['id']}/evidence", evidence=told, submit=True)
    return payment


def test_evidence_that_convinces_the_bank_wins_the_dispute(house: House) -> None:
    payment = answered(house, "winning_evidence")
    house.becomes(payment, "settled")
    house.balances(payment, {"avail": 8125, "stripe": 8180, "rev": 1875, "cost": 1820})
    [dispute] = house.merchant.get("/v1/disputes", payment=payment)["data"]
    assert dispute["status"] == "won"


def test_evidence_that_does_not_convince_it_loses_the_dispute(house: House) -> None:
    house.becomes(answered(house, "losing_evidence"), "reversed")


@pytest.mark.parametrize("fault", LOST)
def test_evidence_whose_answer_is_lost_is_submitted_once(house: House, fault: str) -> None:
    payment = answered(house, "winning_evidence", fault)
    house.becomes(payment, "settled")
    [at_stripe] = house.sandbox.get("/v1/disputes", {"payment_intent": house.intent(payment)})["data"]
    assert (at_stripe["status"], at_stripe["evidence_details"]["submission_count"]) == ("won", 1)
