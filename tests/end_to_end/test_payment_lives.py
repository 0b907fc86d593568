"""What comes after the charge, end to end: real processes, real HTTP, answers lost on the way, others at work too."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from tests.support.http_client import SECRETS, Merchant, running_server, unique_name
from tests.support.payments import Connection, ledger_of, path_of, violations
from tests.support.sandbox_process import Json, SandboxProcess, eventually, running_sandbox
from tests.support.workers import shorten_delays, wait_for_worker, worker_process

WITHIN_SECONDS = 30.0


class PaymentScenario:
    """Surety's processes, the sandbox, and a merchant."""

    def __init__(self, conn: Connection, sandbox: SandboxProcess, url: str) -> None:
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
        result: Json = answer.json()
        return result

    def send(self, path: str, **body: Any) -> httpx.Response:
        return self.merchant.client.post(path, json=body, headers={"Idempotency-Key": unique_name("key")})

    def wait_for_payment(self, payment: str, *states: str) -> Json:
        """The payment, once it is in one of the states."""
        return self.wait_for(f"/v1/payments/{payment}", *states)

    def wait_for(self, path: str, *states: str) -> Json:
        """What the path names, once it is in one of the states."""

        def look() -> Json | None:
            result = self.merchant.get(path)
            # A payment's exact state; a refund has a status only.
            return result if result.get("state", result["status"]) in states else None

        return eventually(look, WITHIN_SECONDS)

    def intent(self, payment: str) -> str:
        return str(self.merchant.get(f"/v1/payments/{payment}")["provider"]["id"])

    def wait_for_refund(self, refund: str, state: str) -> Json:
        """The refund, once it is in the state."""
        return self.wait_for(f"/v1/refunds/{refund}", state)

    def refunds_at_stripe(self, payment: str) -> list[Json]:
        refunds: list[Json] = self.sandbox.get("/v1/refunds", {"payment_intent": self.intent(payment)})["data"]
        return refunds

    def balances(self, payment: str, expected: dict[str, int]) -> None:
        """Waits until the payment's transfers come to these balances."""
        eventually(lambda: ledger_of(self.conn, payment) == expected, WITHIN_SECONDS)


@contextmanager
def running_scenario(server: str, folder: Path, *options: str) -> Generator[PaymentScenario]:
    """A scenario with processes and a database of its own; `options` are the sandbox's. No invariant is broken then.

    All of it is in live mode if the sandbox is.
    """
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database(server, "surety_test"))
        deploy(database)
        conn = stack.enter_context(psycopg.connect(harden(database, "deploy"), autocommit=True))
        conn.execute("select surety.set_livemode(%s)", ("--live" in options,))
        shorten_delays(conn)
        api = stack.enter_context(running_server("api", database))
        webhooks = stack.enter_context(running_server("webhooks", database))
        result = (f"--webhook-url={webhooks.url}/stripe", f"--webhook-secret={SECRETS[0]}", "--hang-seconds=1")
        sandbox = stack.enter_context(running_sandbox(folder, *result, *options))
        stack.enter_context(
            worker_process(database, sandbox.url, SURETY_PROVIDER_TIMEOUT="1", STRIPE_API_KEY=sandbox.api_key)
        )
        wait_for_worker(conn)
        running = PaymentScenario(conn, sandbox, api.url)
        stack.enter_context(running.merchant.client)
        yield running
        assert not violations(conn)


@pytest.fixture(scope="module")
def scenario(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaymentScenario]:
    with running_scenario(server, tmp_path_factory.mktemp("later")) as running:
        yield running


def test_partial_capture_releases_the_rest(scenario: PaymentScenario) -> None:
    payment = scenario.pay(capture_method="manual")
    scenario.wait_for_payment(payment, "authorized")
    assert scenario.ask(f"/v1/payments/{payment}/capture", amount=7000)["state"] == "processing"
    assert scenario.wait_for_payment(payment, "settled")["amount_captured"] == 7000
    charge = scenario.sandbox.read(scenario.intent(payment), form={"expand[]": "latest_charge"})["latest_charge"]
    assert (charge["amount_captured"], charge["amount_refunded"]) == (7000, 0)
    assert ledger_of(scenario.conn, payment) == {
        "available": 6727,
        "provider_balance": 6767,
        "fee_revenue": 273,
        "provider_cost": 233,
    }


