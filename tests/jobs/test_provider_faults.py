"""Every call to the provider with everything that can go wrong about it: nothing lost, nothing twice, nothing open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.http_client import SECRETS, running_server
from tests.support.payments import Connection, violations
from tests.support.provider_faults import (
    ACCOUNTS,
    CALLS,
    DELAY_SECONDS,
    FAULTS,
    PENDING_SECONDS,
    REORDER_SECONDS,
    UNDECIDED_SECONDS,
    FaultMatrix,
    table,
)
from tests.support.sandbox_process import running_sandbox
from tests.support.workers import in_process_worker

# No answer comes and the connection is cut, long before the worker gives up by itself (stripe/test_stripe_client.py).
# So nothing fails but what was ordered, however busy the machine is.
HANG_SECONDS = 0.1


async def test_no_provider_fault_at_any_call_loses_or_doubles_a_payment(
    conn: Connection, database: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with running_server("webhooks", database) as receiver:
        options = (
            f"--webhook-url={receiver.url}/stripe",
            f"--webhook-secret={SECRETS[0]}",
            f"--delay-seconds={DELAY_SECONDS}",
            f"--reorder-seconds={REORDER_SECONDS}",
            f"--hang-seconds={HANG_SECONDS}",
            f"--available-seconds={PENDING_SECONDS}",
            f"--refund-seconds={UNDECIDED_SECONDS}",
            f"--response-seconds={UNDECIDED_SECONDS}",
            "--payout-seconds=0.3",
        )
        with running_sandbox(tmp_path, *options) as sandbox:
            async with in_process_worker(database, sandbox.url) as worker:
                trial = FaultMatrix(conn, sandbox, worker)
                try:
                    for late in (False, True):
                        await trial.go(late=late)
                        await trial.deliver_late_webhooks()
                finally:
                    record_property("what the provider did, by call and fault", table(trial.counts))
            charges = sandbox.control("charges/summary?metadata_key=surety_payment")
            refunds = sandbox.control("refunds/summary?metadata_key=surety_refund")
            disputes = {dispute["id"]: dispute["status"] for dispute in sandbox.control("disputes")}
            lines = {
                line["id"]
                for account in ACCOUNTS.values()
                for line in sandbox.get("/v1/balance_transactions", {"limit": 100}, account=account)["data"]
            }
    assert trial.unfinished() == []
    assert violations(conn) == {}
    states: dict[str, int] = dict(conn.execute("select state, count(*) from surety.payments group by 1").fetchall())
    assert states.keys() == {"settled", "refunded", "reversed", "failed"}
    assert sum(states.values()) == len(CALLS) * len(FAULTS)
    charged = sum(states.values()) - states["failed"]
    assert charges == {"charges": charged, "payments": charged, "double": []}
    assert (refunds["refunds"], refunds["double"]) == (states["refunded"], [])
    assert disputes == dict(conn.execute("select provider_id, status from surety.disputes").fetchall())
    assert (
        conn.execute("select kind, subject, detail from surety.discrepancies where closed_at is null").fetchall() == []
    )
    dead_letters = "select handler, reason, jsonb_path_query_array(attempts, '$[*].error') from outbox.dead_letters"
    assert conn.execute(dead_letters).fetchall() == []
    assert lines - booked(conn) == set()
    assert [(call, fault) for call in CALLS for fault in FAULTS if not trial.counts[call, fault]] == []


def booked(conn: Connection) -> set[str]:
    """The balance transactions that we know, those of payouts too, which belong to no payment."""
    known = "select object_id from surety.fact_keys where kind = 'money'"
    return {row[0] for row in conn.execute(f"{known} union select object_id from surety.unmatched_facts")}
