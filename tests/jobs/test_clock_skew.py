"""The database's clock and the provider's differ: nothing is missed, in either direction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.polling import poll_events, poll_unfinished
from tests.jobs.test_lost_webhooks import charged, one
from tests.jobs.test_periodic_jobs import move_clock
from tests.support.payments import Connection, add_merchant, pay, state_of
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, in_process_worker, run_until_idle, shorten_delays

SKEWS = ["40 seconds", "-40 seconds", "20 minutes", "-20 minutes", "400 days"]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("clock_skew"), "--hang-seconds=1", "--payout-seconds=0") as sandbox:
        yield sandbox


@pytest.mark.parametrize("ahead", SKEWS)
async def test_refund_without_a_webhook_is_polled_whatever_the_clocks_say(
    conn: Connection, database: str, sandbox: SandboxProcess, ahead: str
) -> None:
    move_clock(conn, ahead)
    conn.execute("select surety.maintain_partitions()")
    _, key_hash = add_merchant(conn)
    async with in_process_worker(database, sandbox.url) as worker:
        payment_id, intent = await charged(conn, worker, key_hash)
        await poll_events(worker)
        await poll_events(worker)
        sandbox.control("refunds", {"payment_intent": intent, "amount": 4000})
        await poll_events(worker)
        await run_until_idle(worker, "apply_webhooks")
    assert state_of(conn, payment_id) == "partially_refunded"


@pytest.mark.parametrize("is_measured", [True, False])
@pytest.mark.parametrize("ahead", SKEWS[:4])
async def test_intent_of_an_unanswered_call_is_found_whatever_the_clocks_say(
    conn: Connection, database: str, sandbox: SandboxProcess, ahead: str, is_measured: bool
) -> None:
    move_clock(conn, ahead)
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    async with in_process_worker(database, sandbox.url, judged=False, timeout_seconds=0.3) as worker:
        if is_measured:
            await poll_events(worker)
        [payment_id] = pay(conn, key_hash)
        sandbox.order("payment_intents.create", "timeout_after", match=payment_id)
        await run_until_idle(worker, "submit")
        assert state_of(conn, payment_id) == "submitting"
        conn.execute("update surety.payments set poll_at = surety.time_now()")
        await poll_unfinished(worker)
    assert state_of(conn, payment_id) == "provider_submitted"
    assert one(conn, "select count(*) from surety.discrepancies") == 0
