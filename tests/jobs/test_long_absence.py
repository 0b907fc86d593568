"""400 days pass with every kind of unfinished thing left unfinished: claims, polls and reports still work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from app.status_findings import find_problems
from jobs.periodic import PERIODIC_JOBS, run_and_record
from tests.jobs.test_periodic_jobs import move_clock, status
from tests.support.dead_letters import never_sent_letter
from tests.support.payments import Connection, Fact, add_merchant, command, fact, money, pay, record, violations
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import in_process_worker, run_until_idle

CUT_OFF = "acct_cutoff"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("long_absence"), "--payout-seconds=0") as sandbox:
        yield sandbox


def facts_of_states(payments: dict[str, str]) -> list[Fact]:
    """Facts that bring a payment into each state that is not final, by the state's name."""
    facts: dict[str, list[tuple[str, str, int | None]]] = {
        "provider_submitted": [("submitted", "pi", None)],
        "requires_action": [("submitted", "pi", None), ("action", "pi", None)],
        "authorized": [("submitted", "pi", None), ("authorized", "ch", 10000)],
        "processing": [("submitted", "pi", None), ("processing", "pi", None)],
        "confirmed": [("submitted", "pi", None), ("captured", "ch", 10000)],
        "disputed": [("submitted", "pi", None), ("captured", "ch", 10000), ("dispute_opened", "dp", 10000)],
    }
    data = {"dispute_opened": {"status": "needs_response", "evidence_due_at": "2026-12-10T00:00:00Z"}}
    return [
        fact(payments[state], kind, object_id, amount, data=data.get(kind, {}))
        for state, listed in facts.items()
        for kind, object_id, amount in listed
    ]


def leave_everything_unfinished(conn: Connection) -> None:
    """One of everything that waits for something."""
    _, key_hash = add_merchant(conn)
    unfinished = [state for (state,) in conn.execute("select state from surety.states where not is_final")]
    payments = {
        state: pay(conn, key_hash, capture_method="manual" if state == "authorized" else "automatic")[0]
        for state in unfinished
    }
    record(conn, facts_of_states(payments))
    row = conn.execute("select batch_id, fence from outbox.claim_batch('submit', 'killed')").fetchone()
    assert row is not None, "a lease that runs out"
    conn.execute("select surety.begin_calls(%s, %s, 'create', 'worker:killed')", row)
    states = conn.execute("select state from surety.payments").fetchall()
    assert {state for (state,) in states} >= set(unfinished) - {"initiated"}
    assert command(conn, "create_refund", key_hash, payment_id=payments["confirmed"], amount=4000)["status"] == 201
    assert command(conn, "cancel_payment", key_hash, payment_id=payments["submitting"])["status"] in {200, 202}
    never_sent_letter(conn)
    record(conn, [money(payments["confirmed"], "txn", "charge", 10000, 320)])
    dispute = {"source": fact(payments["disputed"], "dispute_opened", "dp")["object_id"]}
    record(conn, [money(payments["disputed"], "txn_dispute", "dispute", -10000, 1500, data=dispute)])
    record(conn, [fact(None, "captured", "ch_unmatched", 10000, intent="pi_unmatched")])
    conn.execute(
        "insert into surety.expectations (payment_id, kind, opened_at, due_at) values (%s, 'settlement', now(), now())",
        (payments["confirmed"],),
    )
    conn.execute(
        "select surety.open_discrepancy('amount', 'pi_x', 'critical', 'they differ',"
        " jsonb_build_array(surety.differing_amount('amount', 1, 2)), null, 'pi_x', surety.time_now())"
    )
    _, cut_off_key = add_merchant(conn, account=CUT_OFF)
    pay(conn, cut_off_key)
    conn.execute("select surety.open_circuit('stripe', %s, 'outage', 'it does not answer', 'worker:w')", (CUT_OFF,))
    conn.execute("update surety.circuit_breakers set probes = 2000000")
    conn.execute("update surety.payments set poll_count = 2000000 where poll_at is not null")
    conn.execute("select surety.note_unreadable_list('stripe', '', 'payouts', 'no answer')")


async def run_everything(conn: Connection, database: str, sandbox: SandboxProcess) -> dict[str, Any]:
    """Run each periodic job and each handler, as a worker does; return the status."""
    async with in_process_worker(database, sandbox.url, judged=False) as worker:
        for name in ["maintain", *PERIODIC_JOBS]:
            await run_and_record(worker, name, PERIODIC_JOBS[name])
            await run_until_idle(worker)
        await worker.circuit_breaker.report_and_probe()
    return status(conn)


async def test_four_hundred_days_with_everything_unfinished(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    leave_everything_unfinished(conn)
    move_clock(conn, "400 days")
    found = {finding.id for finding in find_problems(status(conn))}
    assert {"unfinished-objects", "dead-letters", "list-unreadable", "circuit-open"} <= found
    state = await run_everything(conn, database, sandbox)
    assert state["overdue_jobs"] == []
    assert conn.execute("select count(*) from surety.idempotency_keys").fetchone() == (0,)
    assert conn.execute("select count(*) from surety.unmatched_facts where ended_at is null").fetchone() == (0,)
    assert not violations(conn)
    move_clock(conn, "800 days")
    state = await run_everything(conn, database, sandbox)
    assert state["overdue_jobs"] == []
    assert not violations(conn)
    find_problems(state)
