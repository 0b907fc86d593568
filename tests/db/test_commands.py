"""Capture and cancel: what a merchant may ask for, and what becomes of it whatever the provider says meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.db.test_races import Two, at_once
from tests.support.http_client import Merchant, ServerProcess, broken_rules, problem, running_server
from tests.support.payments import (
    Connection,
    add_merchant,
    command,
    fact,
    path_of,
    pay,
    record,
    state_of,
    violations,
)
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, due, in_process_worker, run_until_idle, shorten_delays

PIPELINE = ("submit", "confirm", "capture", "cancel")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("commands"), "--hang-seconds=1", "--slow-seconds=0.1") as sandbox:
        yield sandbox


@pytest.fixture
def api(database: str) -> Iterator[ServerProcess]:
    with running_server("api", database) as running:
        yield running


@pytest.fixture
def merchant(conn: Connection, api: ServerProcess) -> Iterator[Merchant]:
    merchant = Merchant(conn, api.url)
    with merchant.client:
        yield merchant


def held(conn: Connection, key_hash: bytes, amount: int = 10000) -> str:
    """An authorized payment."""
    [payment_id] = pay(conn, key_hash, capture_method="manual", amount=amount)
    record(conn, [fact(payment_id, "submitted", "pi", amount), fact(payment_id, "authorized", "ch", amount)])
    return payment_id


def events(conn: Connection, payment_id: str) -> list[str]:
    """Our own commands' events about a payment."""
    query = "select type from outbox.events where aggregate_id = %s and version is null order by id"
    return [row[0] for row in conn.execute(query, (payment_id,))]


def test_full_or_partial_capture_happens_once(conn: Connection) -> None:
    _, key = add_merchant(conn)
    whole, part = held(conn, key), held(conn, key)
    outcome = command(conn, "capture_payment", key, payment_id=whole)
    assert (outcome["status"], outcome["body"]["state"], outcome["is_replayed"]) == (202, "processing", False)
    assert command(conn, "capture_payment", key, payment_id=part, amount=7000)["status"] == 202
    again = command(conn, "capture_payment", key, payment_id=part, amount=100)
    assert (again["problem"], again["detail"]["state"]) == ("wrong-state", "processing")
    asked = conn.execute("select amount_minor from surety.facts where kind = 'capture_requested' order by 1")
    assert asked.fetchall() == [(7000,), (10000,)]
    assert events(conn, part) == ["payment.capture_requested"]
    assert not violations(conn)


