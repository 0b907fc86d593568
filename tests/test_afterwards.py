"""What comes after the charge, end to end: real processes, real HTTP, answers lost on the way, others at work too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psycopg
import pytest

from db.connect import harden
from db.deploy import deploy
from db.server import temporary_database
from tests.front import SECRETS, Merchant, fresh, service
from tests.payments import Connection, ledger_of, violations
from tests.sandbox_process import Json, Sandbox, eventually, running_sandbox
from tests.working import hasten, wait_for_worker, worker_process

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


LOST = ("timeout_before", "timeout_after", "reset", "error_500_before", "error_500_after", "garbage_200")


@pytest.mark.parametrize("fault", LOST)
def test_a_capture_whose_answer_is_lost_is_made_once(house: House, fault: str) -> None:
    payment = house.pay(capture_method="manual")
    house.becomes(payment, "authorized")
    house.sandbox.order("payment_intents.capture", fault)
    house.ask(f"/v1/payments/{payment}/capture", amount=7000)
    assert house.becomes(payment, "settled")["amount_captured"] == 7000
    house.balances(payment, {"avail": 6727, "stripe": 6767, "rev": 273, "cost": 233})