def test_canceled_authorization_charges_nothing(scenario: PaymentScenario) -> None:
    payment = scenario.pay(capture_method="manual")
    scenario.wait_for_payment(payment, "authorized")
    scenario.ask(f"/v1/payments/{payment}/cancel")
    scenario.wait_for_payment(payment, "canceled")
    assert scenario.sandbox.read(scenario.intent(payment))["cancellation_reason"] == "requested_by_customer"
    assert ledger_of(scenario.conn, payment) == {}


def test_partial_refund_before_or_after_settlement(scenario: PaymentScenario) -> None:
    payment = scenario.pay()
    scenario.wait_for_payment(payment, "confirmed", "settled")
    asked = scenario.ask(f"/v1/payments/{payment}/refunds", amount=2500, reason="duplicate", metadata={"case": "7"})
    assert (asked["status"], asked["amount"], asked["payment"]) == ("pending", 2500, payment)
    scenario.wait_for_refund(asked["id"], "succeeded")
    assert scenario.wait_for_payment(payment, "partially_refunded")["amount_refunded"] == 2500
    scenario.balances(payment, {"available": 7125, "provider_balance": 7180, "fee_revenue": 375, "provider_cost": 320})
    [at_stripe] = scenario.refunds_at_stripe(payment)
    assert (at_stripe["reason"], at_stripe["metadata"]["surety_refund"]) == ("duplicate", asked["id"])


def test_late_failed_refund_is_credited_to_the_merchant(scenario: PaymentScenario) -> None:
    payment = scenario.pay("pm_card_refundFail")
    scenario.wait_for_payment(payment, "settled")
    asked = scenario.ask(f"/v1/payments/{payment}/refunds", amount=3000)
    failed = scenario.wait_for_refund(asked["id"], "failed")
    assert failed["failure"]["code"] == "expired_or_canceled_card"
    assert scenario.wait_for_payment(payment, "settled")["amount_refunded"] == 0
    scenario.balances(payment, {"available": 9625, "provider_balance": 9680, "fee_revenue": 375, "provider_cost": 320})
    again = scenario.ask(f"/v1/payments/{payment}/refunds", amount=3000)
    assert again["id"] != asked["id"]


def test_dashboard_refund_is_recorded_and_posted(scenario: PaymentScenario) -> None:
    payment = scenario.pay()
    scenario.wait_for_payment(payment, "settled")
    scenario.sandbox.control("refunds", {"payment_intent": scenario.intent(payment), "amount": 10000})
    scenario.wait_for_payment(payment, "refunded")
    [wait_for] = scenario.merchant.get("/v1/refunds", payment=payment)["data"]
    assert (wait_for["status"], wait_for["amount"]) == ("succeeded", 10000)
    scenario.balances(payment, {"available": -375, "provider_balance": -320, "fee_revenue": 375, "provider_cost": 320})
    assert scenario.send(f"/v1/payments/{payment}/refunds", amount=1).status_code in (400, 409)


LOST = ("timeout_before", "timeout_after", "reset", "error_500_before", "error_500_after", "garbage_200")


# Every fault of these two calls: tests/support/provider_faults.py.
def test_refund_with_a_lost_response_is_made_once(scenario: PaymentScenario) -> None:
    payment = scenario.pay()
    scenario.wait_for_payment(payment, "settled")
    scenario.sandbox.order("refunds.create", "timeout_after")
    asked = scenario.ask(f"/v1/payments/{payment}/refunds", amount=2500)
    scenario.wait_for_refund(asked["id"], "succeeded")
    assert [refund["amount"] for refund in scenario.refunds_at_stripe(payment)] == [2500]
    scenario.balances(payment, {"available": 7125, "provider_balance": 7180, "fee_revenue": 375, "provider_cost": 320})


