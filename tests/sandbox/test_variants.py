"""Answers and events that lack fields, thin events and events of the other mode: as Stripe's description permits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from app.sandbox.stripe.variants import (
    MEANINGFUL_NULLS,
    NULLABLE_FIELDS,
    OPTIONAL_FIELDS,
    leave_out_fields,
    other_mode_event,
    sparse_event,
    thin_event,
)
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.stripe_description import check_answer, check_event, optional_fields

Json = dict[str, Any]
KINDS = sorted(OPTIONAL_FIELDS.keys() | NULLABLE_FIELDS.keys() | MEANINGFUL_NULLS.keys())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    options = ("--transaction-seconds=0", "--available-seconds=0", "--payout-seconds=1")
    with running_sandbox(tmp_path_factory.mktemp("variants"), *options) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def objects(sandbox: SandboxProcess) -> dict[str, Json]:
    """One object of each kind, with the paths that answer them."""
    paid, other, _ = (sandbox.pay() for _ in range(3))
    refund = sandbox.post("/v1/refunds", {"payment_intent": paid["id"]})
    dispute = sandbox.control("disputes", {"payment_intent": other["id"]})
    eventually(lambda: sandbox.get("/v1/payouts")["data"])
    return {
        "payment_intent": sandbox.read(paid["id"]),
        "charge": sandbox.get(f"/v1/charges/{paid['latest_charge']}"),
        "refund": sandbox.get(f"/v1/refunds/{refund['id']}"),
        "dispute": sandbox.get(f"/v1/disputes/{dispute['id']}"),
        "balance_transaction": sandbox.get("/v1/balance_transactions")["data"][0],
        "payout": sandbox.get("/v1/payouts")["data"][0],
        "event": sandbox.get("/v1/events")["data"][0],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_tables_list_the_optional_fields_of_stripes_description(objects: dict[str, Json], kind: str) -> None:
    optional = optional_fields(kind)
    may_be_null = {name for name, is_nullable in optional.items() if is_nullable}
    never = set(MEANINGFUL_NULLS.get(kind, ()))
    sent = objects[kind].keys()
    assert set(OPTIONAL_FIELDS.get(kind, ())) <= optional.keys() - may_be_null
    assert set(NULLABLE_FIELDS.get(kind, ())) <= may_be_null - never
    assert never <= may_be_null
    listed = {*OPTIONAL_FIELDS.get(kind, ()), *NULLABLE_FIELDS.get(kind, ()), *never}
    assert optional.keys() & sent <= listed | ({"account"} if kind == "event" else set())


def test_answer_without_optional_fields_follows_the_description(objects: dict[str, Json]) -> None:
    chance = random.Random(1)
    for kind in ("payment_intent", "charge", "refund", "dispute", "payout"):
        path = f"/v1/{kind}s/{objects[kind]['id']}"
        kept = set()
        for _ in range(20):
            sparse = leave_out_fields(objects[kind], chance)
            check_answer("GET", path, 200, sparse)
            kept.add(tuple(sorted(name for name, value in sparse.items() if value is not None)))
        assert len(kept) > 1, kind


def test_event_without_optional_fields_follows_the_description(sandbox: SandboxProcess) -> None:
    chance = random.Random(1)
    for event in sandbox.get("/v1/events", {"limit": 100})["data"]:
        sparse = json.loads(sparse_event(json.dumps(event).encode(), chance))
        assert (sparse["id"], sparse["type"], sparse["livemode"]) == (event["id"], event["type"], event["livemode"])
        if sparse["data"].pop("previous_attributes", None) is None:
            check_event(sparse)


def test_ordered_answer_lacks_fields_and_the_next_one_has_them(sandbox: SandboxProcess) -> None:
    intent = sandbox.pay()["id"]
    whole = sandbox.read(intent)
    sandbox.order("payment_intents.retrieve", "sparse_200", match=intent)
    sparse = sandbox.read(intent)
    assert sparse != whole
    assert sparse["id"] == intent
    assert sandbox.read(intent) == whole


def test_thin_event_names_its_object_and_shows_nothing_of_it(objects: dict[str, Json]) -> None:
    event: Json = {**objects["event"], "account": "acct_1"}
    thin = json.loads(thin_event(json.dumps(event).encode()))
    assert (thin["object"], thin["type"], thin["context"]) == ("v2.core.event", f"v1.{event['type']}", "acct_1")
    assert thin["related_object"]["id"] == event["data"]["object"]["id"]
    assert not {"data", "api_version"} & thin.keys()
    assert thin["id"] != event["id"]


def test_event_of_the_other_mode_is_another_event(objects: dict[str, Json]) -> None:
    other = json.loads(other_mode_event(json.dumps(objects["event"]).encode()))
    assert (other["livemode"], other["id"] != objects["event"]["id"]) == (True, True)
    check_event(other)
