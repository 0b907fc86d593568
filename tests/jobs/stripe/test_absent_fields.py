"""Fields that Stripe may leave out or send as null: every reader has a rule for their absence.

Each optional field of Stripe's description is taken from each object, removed and as null. What a reader then asserts
must be what it asserts about the whole object; or it says by ObjectUnreadable which field it lacks. Less is enough only
where another reading follows. An absurd value makes its object unreadable, and no other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from jobs.handlers.calls import ProviderCall
from jobs.handlers.payments import intent_result
from jobs.handlers.refunds import refund_result
from jobs.handlers.webhooks import facts_of_row
from jobs.stripe.client import API_VERSION, ProviderResponse
from jobs.stripe.errors import ObjectUnreadable
from jobs.stripe.facts import (
    Fact,
    FactOrigin,
    balance_transaction_facts,
    dispute_facts,
    fraud_warning_facts,
    intent_facts,
    listed_transaction_facts,
    payout_facts,
    redacted,
    refund_facts,
)
from jobs.stripe.webhook_events import RELEVANT_EVENTS, ObjectToFetch, StoredWebhook, interpret_webhook
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.stripe_description import optional_fields

Json = dict[str, Any]
Variant = tuple[str, Json]
Reader = Callable[[Json], list[Fact]]

ORIGIN = FactOrigin("", livemode=False, source="poll")
# Fields whose null says something: no intent was used, a balance transaction stems from no object.
# A warning names its charge as well.
WARNING = "radar.early_fraud_warning"
MEANINGFUL = {(kind, "payment_intent") for kind in ("charge", "refund", "dispute", WARNING)}
# What an absent field may change: a canceled intent may have lost its error.
ALSO = {"payment_intent": {"canceled", "attempt_failed"}}
# Fields without which less is asserted, because another reading follows: of the list of balance transactions, of a
# payment that has not ended. Without any other field the same is asserted, or the object is unreadable.
LESS = {
    "charge.latest_charge.balance_transaction": {"money", "available"},
    "payment_intent.next_action": {"action", "attempt_failed"},
    "payment_intent.last_payment_error": {"failed"},
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    options = ("--settlement-currency=eur", "--transaction-seconds=0", "--available-seconds=0", "--payout-seconds=1")
    with running_sandbox(tmp_path_factory.mktemp("absent"), *options) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def objects(sandbox: SandboxProcess) -> list[Json]:
    """Objects of every kind and status that we read."""
    expand = {"expand[]": "latest_charge.balance_transaction"}
    ours = {"metadata[surety_payment]": "pay_1"}
    paid = sandbox.pay(**ours)
    held = sandbox.pay(capture_method="manual", **ours)
    part = sandbox.pay(capture_method="manual", **ours)
    sandbox.post(f"/v1/payment_intents/{part['id']}/capture", {"amount_to_capture": 3000})
    asked = sandbox.create("pm_card_threeDSecure2Required", **ours)
    sandbox.confirm(asked, {"return_url": "https://shop.example"})
    scripted = sandbox.create("pm_card_threeDSecure2Required", **ours)
    sandbox.confirm(scripted)
    declined, ended = (sandbox.create("pm_card_visa_chargeDeclined", **ours) for _ in range(2))
    for intent in (declined, ended):
        sandbox.refusal("POST", f"/v1/payment_intents/{intent}/confirm")
    sandbox.post(f"/v1/payment_intents/{ended}/cancel")
    canceled = sandbox.create(**ours)
    sandbox.post(f"/v1/payment_intents/{canceled}/cancel")
    ids = (sandbox.create(**ours), paid["id"], held["id"], part["id"], asked, scripted, declined, ended, canceled)
    metadata = {"metadata[surety_refund]": "ref_1", **ours}
    back = sandbox.post("/v1/refunds", {"payment_intent": paid["id"], "amount": 1000, **metadata})
    failed = sandbox.post("/v1/refunds", {"payment_intent": sandbox.pay("pm_card_refundFail")["id"], **metadata})
    sandbox.control(f"refunds/{failed['id']}", {"outcome": "failed"})
    disputed = [sandbox.control("disputes", {"payment_intent": sandbox.pay()["id"]})["id"] for _ in range(2)]
    sandbox.control(f"disputes/{disputed[1]}", {"outcome": "lost"})
    inquiry = sandbox.control("disputes", {"payment_intent": sandbox.pay()["id"], "inquiry": True})["id"]
    warned = [sandbox.control("fraud-warnings", {"payment_intent": intent["id"]}) for intent in (paid, sandbox.pay())]
    eventually(lambda: sandbox.get("/v1/payouts")["data"])
    return [
        *warned,
        *(sandbox.get(f"/v1/payment_intents/{id}", form) for id in ids for form in ({}, expand)),
        *(sandbox.get(f"/v1/refunds/{refund['id']}") for refund in (back, failed)),
        *(sandbox.get(f"/v1/disputes/{dispute}") for dispute in (*disputed, inquiry)),
        *sandbox.get("/v1/payouts")["data"],
        *sandbox.get("/v1/balance_transactions", {"limit": 100, "expand[]": "data.source"})["data"],
    ]


def variants(whole: Json) -> Iterator[Variant]:
    """The object without each optional field of it and of the objects in it; the field's place is named."""
    for path, kind, holder in objects_within(whole):
        for name, is_nullable in optional_fields(kind).items():
            if name not in holder or (kind, name) in MEANINGFUL or (kind, name) == ("balance_transaction", "source"):
                continue
            place = ".".join((kind, *map(str, path), name))
            yield f"{place} absent", changed(whole, path, lambda part, name=name: part.pop(name))  # type: ignore[misc]
            if is_nullable:
                yield f"{place} null", changed(whole, path, lambda part, name=name: part.update({name: None}))  # type: ignore[misc]