def test_capture_with_a_lost_response_is_made_once(scenario: PaymentScenario) -> None:
    payment = scenario.pay(capture_method="manual")
    scenario.wait_for_payment(payment, "authorized")
    scenario.sandbox.order("payment_intents.capture", "timeout_after")
    scenario.ask(f"/v1/payments/{payment}/capture", amount=7000)
    assert scenario.wait_for_payment(payment, "settled")["amount_captured"] == 7000
    scenario.balances(payment, {"available": 6727, "provider_balance": 6767, "fee_revenue": 273, "provider_cost": 233})


def disputed(scenario: PaymentScenario) -> tuple[str, str]:
    """A settled payment that is disputed, and the dispute at the provider."""
    payment = scenario.pay()
    scenario.wait_for_payment(payment, "settled")
    dispute = scenario.sandbox.control("disputes", {"payment_intent": scenario.intent(payment)})
    scenario.wait_for_payment(payment, "disputed")
    scenario.balances(
        payment,
        {
            "available": -1875,
            "disputed": 10000,
            "withheld_by_network": 10000,
            "provider_balance": -1820,
            "fee_revenue": 1875,
            "provider_cost": 1820,
        },
    )
    return payment, str(dispute["id"])


def test_a_dispute_that_is_lost_takes_amount_and_fee(scenario: PaymentScenario) -> None:
    payment, dispute = disputed(scenario)
    scenario.sandbox.control(f"disputes/{dispute}", {"outcome": "lost"})
    scenario.wait_for_payment(payment, "reversed")
    scenario.balances(
        payment, {"available": -1875, "provider_balance": -1820, "fee_revenue": 1875, "provider_cost": 1820}
    )
    scenario.sandbox.control(f"disputes/{dispute}", {"outcome": "reinstated"})
    scenario.wait_for_payment(payment, "settled")
    scenario.balances(
        payment, {"available": 8125, "provider_balance": 8180, "fee_revenue": 1875, "provider_cost": 1820}
    )


def test_a_dispute_that_is_won_takes_the_fee_only(scenario: PaymentScenario) -> None:
    payment, dispute = disputed(scenario)
    scenario.sandbox.control(f"disputes/{dispute}", {"outcome": "won"})
    scenario.wait_for_payment(payment, "settled")
    scenario.balances(
        payment, {"available": 8125, "provider_balance": 8180, "fee_revenue": 1875, "provider_cost": 1820}
    )


def test_an_inquiry_that_is_prevented_takes_the_amount_without_a_fee(scenario: PaymentScenario) -> None:
    payment = scenario.pay()
    scenario.wait_for_payment(payment, "settled")
    inquiry = {"payment_intent": scenario.intent(payment), "inquiry": True}
    dispute = scenario.sandbox.control("disputes", inquiry)
    scenario.sandbox.control(f"disputes/{dispute['id']}", {"outcome": "prevented"})
    scenario.wait_for_payment(payment, "reversed")
    scenario.balances(payment, {"available": -375, "provider_balance": -320, "fee_revenue": 375, "provider_cost": 320})


def test_an_inquiry_changes_nothing(scenario: PaymentScenario) -> None:
    payment = scenario.pay()
    scenario.wait_for_payment(payment, "settled")
    result = {"payment_intent": scenario.intent(payment), "inquiry": True}
    dispute = scenario.sandbox.control("disputes", result)
    scenario.sandbox.control(f"disputes/{dispute['id']}", {"outcome": "closed"})
    heard = "select count(*) from surety.provider_events where type like 'charge.dispute.%%' and body like %s"
    eventually(lambda: (scenario.conn.execute(heard, (f"%{dispute['id']}%",)).fetchone() or (0,))[0] == 2)
    assert path_of(scenario.conn, payment)[-1] == "settled"
    assert ledger_of(scenario.conn, payment) == {
        "available": 9625,
        "provider_balance": 9680,
        "fee_revenue": 375,
        "provider_cost": 320,
    }


def answered(scenario: PaymentScenario, evidence: str, fault: str | None = None) -> str:
    """A disputed payment whose merchant has submitted evidence."""
    payment, _ = disputed(scenario)
    [dispute] = scenario.merchant.get("/v1/disputes", payment=payment)["data"]
    assert (dispute["status"], dispute["amount"], dispute["payment"]) == ("needs_response", 10000, payment)
    if fault:
        scenario.sandbox.order("disputes.update", fault)
    result = {"uncategorized_text": evidence, "customer_name": "Ada"}
    scenario.ask(f"/v1/disputes/{dispute['id']}/evidence", evidence=result, submit=True)
    return payment