def test_capture_above_the_authorized_amount_is_refused_and_keeps_its_key_free(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = held(conn, key)
    asked = {"payment_id": payment_id, "idempotency_key": "mine"}
    refused = command(conn, "capture_payment", key, **asked, amount=10001)
    assert (refused["detail"]["rule"], refused["detail"]["limit"]) == ("maximum", 10000)
    assert command(conn, "capture_payment", key, **asked, amount=10000, request_hash="01")["status"] == 202


def test_capture_that_breaks_the_step_of_its_currency_is_refused(conn: Connection) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual", currency="kwd")
    record(conn, [fact(payment_id, "authorized", "ch", 10000, currency="kwd")])
    refused = command(conn, "capture_payment", key, payment_id=payment_id, amount=1234)
    assert refused["detail"] == {
        "field": "/amount",
        "rule": "multiple",
        "limit": 10,
        "given": 1234,
        "currency": "kwd",
    }
    assert command(conn, "capture_payment", key, payment_id=payment_id, amount=1230)["status"] == 202


def test_same_key_gets_the_same_response_and_another_request_is_refused(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = held(conn, key)
    asked = {"payment_id": payment_id, "idempotency_key": "mine", "request_hash": "0a"}
    first = command(conn, "capture_payment", key, **asked)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    again = command(conn, "capture_payment", key, **asked)
    assert again == first | {"is_replayed": True}
    other = command(conn, "capture_payment", key, **asked | {"request_hash": "0b"})
    assert (other["status"], other["problem"]) == (None, "idempotency-key-reused")
    assert events(conn, payment_id) == ["payment.capture_requested"]


@pytest.mark.parametrize("function", ["capture_payment", "cancel_payment"])
def test_payment_of_another_merchant_does_not_exist(conn: Connection, function: str) -> None:
    _, key = add_merchant(conn)
    _, other_key = add_merchant(conn)
    payment_id = held(conn, key)
    assert command(conn, function, other_key, payment_id=payment_id)["problem"] == "not-found"
    assert command(conn, function, b"unknown", payment_id=payment_id)["problem"] == "unauthenticated"
    assert state_of(conn, payment_id) == "authorized"


def test_provider_facts_during_a_capture_do_not_undo_it(conn: Connection) -> None:
    """In every order of facts the end is the same, and no payment steps back from processing to authorized."""
    _, key = add_merchant(conn)
    result: list[Callable[[str], dict[str, Any]]] = [
        lambda p: fact(p, "submitted", "pi", 10000),
        lambda p: fact(p, "action", "pi"),
        lambda p: fact(p, "authorized", "ch", 10000, revision=0),
        lambda p: fact(p, "captured", "ch", 7000),
    ]
    for order in itertools.permutations(range(4)):
        payment_id = held(conn, key)
        command(conn, "capture_payment", key, payment_id=payment_id, amount=7000)
        for place in order:
            record(conn, [result[place](payment_id)])
        path = path_of(conn, payment_id)
        assert path[-2:] == ["processing", "confirmed"], path
    assert not violations(conn)


def test_refused_capture_keeps_the_authorization_and_may_be_repeated(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = held(conn, key)
    for _ in range(2):
        assert command(conn, "capture_payment", key, payment_id=payment_id)["status"] == 202
        conn.execute(
            "select surety.record_results('worker:test', jsonb_build_array(jsonb_build_object("
            "'payment_id', %s::text, 'operation', 'capture', 'outcome', 'refused', 'refused', '{}'::jsonb)))",
            (payment_id,),
        )
        assert state_of(conn, payment_id) == "authorized"
    assert path_of(conn, payment_id)[-4:] == ["processing", "authorized", "processing", "authorized"]
    assert not violations(conn)


def test_an_authorization_that_expires_under_a_capture_is_canceled(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = held(conn, key)
    command(conn, "capture_payment", key, payment_id=payment_id)
    record(conn, [fact(payment_id, "canceled", "pi")])
    assert path_of(conn, payment_id)[-2:] == ["processing", "canceled"]
    assert command(conn, "capture_payment", key, payment_id=payment_id)["detail"]["state"] == "canceled"
    assert not violations(conn)


def test_unsent_payment_is_canceled_at_once_and_never_sent(conn: Connection) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, reference="order-1")
    outcome = command(conn, "cancel_payment", key, payment_id=payment_id)
    assert (outcome["status"], outcome["body"]["state"]) == (200, "canceled")
    assert pay(conn, key, reference="order-1"), "the reference is free again"
    assert command(conn, "cancel_payment", key, payment_id=payment_id)["problem"] == "wrong-state"
    assert not violations(conn)


@pytest.mark.parametrize("asked_first", ["capture", "cancel"])
def test_first_of_capture_and_cancel_wins(conn: Connection, asked_first: str) -> None:
    _, key = add_merchant(conn)
    payment_id = held(conn, key)
    other = {"capture": "cancel", "cancel": "capture"}[asked_first]
    assert command(conn, f"{asked_first}_payment", key, payment_id=payment_id)["status"] == 202
    refused = command(conn, f"{other}_payment", key, payment_id=payment_id)
    assert (refused["status"], refused["problem"]) == (None, "wrong-state")
    assert events(conn, payment_id) == [f"payment.{asked_first}_requested"]


def test_authorization_after_a_final_state_is_canceled_and_reported(conn: Connection) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual")
    command(conn, "cancel_payment", key, payment_id=payment_id)
    assert "payment.authorized_late" in record(conn, [fact(payment_id, "submitted", "pi", 10000)])
    assert "payment.authorized_late" in record(conn, [fact(payment_id, "authorized", "ch", 10000)])
    assert state_of(conn, payment_id) == "canceled"
    found = "select kind, closed_at is not null from surety.discrepancies"
    assert conn.execute(found).fetchall() == [("state", False)]
    record(conn, [fact(payment_id, "canceled", "pi", 10000)])
    assert conn.execute(found).fetchall() == [("state", True)], "its cancellation there closes it"


RACES: dict[str, tuple[str, str, list[str | None], str]] = {
    # who is first, who is second, the problem of each command among them, where the payment ends
    "capture, then cancel": ("capture_payment", "cancel_payment", [None, "wrong-state"], "processing"),
    "cancel, then capture": ("cancel_payment", "capture_payment", [None, "wrong-state"], "authorized"),
    "capture, then expiry": ("capture_payment", "canceled", [None], "canceled"),
    "expiry, then capture": ("canceled", "capture_payment", ["wrong-state"], "canceled"),
    "cancel, then the capture's news": ("cancel_payment", "captured", [None], "confirmed"),
    "the capture's news, then cancel": ("captured", "cancel_payment", ["wrong-state"], "confirmed"),
    "capture, then the same again": ("capture_payment", "capture_payment", [None, "wrong-state"], "processing"),
}


@pytest.mark.parametrize("race", RACES)
def test_concurrent_commands_are_serialized(conn: Connection, two: Two, race: str) -> None:
    first, second, problems, end = RACES[race]
    _, key = add_merchant(conn)
    payment_id = held(conn, key)
    outcomes: list[str | None] = []

    def do(connection: Connection, what: str) -> None:
        if what == "canceled":
            record(connection, [fact(payment_id, "canceled", "pi")])
        elif what == "captured":
            record(connection, [fact(payment_id, "captured", "ch", 10000)])
        else:
            outcomes.append(command(connection, what, key, payment_id=payment_id)["problem"])

    at_once(conn, two, lambda: do(two[0], first), lambda: do(two[1], second))
    assert (outcomes, state_of(conn, payment_id)) == (problems, end)
    assert not violations(conn)


# ------------------------------------------------------------------------------------------------- at the provider


async def test_partial_capture_is_made_at_the_provider(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        assert state_of(conn, payment_id) == "authorized"
        command(conn, "capture_payment", key, payment_id=payment_id, amount=7000)
        await run_until_idle(worker, *PIPELINE)
    assert path_of(conn, payment_id)[-3:] == ["authorized", "processing", "confirmed"]
    shown = conn.execute("select captured_minor from surety.payments where id = %s", (payment_id,)).fetchone()
    assert shown == (7000,)
    assert not violations(conn)


@pytest.mark.parametrize("fault", ["timeout_before", "timeout_after", "error_500_before", "error_500_after"])
@pytest.mark.parametrize("asked", ["capture", "cancel"])
async def test_command_with_a_lost_response_is_looked_up_and_done_once(
    conn: Connection, database: str, sandbox: SandboxProcess, asked: str, fault: str
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, capture_method="manual")
    async with in_process_worker(database, sandbox.url, timeout_seconds=0.5) as worker:
        await run_until_idle(worker, *PIPELINE)
        command(conn, f"{asked}_payment", key, payment_id=payment_id)
        sandbox.order(f"payment_intents.{asked}", fault, match=payment_id)
        await run_until_idle(worker, *PIPELINE)
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    # The poll may also have read the balance transaction.
    assert state_of(conn, payment_id) in {"capture": {"confirmed", "settled"}, "cancel": {"canceled"}}[asked]
    assert not violations(conn)


async def test_a_cancel_while_the_outcome_is_unknown_waits_for_it(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    """The intent turns out to exist: it is canceled there, and never confirmed."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    async with in_process_worker(database, sandbox.url, timeout_seconds=0.5) as worker:
        sandbox.order("payment_intents.create", "timeout_after", match=payment_id)
        await run_until_idle(worker, "submit")
        assert command(conn, "cancel_payment", key, payment_id=payment_id)["status"] == 202
        await run_until_idle(worker, "cancel")
        assert state_of(conn, payment_id) == "submitting"
        due(conn)
        await run_until_idle(worker, "submit")
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert path_of(conn, payment_id) == ["initiated", "submitting", "provider_submitted", "canceled"]
    assert not violations(conn)


async def test_a_payment_that_never_reached_the_provider_and_was_canceled_has_failed(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    async with in_process_worker(database, sandbox.url, timeout_seconds=0.5) as worker:
        sandbox.order("payment_intents.create", "timeout_before", match=payment_id)
        await run_until_idle(worker, "submit")
        command(conn, "cancel_payment", key, payment_id=payment_id)
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    failure = conn.execute("select state, failure ->> 'code' from surety.payments where id = %s", (payment_id,))
    assert failure.fetchone() == ("failed", "canceled")


# -------------------------------------------------------------------------------------------------------- over HTTP


def post(merchant: Merchant, path: str, body: Any = None, *, key: str = "k") -> Any:
    return merchant.client.post(path, json=body, headers={"Idempotency-Key": key})


def test_the_api_captures_and_replays_byte_for_byte(conn: Connection, merchant: Merchant) -> None:
    shown = merchant.pay(capture_method="manual", amount=10000)
    record(conn, [fact(shown["id"], "submitted", "pi", 10000), fact(shown["id"], "authorized", "ch", 10000)])
    path = f"/v1/payments/{shown['id']}/capture"
    first = post(merchant, path, {"amount": 7000})
    assert (first.status_code, first.json()["state"]) == (202, "processing")
    again = post(merchant, path, {"amount": 7000})
    assert again.content == first.content
    assert again.headers["idempotency-replayed"] == "true"
    problem(post(merchant, path, {"amount": 7001}), 422, "idempotency-key-reused")
    assert problem(post(merchant, path, key="other"), 409, "wrong-state")["state"] == "processing"


def test_the_api_cancels_without_a_body(merchant: Merchant) -> None:
    shown = merchant.pay()
    answer = post(merchant, f"/v1/payments/{shown['id']}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "canceled")


def test_invalid_command_gets_every_validation_error(merchant: Merchant) -> None:
    shown = merchant.pay()
    path = f"/v1/payments/{shown['id']}/capture"
    assert broken_rules(post(merchant, path, {"amount": 0, "tip": 1}, key=256 * "k")) == {
        ("/amount", "minimum"),
        ("/tip", "known"),
        ("Idempotency-Key", "pattern"),
    }
    assert broken_rules(post(merchant, path, [])) == {("", "type")}
    problem(merchant.client.post(path), 400, "idempotency-key-missing")
    problem(post(merchant, "/v1/payments/pay_1/capture"), 404, "not-found")
    problem(post(merchant, f"/v1/payments/pay_{24 * '0'}/cancel"), 404, "not-found")
    answer = merchant.client.post(path, content=b"amount=1", headers={"Idempotency-Key": "k"})
    problem(answer, 415, "not-json")
