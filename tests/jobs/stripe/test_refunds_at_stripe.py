"""Refunds by real calls to the sandbox, and over the API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.db.test_refunds import amounts, ask, states
from tests.support.payments import (
    Connection,
    add_merchant,
    ledger_of,
    pay,
    violations,
)
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, due, in_process_worker, run_until_idle, shorten_delays

PIPELINE = ("submit", "confirm", "refund")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("refunds"), "--hang-seconds=1", "--slow-seconds=0.1") as sandbox:
        yield sandbox


def made(sandbox: SandboxProcess, payment_id: str) -> list[dict[str, Any]]:
    """The refunds of a payment by the sandbox's own memory."""
    page = sandbox.get("/v1/refunds", {"limit": 100})["data"]
    return [refund for refund in page if refund["metadata"].get("surety_payment") == payment_id]


async def test_a_refund_is_made_at_the_provider(conn: Connection, database: str, sandbox: SandboxProcess) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        assert ask(conn, key, payment_id, 2500, reason="requested_by_customer")["status"] == 201
        await run_until_idle(worker, *PIPELINE)
    [refund] = made(sandbox, payment_id)
    assert (refund["amount"], refund["reason"]) == (2500, "requested_by_customer")
    assert amounts(conn, payment_id) == ("partially_refunded", 2500, 0)
    assert states(conn, payment_id) == [("succeeded", 2500)]
    assert not violations(conn)


@pytest.mark.parametrize(
    "fault", ["timeout_before", "timeout_after", "error_500_before", "error_500_after", "reset", "garbage_200"]
)
async def test_refund_with_a_lost_response_is_made_once(
    conn: Connection, database: str, sandbox: SandboxProcess, fault: str
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    async with in_process_worker(database, sandbox.url, timeout_seconds=0.5) as worker:
        await run_until_idle(worker, *PIPELINE)
        refund_id = ask(conn, key, payment_id, 2500)["body"]["id"]
        sandbox.order("refunds.create", fault, match=refund_id)
        await run_until_idle(worker, *PIPELINE)
        assert amounts(conn, payment_id)[1:] == (0, 2500), "it is reserved while the outcome is unknown"
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert len(made(sandbox, payment_id)) == 1
    assert states(conn, payment_id) == [("succeeded", 2500)]
    assert not violations(conn)


async def test_a_look_up_that_fails_does_not_hide_that_the_outcome_is_unknown(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        refund_id = ask(conn, key, payment_id, 2500)["body"]["id"]
        sandbox.order("refunds.create", "error_500_after", match=refund_id)
        await run_until_idle(worker, *PIPELINE)
        sandbox.order("refunds.list", "rate_limit_429")
        due(conn)
        await run_until_idle(worker, *PIPELINE)
        assert sandbox.control("faults")["next"] == []
        call = "select status from surety.calls where operation like 'refund:%'"
        assert conn.execute(call).fetchall() == [(500,)]
        due(conn)
        await run_until_idle(worker, *PIPELINE)
    assert len(made(sandbox, payment_id)) == 1
    assert states(conn, payment_id) == [("succeeded", 2500)]


async def test_a_refund_that_the_provider_refuses_has_failed_and_reserves_nothing(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    """It was refunded in the provider's dashboard, and the event is still on its way."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, *PIPELINE)
        row = conn.execute("select provider_id from surety.payments").fetchone()
        assert row is not None
        sandbox.post("/v1/refunds", {"payment_intent": row[0]}, key="dashboard")
        assert ask(conn, key, payment_id, 2500)["status"] == 201
        await run_until_idle(worker, *PIPELINE)
    refund = conn.execute("select state, failure ->> 'code' from surety.refunds").fetchall()
    assert refund == [("failed", "charge_already_refunded")]
    assert amounts(conn, payment_id)[1:] == (0, 0)
    assert "reserved_for_refunds" not in ledger_of(conn, payment_id)
    assert not violations(conn)
