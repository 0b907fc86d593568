"""What the workers read from the provider by themselves: unfinished objects and lists, and the money in them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from jobs.database import WORKER_CONNECTIONS_MAX
from jobs.handlers.webhooks import fetch_dispute
from jobs.payouts import poll_payouts
from jobs.polling import merge_time_ranges, poll_balance_transactions, poll_unfinished
from jobs.stripe.facts import FactOrigin
from jobs.stripe.webhook_events import ProviderObject
from tests.jobs.conftest import Pay
from tests.jobs.test_workers import count
from tests.support.payments import Connection, add_merchant, command, ledger_of, path_of, pay, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import (
    NO_AUTOMATIC_RETRY,
    in_process_worker,
    run_until_idle,
    shorten_delays,
)

# Automatic payouts would be lines of the balance as well.
SETTLED_IN_DOLLARS = ("--settlement-currency=usd", "--available-seconds=0", "--payout-seconds=0")


async def test_polling_finds_changes_whose_webhooks_were_lost(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.confirm(pi)
        conn.execute("update surety.payments set poll_at = now() + interval '1 hour'")
        await poll_unfinished(worker)
        assert state_of(conn, payment_id) == "provider_submitted", "not due yet"
        conn.execute("update surety.payments set poll_at = now()")
        await poll_unfinished(worker)
        assert state_of(conn, payment_id) in {"confirmed", "settled"}
    result = conn.execute(
        "select kind, outcome from audit.entries where snapshot ->> 'operation' = 'fetch' order by id"
    )
    assert result.fetchall() == [("call", "asked"), ("answer", "answered")]


async def test_failed_poll_is_repeated_later(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    shop()
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
        conn.execute("update surety.payments set poll_at = now()")
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.order("payment_intents.retrieve", "error_500_before", match=pi)
        await poll_unfinished(worker)
    [(poll_count, wait)] = conn.execute(
        "select poll_count, extract(epoch from poll_at - now())::float from surety.payments"
    ).fetchall()
    assert poll_count == 1
    assert 1 < wait <= 2


async def test_expired_action_is_canceled(conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    query = "select surety.emit_expired_actions(%s)"
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        assert conn.execute(query, (timedelta(minutes=1),)).fetchone() == ([],)
        assert conn.execute(query, (timedelta(),)).fetchone() == (["payment.action_overdue"],)
        assert conn.execute(query, (timedelta(),)).fetchone() == ([],), "once"
        await run_until_idle(worker)
    assert path_of(conn, payment_id)[-2:] == ["requires_action", "canceled"]
    [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
    assert sandbox.read(pi)["status"] == "canceled"


async def test_payment_that_succeeds_during_its_cancellation_is_confirmed(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    [payment_id] = shop(method_token="pm_card_threeDSecure2Required")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
        sandbox.answer_as_payer(pi, "approve")
        conn.execute("select surety.emit_expired_actions('0 s')")
        await run_until_idle(worker)
    assert state_of(conn, payment_id) in {"confirmed", "settled"}


async def test_unmatched_money_is_posted_to_suspense_and_a_discrepancy(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    conn.execute("update surety.environment set created_at = now(), kind = 'test'")
    made = sandbox.control("foreign-charge", {"amount": 7777, "currency": "usd"})
    eventually(lambda: sandbox.get(f"/v1/charges/{made['charge']}")["balance_transaction"])
    txn = sandbox.get(f"/v1/charges/{made['charge']}")["balance_transaction"]
    async with in_process_worker(database, sandbox.url) as worker:
        await poll_balance_transactions(worker)
        unmatched = "select count(*) from surety.unmatched_facts where object_id = %s and ended_at is null"
        assert count(conn, unmatched, txn) >= 1
        conn.execute("insert into surety.clock (ahead) values ('16 minutes')")
        conn.execute("select surety.retry_unmatched_facts()")
    found = "select count(*) from surety.discrepancies where kind = 'foreign' and subject = %s"
    assert count(conn, found, "stripe/") == 1
    assert count(conn, "select count(*) from ledger.postings where cause = %s and rule = 'foreign'", txn) == 1


async def test_payouts_are_polled(conn: Connection, database: str, tmp_path: Path) -> None:
    with running_sandbox(tmp_path, "--payout-seconds=0.2", "--payout-arrival-seconds=0.1") as sandbox:
        sandbox.pay()
        eventually(lambda: sandbox.get("/v1/payouts")["data"], 10)
        async with in_process_worker(database, sandbox.url) as worker:
            await poll_payouts(worker)
            await poll_balance_transactions(worker)
    assert (
        count(
            conn, "select count(*) from surety.unmatched_facts where kind = 'payout' and ended_as = 'without_payment'"
        )
        > 0
    )
    assert count(conn, "select count(*) from ledger.postings where rule = 'payout'") > 0
    assert count(conn, "select count(*) from surety.poll_cursors") == 2


async def test_a_euro_charge_that_settles_in_dollars_is_exchanged(
    conn: Connection, database: str, tmp_path: Path, shop: Pay
) -> None:
    with running_sandbox(tmp_path, *SETTLED_IN_DOLLARS) as sandbox:
        [payment_id] = shop(currency="eur")
        async with in_process_worker(database, sandbox.url) as worker:
            await run_until_idle(worker)
            [(pi,)] = conn.execute("select provider_id from surety.payments").fetchall()
            eventually(lambda: sandbox.get("/v1/charges", {"payment_intent": pi})["data"][0]["balance_transaction"])
            await poll_balance_transactions(worker)
        [line] = sandbox.get("/v1/balance_transactions")["data"]
    assert state_of(conn, payment_id) == "settled"
    ledger = ledger_of(conn, payment_id)
    assert ledger["provider_balance"] == line["net"]
    assert ledger["fee_revenue eur"] == 375
    assert "provider_receivable eur" not in ledger
    assert not violations(conn)


async def test_euros_that_settled_in_dollars_are_refunded_and_disputed(
    conn: Connection, database: str, tmp_path: Path
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    refunded, disputed = pay(conn, key, 2, currency="eur")
    with running_sandbox(tmp_path, *SETTLED_IN_DOLLARS) as sandbox:
        async with in_process_worker(database, sandbox.url) as worker:
            await run_until_idle(worker)
            eventually(lambda: len(sandbox.get("/v1/balance_transactions")["data"]) == 2)
            await poll_balance_transactions(worker)
            assert command(conn, "create_refund", key, payment_id=refunded)["status"] == 201
            await run_until_idle(worker)
            row = conn.execute("select provider_id from surety.payments where id = %s", (disputed,)).fetchone()
            assert row is not None
            dispute = sandbox.control("disputes", {"payment_intent": row[0]})["id"]
            sandbox.control(f"disputes/{dispute}", {"outcome": "partly_lost", "returned": 4000})
            await fetch_dispute(worker, ProviderObject("", False, "dispute", dispute), FactOrigin("", False, "poll"))
            await poll_balance_transactions(worker)
    charged = {"fee_revenue eur": 375, "currency_exchange eur": -375, "currency_exchange": 407}
    assert state_of(conn, refunded) == "refunded"
    assert ledger_of(conn, refunded) == charged | {
        "available": 10443 - 10850,
        "provider_balance": 10505 - 10850,
        "provider_cost": 345,
    }
    row = conn.execute("select withdrawn_minor, currency from surety.disputes").fetchone()
    assert row == (6000, "eur")
    assert ledger_of(conn, disputed) == charged | {
        "available": 10443 - 10850 - 1500 + 4340,
        "provider_balance": 10505 - 10850 - 1500 + 4340,
        "fee_revenue": 1500,
        "provider_cost": 345 + 1500,
    }
    assert not violations(conn)


async def test_more_disputes_than_connections_are_fetched_beside_each_other(
    conn: Connection, database: str, sandbox: SandboxProcess, shop: Pay
) -> None:
    count = WORKER_CONNECTIONS_MAX + 1
    shop(count)
    origin = FactOrigin("", False, "poll")
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        intents = [row[0] for row in conn.execute("select provider_id from surety.payments")]
        opened = [sandbox.control("disputes", {"payment_intent": intent})["id"] for intent in intents]
        async with asyncio.timeout(30):
            await asyncio.gather(
                *(fetch_dispute(worker, ProviderObject("", False, "dispute", id), origin) for id in opened)
            )
    assert conn.execute("select count(*) from surety.disputes").fetchone() == (count,)


def test_pending_money_is_polled_in_time_ranges() -> None:
    day = datetime(2026, 11, 22, tzinfo=UTC)
    minutes = [3, 0, 59, 200, 201]
    found = merge_time_ranges([day + timedelta(minutes=minute) for minute in minutes])
    assert [((a - day).seconds // 60, (b - day).seconds // 60) for a, b in found] == [(0, 59), (200, 201)]
    assert merge_time_ranges([]) == []
