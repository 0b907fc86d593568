"""What the API's functions do, as a model in plain Python that Hypothesis drives beside them.

`Model` is the specification: keys make one payment each, references are one living payment's, a payment and its refunds
follow from their facts, in any order and with any repetition. No capture exceeds the hold, no refund exceeds the rest,
and the balance follows from that.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    command,
    create,
    fact,
    money,
    record,
    request,
    violations,
)

KINDS = (
    "submitted", "action", "processing", "authorized", "failed", "canceled", "captured", "money", "available", "refund",
)  # fmt: skip
REFUND_KINDS = ("pending", "succeeded", "canceled", "failed")
"""In the order of their ranks."""
AMOUNTS = st.sampled_from([999, 5000])
SHARES = st.sampled_from([None, "a third", "the rest", "too much"])
Answer = tuple[int | None, str | None, str | None]
"""Status (of a success only), problem, and the payment it is about."""


def part(amount: int, share: str | None) -> int | None:
    """A request; an amount of None means all."""
    third = amount // 3
    return {None: None, "a third": third, "the rest": amount - third, "too much": amount + 1}[share]


class Refund:
    """A refund, asked for here or made at the provider."""

    def __init__(self, id: str | None, amount: int, *result: str) -> None:
        self.id = id
        self.amount = amount
        self.facts = {"pending", *result}

    @property
    def state(self) -> str:
        return max(self.facts, key=REFUND_KINDS.index)

    @property
    def stands(self) -> bool:
        return self.state in {"pending", "succeeded"}


class Payment:
    """A payment, as its merchant may think of it."""

    def __init__(self, id: str, amount: int, reference: str | None, *, is_manual: bool) -> None:
        self.id = id
        self.amount = amount
        self.reference = reference
        self.is_manual = is_manual
        self.facts: dict[str, int] = {}
        """The first amount of each kind of fact."""
        self.ended_as: str | None = None
        self.capturing: int | None = None
        self.is_cancel_requested = False
        self.refunds: list[Refund] = []

    @property
    def captured(self) -> int:
        return self.facts.get("captured", 0)

    @property
    def refunded(self) -> int:
        return min(self.captured, self.refunds_that_are("succeeded"))

    @property
    def left(self) -> int:
        """What can still be given back."""
        return max(0, self.captured - self.refunded - self.refunds_that_are("pending"))

    @property
    def is_settled(self) -> bool:
        return "available" in self.facts and 0 < self.captured == self.facts.get("money")

    @property
    def fee(self) -> int:
        return min(self.captured, round(Fraction(self.captured * 340, 10000)) + 35) if self.captured else 0

    @property
    def state(self) -> str:
        if self.captured:
            if self.refunded:
                return "refunded" if self.refunded == self.captured else "partially_refunded"
            return "settled" if self.is_settled else "confirmed"
        if self.ended_as:
            return self.ended_as
        if self.capturing or "processing" in self.facts:
            return "processing"
        if self.is_manual and "authorized" in self.facts:
            return "authorized"
        if "action" in self.facts:
            return "requires_action"
        return "provider_submitted" if self.facts else "initiated"

    def refunds_that_are(self, state: str) -> int:
        return sum(refund.amount for refund in self.refunds if refund.state == state)


class Model:
    """A merchant's payments."""

    def __init__(self) -> None:
        self.payments: dict[str, Payment] = {}
        self.requests: dict[str, tuple[int, str | None, bool, str]] = {}
        """By key: what was asked for, and the payment that was made."""
        self.references: dict[str, str] = {}

    @property
    def balance(self) -> dict[str, int]:
        """The merchant's balance, with the refunds that are under way."""
        owed = {"pending": 0, "available": 0, "disputed": 0, "reserved_for_refunds": 0, "reserved_for_payouts": 0}
        for payment in self.payments.values():
            owed["available" if payment.is_settled else "pending"] += payment.captured - payment.fee
            given = sum(refund.amount for refund in payment.refunds if refund.stands)
            owed["available"] -= given
            owed["reserved_for_refunds"] += given
        return owed

    def expect_creation(self, key: str, amount: int, reference: str | None, is_manual: bool) -> Answer | None:
        """The answer that makes no payment; None if one is made."""
        if key in self.requests:
            *asked, payment_id = self.requests[key]
            if asked == [amount, reference, is_manual]:
                return 201, None, payment_id
            return None, "idempotency-key-reused", None
        if reference in self.references:
            return None, "reference-taken", self.references[reference]
        return None

    def created(self, key: str, payment: Payment) -> None:
        self.payments[payment.id] = payment
        self.requests[key] = payment.amount, payment.reference, payment.is_manual, payment.id
        if payment.reference is not None:
            self.references[payment.reference] = payment.id

    def apply_facts(self, payment: Payment, amounts: dict[str, int]) -> None:
        if "refund" in amounts and "refund" not in payment.facts:
            payment.refunds.append(Refund(None, amounts["refund"], "succeeded"))
        payment.facts = amounts | payment.facts
        if payment.captured:
            if payment.ended_as and payment.reference is not None:
                self.references.setdefault(payment.reference, payment.id)
            payment.ended_as = None
        elif payment.ended_as is None:
            self.end(payment, next((kind for kind in ("failed", "canceled") if kind in payment.facts), None))

    def end(self, payment: Payment, state: str | None) -> None:
        payment.ended_as = state
        if state is not None and self.references.get(payment.reference or "") == payment.id:
            del self.references[payment.reference or ""]

    def expect_cancellation(self, payment: Payment) -> int | None:
        if payment.state == "initiated":
            self.end(payment, "canceled")
            return 200
        if payment.state not in {"provider_submitted", "requires_action", "authorized"}:
            return None
        payment.is_cancel_requested = True
        return 202

    def expect_capture(self, payment: Payment, amount: int | None) -> int | None:
        if payment.state != "authorized" or payment.is_cancel_requested:
            return None
        if amount is not None and amount > payment.amount:
            return None
        payment.capturing = amount or payment.amount
        return 202

    def expect_refund(self, payment: Payment, amount: int | None) -> tuple[int | None, str | None]:
        if payment.state not in {"confirmed", "settled", "partially_refunded"} or not payment.left:
            return None, "wrong-state"
        if amount is not None and amount > payment.left:
            return None, "invalid-request"
        # The fee of this very payment may be overdrawn.
        if self.balance["pending"] + self.balance["available"] + payment.fee < (amount or payment.left):
            return None, "balance-too-low"
        return 201, None