def objects_within(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Json]]:
    """Stripe's objects in a value, with the paths to them."""
    if isinstance(value, dict):
        if isinstance(value.get("object"), str):
            yield path, value["object"], value
        for name, part in value.items():
            yield from objects_within(part, (*path, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from objects_within(part, (*path, number))


def changed(whole: Json, path: tuple[Any, ...], change: Callable[[Json], object]) -> Json:
    """A copy with one of its objects changed."""
    result = copy.deepcopy(whole)
    part: Any = result
    for step in path:
        part = part[step]
    change(part)
    return result


READERS: dict[str, Reader] = {
    "payment_intent": lambda intent: intent_facts(intent, ORIGIN),
    "refund": lambda refund: refund_facts(refund, ORIGIN),
    "dispute": lambda dispute: dispute_facts(dispute, ORIGIN, 1),
    "payout": lambda payout: payout_facts(payout, ORIGIN),
    "balance_transaction": lambda line: balance_transaction_facts(line, ORIGIN),
    WARNING: lambda warning: fraud_warning_facts(warning, ORIGIN),
}


def assertions(facts: list[Fact]) -> set[Any]:
    """What facts assert about money: object, kind, amounts, currencies."""
    return {
        (
            one["object_id"], one["kind"], one.get("amount_minor"), one.get("currency"), one.get("revision"),
            # Money finds its payment by the intent, too.
            one.get("intent"), one.get("metadata_payment") if one["kind"] not in {"money", "available"} else None,
            *(one.get("data", {}).get(name) for name in ("category", "fee", "net", "other_currency", "other_gross")),
            *(one.get("data", {}).get(name) for name in ("available_at", "refund", "source", "type")),
        )
        for one in facts
    }  # fmt: skip


def read_or_unreadable(read: Reader, variant: Json) -> tuple[set[Any], str | None]:
    """What a reader asserts; or why the object is unreadable."""
    try:
        return assertions(read(variant)), None
    except ObjectUnreadable as error:
        return set(), str(error)


def test_reader_without_an_optional_field_asserts_the_same_or_names_it(objects: list[Json]) -> None:
    tried, wrong = set(), []
    for whole in objects:
        read = READERS[whole["object"]]
        asserted = assertions(read(whole))
        for place, variant in variants(whole):
            tried.add(place.split()[0])
            redacted(variant)
            said, missing = read_or_unreadable(read, variant)
            if missing is not None and place.split()[0].rpartition(".")[2] not in missing:
                wrong.append(f"{place}: {missing}")
            more = {one for one in said - asserted if one[1] not in ALSO.get(whole["object"], ())}
            wrong += [f"{place}: {one}" for one in more]
            less = asserted - said if missing is None else set()
            wrong += [f"{place} lacks {one}" for one in less if one[1] not in LESS.get(place.split()[0], ())]
    assert not wrong, "\n".join(sorted(wrong))
    assert {"payment_intent.amount", "payment_intent.latest_charge", "refund.metadata", "refund.status"} <= tried
    assert {"balance_transaction.exchange_rate", "charge.latest_charge.balance_transaction"} <= tried


def test_answer_without_an_optional_field_is_no_mismatch(objects: list[Json]) -> None:
    for whole in objects:
        for place, variant in variants(whole):
            if whole["object"] not in {"payment_intent", "refund"}:
                continue
            intent = whole.get("payment_intent") or whole["id"]
            call = ProviderCall(
                payment_id="pay_1", account="", provider_id=intent, amount_minor=4999, currency="usd", livemode=False,
                event_id="evt", subject_id="ref_1", verdict="send", operation="refund:ref_1", idempotency_key="key",
                request={}, first_sent_at=None, last_sent_at=None, send_number=None,
            )  # fmt: skip
            read = partial(intent_result if whole["object"] == "payment_intent" else refund_result, call)
            assert "discrepancy" not in answered(read, variant), place


def answered(read: Callable[[ProviderResponse], Json], body: Json) -> Json:
    """The result of an answer; empty if it can't be read."""
    try:
        return read(ProviderResponse(body, 200, "req_1"))
    except ObjectUnreadable:
        return {}


def test_event_without_an_optional_field_is_read_or_its_object_fetched(objects: list[Json]) -> None:
    subjects = [*objects, *(one["latest_charge"] for one in objects if isinstance(one.get("latest_charge"), dict))]
    for subject in subjects:
        kind = {"dispute": "charge.dispute"}.get(subject["object"], subject["object"])
        about = [type for type in RELEVANT_EVENTS if type.rpartition(".")[0] == kind]
        for place, variant in variants(subject):
            for type in about:
                whole = interpret_webhook(webhook(type, subject))
                meant = interpret_webhook(webhook(type, variant))
                if isinstance(meant, list) and isinstance(whole, list):
                    more = assertions(meant) - assertions(whole)
                    assert {one[1] for one in more} <= ALSO.get(subject["object"], set()), place
                elif isinstance(meant, list):
                    # A charge that is not booked yet.
                    assert (type, meant) == ("charge.updated", []), place
                else:
                    assert meant.source.id, place


def webhook(type: str, subject: Json) -> StoredWebhook:
    body = json.dumps({"object": "event", "api_version": API_VERSION, "data": {"object": subject}})
    return StoredWebhook("evt_1", "whk_1", "webhook", "", livemode=False, type=type, body=body)


@pytest.mark.parametrize("type", sorted(RELEVANT_EVENTS))
def test_event_with_only_the_id_of_its_object_is_fetched(type: str) -> None:
    meant = interpret_webhook(webhook(type, {"id": "x_1"}))
    assert isinstance(meant, ObjectToFetch)
    assert meant.source.id == "x_1"


def test_event_without_the_id_of_its_object_says_what_it_lacks() -> None:
    with pytest.raises(ObjectUnreadable, match="no id"):
        interpret_webhook(webhook("payment_intent.succeeded", {}))


@pytest.mark.parametrize("change", [{"available_on": 10**18}, {"available_on": -(10**18)}, {"created": 1e300}])
def test_line_with_an_absurd_time_is_a_discrepancy_of_its_own(change: Json) -> None:
    line = {
        "id": "txn_1", "object": "balance_transaction", "amount": 100, "currency": "usd", "fee": 0, "net": 100,
        "created": 1, "available_on": 1, "status": "pending", "reporting_category": "topup", "source": None,
    }  # fmt: skip
    assert "facts" in facts_of_row(line, ORIGIN, listed_transaction_facts)
    assert facts_of_row(line | change, ORIGIN, listed_transaction_facts)["discrepancy"]["subject"] == "txn_1"


def test_line_exchanged_at_a_rate_of_zero_is_a_discrepancy_of_its_own() -> None:
    charge = {"id": "ch_1", "object": "charge", "amount": 100, "currency": "eur", "payment_intent": "pi_1"}
    line = {
        "id": "txn_1", "object": "balance_transaction", "amount": 110, "currency": "usd", "fee": 0, "net": 110,
        "created": 1, "available_on": 1, "status": "pending", "reporting_category": "charge", "source": charge,
        "exchange_rate": 0,
    }  # fmt: skip
    assert facts_of_row(line, ORIGIN, listed_transaction_facts)["discrepancy"]["subject"] == "txn_1"


def test_object_of_an_event_with_an_absurd_time_is_fetched() -> None:
    payout = {"id": "po_1", "status": "paid", "amount": 100, "currency": "usd", "created": 10**18}
    assert isinstance(interpret_webhook(webhook("payout.paid", payout)), ObjectToFetch)
