"""What the API's functions do, as a model in plain Python that Hypothesis drives beside them.

`Model` is the specification: keys make one payment each, references are one living payment's, and a payment is where
its facts say it is, in whatever order and however often they were told.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.payments import Connection, Fact, add_merchant, command, create, fact, money, record, request, violations

KINDS = (
    "submitted", "action", "processing", "failed", "canceled", "captured", "money", "available",
    "refund", "other refund",
)  # fmt: skip
Answer = tuple[int, str | None, str | None]
"""Status, problem, and the payment it is about."""


class Payment:
    """A payment, as its merchant may think of it."""

    def __init__(self, id: str, amount: int, reference: str | None) -> None:
        self.id = id
        self.amount = amount
        self.reference = reference
        self.told: set[str] = set()
        self.ended_as: str | None = None

    @property
    def captured(self) -> int:
        return self.amount if "captured" in self.told else 0

    @property
    def refunded(self) -> int:
        parts = {"refund": self.amount // 3, "other refund": self.amount - self.amount // 3}
        return sum(part for kind, part in parts.items() if kind in self.told) if self.captured else 0

    @property
    def state(self) -> str:
        if self.captured:
            if self.refunded:
                return "refunded" if self.refunded == self.captured else "partially_refunded"
            return "settled" if {"money", "available"} <= self.told else "confirmed"
        if self.ended_as:
            return self.ended_as
        for kind, state in {"processing": "processing", "action": "requires_action"}.items():
            if kind in self.told:
                return state
        return "provider_submitted" if self.told else "initiated"


class Model:
    """A merchant's payments."""

    def __init__(self) -> None:
        self.payments: dict[str, Payment] = {}
        self.requests: dict[str, tuple[int, str | None, str]] = {}
        """By key: amount, reference, and the payment that was made."""
        self.references: dict[str, str] = {}

    def expect_creation(self, key: str, amount: int, reference: str | None) -> Answer | None:
        """What is answered without making a payment; None if one is made."""
        if key in self.requests:
            *asked, payment_id = self.requests[key]
            if asked == [amount, reference]:
                return 201, None, payment_id
            return 422, "idempotency-key-reused", None
        if reference in self.references:
            return 409, "reference-taken", self.references[reference]
        return None

    def created(self, key: str, payment: Payment) -> None:
        self.payments[payment.id] = payment
        self.requests[key] = payment.amount, payment.reference, payment.id
        if payment.reference is not None:
            self.references[payment.reference] = payment.id

    def told(self, payment: Payment, kinds: list[str]) -> None:
        payment.told.update(kinds)
        if payment.captured:
            if payment.ended_as and payment.reference is not None:
                self.references.setdefault(payment.reference, payment.id)
            payment.ended_as = None
        elif payment.ended_as is None:
            self.end(payment, next((kind for kind in ("failed", "canceled") if kind in payment.told), None))

    def end(self, payment: Payment, state: str | None) -> None:
        payment.ended_as = state
        if state is not None and self.references.get(payment.reference or "") == payment.id:
            del self.references[payment.reference or ""]

    def expect_cancellation(self, payment: Payment) -> int:
        if payment.state == "initiated":
            self.end(payment, "canceled")
            return 200
        return 202 if payment.state in {"provider_submitted", "requires_action"} else 409


def tell(payment: Payment, kind: str) -> Fact:
    """A fact of that kind."""
    amount = payment.amount
    match kind:
        case "captured":
            return fact(payment.id, "captured", "ch", amount)
        case "money":
            return money(payment.id, "txn", "charge", amount, 59)
        case "available":
            return fact(payment.id, "available", "txn", amount)
        case "refund":
            return fact(payment.id, "refund_succeeded", "re_1", amount // 3)
        case "other refund":
            return fact(payment.id, "refund_succeeded", "re_2", amount - amount // 3)
    return fact(payment.id, kind, "pi")


class Merchant(RuleBasedStateMachine):
    """What a merchant and a provider do, to the database and to the model."""

    conn: ClassVar[Connection]
    payments = Bundle("payments")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        _, self.key_hash = add_merchant(self.conn)
        self.cursor: str | None = None
        self.heard: dict[str, dict[int, str]] = {}

    @rule(
        target=payments,
        key=st.sampled_from("abcdef"),
        amount=st.sampled_from([999, 5000]),
        reference=st.sampled_from([None, "order-1", "order-2"]),
    )
    def create(self, key: str, amount: int, reference: str | None) -> Any:
        hashed = f"{amount:08x}" + (reference or "").encode().hex()
        asked = request(self.key_hash, idempotency_key=key, request_hash=hashed, amount=amount, reference=reference)
        [told] = create(self.conn, [asked])
        expected = self.model.expect_creation(key, amount, reference)
        if expected is None:
            assert (told["status"], told["is_replayed"]) == (201, False)
            payment = Payment(told["payment_id"], amount, reference)
            self.model.created(key, payment)
            return payment
        about = (told["detail"] or {}).get("payment_id") if told["status"] == 409 else None
        if told["status"] == 201:
            assert told["is_replayed"]
            about = json.loads(told["body"])["id"]
        assert (told["status"], told["problem"], about) == expected
        return multiple()

    @rule(payment=payments, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    def hear(self, payment: Payment, kinds: list[str]) -> None:
        record(self.conn, [tell(payment, kind) for kind in kinds])
        self.model.told(payment, kinds)

    @rule(payment=payments)
    def cancel(self, payment: Payment) -> None:
        told = command(self.conn, "cancel_payment", self.key_hash, payment_id=payment.id)
        assert told["status"] == self.model.expect_cancellation(payment)

    @rule(payment=consumes(payments))
    def forget(self, payment: Payment) -> None:
        """Nothing more happens to it."""

    @invariant()
    def each_payment_is_what_the_model_says(self) -> None:
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

    @invariant()
    def the_list_has_them_all(self) -> None:
        shown = self.ask("api.list_payments(%s, null, null, null, null, null, 100, null)")
        assert [one["id"] for one in shown["data"]] == sorted(self.model.payments, reverse=True)

    @rule()
    def follow_events(self) -> None:
        """Whoever reads on with the cursor hears of each step once; of several made at once in any order."""
        shown = self.ask("api.list_events(%s, %s, 1000)", self.cursor)
        self.cursor = shown["next"]
        for event in shown["data"]:
            payment = event["data"]
            steps = self.heard.setdefault(payment["id"], {})
            assert payment["version"] not in steps
            steps[payment["version"]] = payment["state"]
        for payment in self.model.payments.values():
            steps = self.heard[payment.id]
            assert sorted(steps) == list(range(1, len(steps) + 1))
            assert steps[len(steps)] == payment.state

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


def test_the_functions_do_what_the_model_says(merchant: type[Merchant]) -> None:
    run_state_machine_as_test(
        merchant,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