def model_fact(payment: Payment, kind: str, amount: int) -> Fact:
    """A fact of that kind."""
    match kind:
        case "captured" | "authorized":
            return fact(payment.id, kind, "ch", amount)
        case "money":
            return money(payment.id, "txn", "charge", amount, 59)
        case "available":
            return fact(payment.id, "available", "txn", amount)
        case "refund":
            return fact(payment.id, "refund_succeeded", "re", amount)
    return fact(payment.id, kind, "pi")


class Merchant(RuleBasedStateMachine):
    """What a merchant and a provider do, to the database and to the model."""

    conn: ClassVar[Connection]
    payments = Bundle("payments")
    held = Bundle("held")
    charged = Bundle("charged")
    refunds = Bundle("refunds")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        _, self.key_hash = add_merchant(self.conn)
        self.cursor: str | None = None
        self.heard: dict[str, dict[int, str]] = {}

    @initialize(targets=(payments, held), amount=AMOUNTS)
    def hold(self, amount: int) -> Any:
        payment = self.create("held", amount, None, is_manual=True)
        self.apply_facts(payment, ["submitted", "authorized"])
        return payment

    @initialize(targets=(payments, charged), amount=AMOUNTS)
    def charge(self, amount: int) -> Any:
        payment = self.create("charged", amount, None, is_manual=False)
        self.apply_facts(payment, ["submitted", "captured"])
        return payment

    @rule(
        target=payments,
        key=st.sampled_from("abcdef"),
        amount=AMOUNTS,
        reference=st.sampled_from([None, "order-1", "order-2"]),
        is_manual=st.booleans(),
    )
    def create(self, key: str, amount: int, reference: str | None, *, is_manual: bool) -> Any:
        hashed = f"{amount:08x}{is_manual:02x}" + (reference or "").encode().hex()
        asked = {"amount": amount, "reference": reference, "capture_method": "manual" if is_manual else "automatic"}
        [result] = create(self.conn, [request(self.key_hash, idempotency_key=key, request_hash=hashed, **asked)])
        expected = self.model.expect_creation(key, amount, reference, is_manual)
        if expected is None:
            assert (result["status"], result["is_replayed"]) == (201, False)
            payment = Payment(result["payment_id"], amount, reference, is_manual=is_manual)
            self.model.created(key, payment)
            return payment
        about = (result["detail"] or {}).get("payment_id") if result["problem"] == "reference-taken" else None
        if result["status"] == 201:
            assert result["is_replayed"]
            about = json.loads(result["body"])["id"]
        assert (result["status"], result["problem"], about) == expected
        return multiple()

    @rule(payment=payments, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    def apply_facts(self, payment: Payment, kinds: list[str]) -> None:
        taken = payment.captured or payment.capturing or payment.amount
        whole = {"authorized": payment.amount, "refund": payment.amount // 3}
        amounts = {kind: whole.get(kind, taken) for kind in kinds}
        record(self.conn, [model_fact(payment, kind, amounts[kind]) for kind in kinds])
        self.model.apply_facts(payment, amounts)

    @rule(payment=payments)
    def cancel(self, payment: Payment) -> None:
        result = command(self.conn, "cancel_payment", self.key_hash, payment_id=payment.id)
        assert result["status"] == self.model.expect_cancellation(payment)

    @rule(payment=held | payments, share=SHARES)
    def capture(self, payment: Payment, share: str | None) -> None:
        amount = part(payment.amount, share)
        result = command(self.conn, "capture_payment", self.key_hash, payment_id=payment.id, amount=amount)
        assert result["status"] == self.model.expect_capture(payment, amount)

    @rule(target=charged, payment=held | payments, is_taken=st.booleans())
    def answer_capture(self, payment: Payment, is_taken: bool) -> Any:
        """The provider has taken what was asked for, or would not: then the hold lives."""
        if not payment.capturing or payment.captured:
            return multiple()
        if is_taken:
            self.apply_facts(payment, ["captured"])
            return payment
        refused = [{"payment_id": payment.id, "operation": "capture", "outcome": "refused", "refused": {}}]
        self.conn.execute("select surety.record_results('worker:test', %s)", (json.dumps(refused),))
        payment.capturing = None
        return multiple()

    @rule(target=refunds, payment=charged | payments, share=SHARES)
    def refund(self, payment: Payment, share: str | None) -> Any:
        amount = part(payment.captured or payment.amount, share)
        expected = self.model.expect_refund(payment, amount)
        result = command(self.conn, "create_refund", self.key_hash, payment_id=payment.id, amount=amount)
        assert (result["status"], result["problem"]) == expected
        if result["status"] != 201:
            return multiple()
        refund = Refund(result["body"]["id"], amount or payment.left)
        payment.refunds.append(refund)
        return payment, refund

    @rule(asked=refunds, kinds=st.lists(st.sampled_from(REFUND_KINDS), min_size=1, max_size=3))
    def apply_refund_facts(self, asked: tuple[Payment, Refund], kinds: list[str]) -> None:
        payment, refund = asked
        id, data = f"re_{refund.id}", {"refund": refund.id}
        record(self.conn, [fact(payment.id, f"refund_{kind}", id, refund.amount, data=data) for kind in kinds])
        refund.facts.update(kinds)

    @invariant()
    def payments_match_the_model(self) -> None:
        for payment in self.model.payments.values():
            shown = self.ask("api.get_payment(%s, %s)", payment.id)
            assert {
                "id": payment.id,
                "state": payment.state,
                "amount": payment.amount,
                "amount_captured": payment.captured,
                "amount_refunded": payment.refunded,
                "reference": payment.reference,
            }.items() <= shown.items()

            for refund in payment.refunds:
                if refund.id is not None:
                    shown = self.ask("api.get_refund(%s, %s)", refund.id)
                    assert (shown["status"], shown["amount"]) == (refund.state, refund.amount)

    @invariant()
    def balance_matches_the_model(self) -> None:
        shown = self.ask("api.get_balance(%s)")["data"] or [{"currency": "usd"} | dict.fromkeys(self.model.balance, 0)]
        assert shown == [{"currency": "usd"} | self.model.balance]

    @invariant()
    def list_is_complete(self) -> None:
        shown = self.ask("api.list_payments(%s, null, null, null, null, null, 100, null)")
        assert [one["id"] for one in shown["data"]] == sorted(self.model.payments, reverse=True)

    @rule()
    def follow_events(self) -> None:
        """A reader that continues with the cursor reads each step once; several of one moment in any order."""
        shown = self.ask("api.list_events(%s, %s, 1000)", self.cursor)
        self.cursor = shown["next"]
        for event in shown["data"]:
            result = event["data"]
            steps = self.heard.setdefault(result["id"], {})
            assert result["version"] not in steps
            steps[result["version"]] = result.get("state") or result["status"]
        states = {payment.id: payment.state for payment in self.model.payments.values()}
        for payment in self.model.payments.values():
            states |= {refund.id: refund.state for refund in payment.refunds if refund.id is not None}
        for id, state in states.items():
            steps = self.heard[id]
            assert sorted(steps) == list(range(1, len(steps) + 1))
            assert steps[len(steps)] == state

    def teardown(self) -> None:
        assert not violations(self.conn)

    def ask(self, call: str, *values: Any) -> Any:
        row = self.conn.execute(f"select body from {call}".encode(), (self.key_hash, *values)).fetchone()
        assert row is not None
        return json.loads(row[0])


@pytest.fixture
def merchant(conn: Connection) -> type[Merchant]:
    """The state machine, on this test's database."""
    Merchant.conn = conn
    return Merchant


def test_sql_functions_match_the_model(merchant: type[Merchant]) -> None:
    run_state_machine_as_test(
        merchant,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