def test_winning_evidence_wins_the_dispute(scenario: PaymentScenario) -> None:
    payment = answered(scenario, "winning_evidence")
    scenario.wait_for_payment(payment, "settled")
    scenario.balances(
        payment, {"available": 8125, "provider_balance": 8180, "fee_revenue": 1875, "provider_cost": 1820}
    )
    [dispute] = scenario.merchant.get("/v1/disputes", payment=payment)["data"]
    assert dispute["status"] == "won"


def test_losing_evidence_loses_the_dispute(scenario: PaymentScenario) -> None:
    scenario.wait_for_payment(answered(scenario, "losing_evidence"), "reversed")


@pytest.mark.parametrize("fault", LOST)
def test_evidence_with_a_lost_response_is_submitted_once(scenario: PaymentScenario, fault: str) -> None:
    payment = answered(scenario, "winning_evidence", fault)
    scenario.wait_for_payment(payment, "settled")
    [at_stripe] = scenario.sandbox.get("/v1/disputes", {"payment_intent": scenario.intent(payment)})["data"]
    assert (at_stripe["status"], at_stripe["evidence_details"]["submission_count"]) == ("won", 1)


def test_lost_dispute_of_exchanged_money_is_borne_by_the_merchant(server: str, tmp_path: Path) -> None:
    with running_scenario(server, tmp_path, "--settlement-currency=usd") as scenario:
        payment = scenario.pay(currency="eur")
        scenario.wait_for_payment(payment, "settled")
        dispute = scenario.sandbox.control("disputes", {"payment_intent": scenario.intent(payment)})["id"]
        for outcome in ({"outcome": "lost"}, {"outcome": "adjusted", "returned": 50}):
            line = scenario.sandbox.control(f"disputes/{dispute}", outcome)["balance_transactions"][-1]
            assert (line["currency"], line["exchange_rate"]) == ("usd", None)

        def withdrawn() -> int | None:
            found = scenario.merchant.get("/v1/disputes", payment=payment)["data"]
            return found[0]["amount_withdrawn"] if found else None

        eventually(lambda: withdrawn() == 9950, WITHIN_SECONDS)
        # 104.43 USD for the payment, 108.50 and a fee of 15.00 for the dispute, 0.54 of it returned.
        expected = {"available": 10443 - 10850 - 1500 + 54, "fee_revenue": 1500, "fee_revenue eur": 375}
        expected |= {"currency_exchange": 407, "currency_exchange eur": -375}
        scenario.balances(payment, expected | {"provider_balance": -1791, "provider_cost": 345 + 1500})
        assert scenario.conn.execute("select kind from surety.discrepancies").fetchall() == []


def test_everything_works_in_live_mode(server: str, tmp_path: Path) -> None:
    with running_scenario(server, tmp_path, "--live", "--payout-seconds=1") as live:
        charged, held = live.pay(), live.pay(capture_method="manual")
        live.wait_for_payment(held, "authorized")
        live.ask(f"/v1/payments/{held}/capture", amount=7000)
        live.wait_for_payment(charged, "settled")
        live.wait_for_payment(held, "settled")
        refund = live.ask(f"/v1/payments/{charged}/refunds", amount=2500)["id"]
        live.wait_for_refund(refund, "succeeded")
        live.wait_for_payment(charged, "partially_refunded")
        live.wait_for_payment(answered(live, "winning_evidence"), "settled")
        eventually(lambda: live.conn.execute("select 1 from ledger.postings where rule = 'payout'").fetchone(), 30)
        for table in ("merchants", "payments", "facts", "unmatched_facts", "provider_events"):
            assert live.conn.execute(f"select distinct livemode from surety.{table}".encode()).fetchall() == [(True,)]
        ignored = "select from audit.entries where outcome = 'ignored'"
        for query in ("select from outbox.dead_letters", "select kind from surety.discrepancies", ignored):
            assert live.conn.execute(query.encode()).fetchall() == []
