"""Disputes: the last fetch wins, every status has a place, only money that moved is booked, evidence has a deadline.
The balance that remains, and what changed it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.stripe.facts import FactOrigin
from jobs.worker import Worker
from tests.support.dead_letters import exhaust_retries
from tests.support.http_client import Merchant, problem, running_server
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    command,
    fact,
    ledger_of,
    money,
    pay,
    record,
    state_of,
    violations,
)
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, attempts, due, in_process_worker, run_until_idle, shorten_delays

POLL = FactOrigin("", False, "poll")

STATUSES = {
    "warning_needs_response": ("dispute_flagged", "confirmed"),
    "warning_under_review": ("dispute_flagged", "confirmed"),
    "warning_closed": ("dispute_flagged", "confirmed"),
    "needs_response": ("dispute_opened", "disputed"),
    "under_review": ("dispute_opened", "disputed"),
    "won": ("dispute_won", "confirmed"),
    "lost": ("dispute_lost", "reversed"),
    "prevented": ("dispute_won", "confirmed"),
    "appeal_needs_response": ("dispute_opened", "disputed"),
    "appeal_under_review": ("dispute_opened", "disputed"),
    "a_status_of_tomorrow": ("dispute_opened", "disputed"),
}


def captured(conn: Connection, key: bytes) -> str:
    [payment_id] = pay(conn, key)
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 10000)])
    return payment_id


def dispute_fact(p: str, status: str, revision: int, amount: int = 10000, **data: Any) -> Fact:
    return fact(p, STATUSES[status][0], "dp", amount, revision=revision, data={"status": status, **data})


def dispute(conn: Connection) -> dict[str, Any]:
    """The one dispute, as merchants see it."""
    row = conn.execute("select s.document from surety.disputes as d cross join api.show_dispute(d) as s").fetchone()
    assert row is not None
    shown: dict[str, Any] = row[0]
    return shown


@pytest.mark.parametrize("status", STATUSES)
def test_every_dispute_status_is_mapped_and_only_withdrawn_amounts_count(conn: Connection, status: str) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [dispute_fact(payment_id, status, 0)])
    assert dispute(conn)["status"] == status
    assert state_of(conn, payment_id) == STATUSES[status][1]
    events = conn.execute("select type from outbox.events where aggregate_type = 'dispute'").fetchall()
    assert events == [(f"dispute.{status}",)]
    assert not violations(conn)


def test_dispute_statuses_match_the_stripe_specification(conn: Connection) -> None:
    from tests.support.stripe_description import description

    published = description()["components"]["schemas"]["dispute"]["properties"]["status"]["enum"]
    rows = {row[0] for row in conn.execute("select status from surety.dispute_statuses")}
    assert rows == set(published)


# The statuses of a dispute, and the balances of 10000 captured by then: available, disputed, and withheld_by_network
# without the balance transactions.
STATUS_SEQUENCES: dict[str, tuple[list[tuple[str, int]], dict[str, int]]] = {
    "an inquiry, then a dispute": (
        [("warning_needs_response", 10000), ("needs_response", 10000)],
        {"available": -10000, "disputed": 10000},
    ),
    "won": ([("needs_response", 10000), ("won", 10000)], {}),
    "lost": ([("needs_response", 10000), ("lost", 10000)], {"available": -10000, "withheld_by_network": -10000}),
    "lost in part": ([("needs_response", 10000), ("lost", 6000)], {"available": -6000, "withheld_by_network": -6000}),
    "appealed": (
        [("needs_response", 10000), ("lost", 10000), ("under_review", 10000)],
        {"available": -10000, "disputed": 10000},
    ),
    "appealed and won": ([("needs_response", 10000), ("lost", 10000), ("under_review", 10000), ("won", 10000)], {}),
    "reinstated at once": ([("needs_response", 10000), ("lost", 10000), ("won", 10000)], {}),
    "appealed and lost again": (
        [("needs_response", 10000), ("lost", 10000), ("under_review", 10000), ("lost", 10000)],
        {"available": -10000, "withheld_by_network": -10000},
    ),
}


@pytest.mark.parametrize("course", STATUS_SEQUENCES)
def test_dispute_ends_the_same_in_every_order_of_fetches(conn: Connection, course: str) -> None:
    steps, end = STATUS_SEQUENCES[course]
    _, key = add_merchant(conn)
    for order in itertools.permutations(range(len(steps))):
        payment_id = captured(conn, key)
        for place in order:
            status, amount = steps[place]
            record(conn, [dispute_fact(payment_id, status, place, amount)])
        rest = {"provider_receivable": 10000, "pending": 9625, "fee_revenue": 375}
        assert ledger_of(conn, payment_id) == rest | end, order
    assert not violations(conn)


def test_dispute_fee_returned_by_the_network_is_credited_to_the_merchant(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [dispute_fact(payment_id, "needs_response", 0), money(payment_id, "t1", "dispute", -10000, 1500)])
    record(conn, [dispute_fact(payment_id, "won", 1), money(payment_id, "t2", "dispute_reversal", 10000, -1500)])
    assert ledger_of(conn, payment_id) == {"provider_receivable": 10000, "pending": 9625, "fee_revenue": 375}


def test_dispute_of_a_refunded_payment_is_a_loss_and_a_discrepancy(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [fact(payment_id, "refund_succeeded", "re", 4000), dispute_fact(payment_id, "lost", 0)])
    assert conn.execute("select kind, severity from surety.discrepancies").fetchall() == [("amount", "critical")]
    assert not violations(conn)


def test_settlement_is_expected_for_a_payment_disputed_early(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [dispute_fact(payment_id, "needs_response", 0)])
    batch = conn.execute(
        "select batch_id, fence, event_ids from outbox.claim_batch('expect_settlement', 'w')"
    ).fetchone()
    assert batch is not None
    assert conn.execute("select surety.expect_settlement(%s, %s, %s)", batch).fetchone() == (True,)
    record(conn, [dispute_fact(payment_id, "won", 1)])
    assert state_of(conn, payment_id) == "confirmed"
    expected = "select met_at is not null from surety.expectations"
    assert conn.execute(expected).fetchall() == [(False,)]
    assert not violations(conn)


# ---------------------------------------------------------------------------------------------------------- evidence


def submit_evidence(conn: Connection, key: bytes, **fields: Any) -> dict[str, Any]:
    asked = {"dispute_id": dispute(conn)["id"], "evidence": {"uncategorized_text": "sent"}, "submit": False} | fields
    return command(conn, "submit_evidence", key, **asked)


LONG_FIELDS = [
    "access_activity_log", "cancellation_policy_disclosure", "cancellation_rebuttal", "duplicate_charge_explanation",
    "product_description", "refund_policy_disclosure", "refund_refusal_explanation",
]  # fmt: skip


def test_evidence_is_merged_and_submitted_once(conn: Connection) -> None:
    _, key = add_merchant(conn)
    _, other_key = add_merchant(conn)
    record(conn, [dispute_fact(captured(conn, key), "needs_response", 0, evidence_due_at="2099-01-01T00:00:00Z")])
    assert submit_evidence(conn, other_key)["problem"] == "not-found"
    assert submit_evidence(conn, key)["body"]["evidence"]["given"] == ["uncategorized_text"]
    given = submit_evidence(conn, key, evidence={"customer_name": "Ann"}, submit=True)
    assert (given["status"], given["body"]["evidence"]["given"]) == (202, ["customer_name", "uncategorized_text"])
    refused = submit_evidence(conn, key)
    assert (refused["problem"], refused["detail"]["state"]) == ("wrong-state", "needs_response")


def test_evidence_is_limited_over_all_that_was_given(conn: Connection) -> None:
    _, key = add_merchant(conn)
    record(conn, [dispute_fact(captured(conn, key), "needs_response", 0, evidence_due_at="2099-01-01T00:00:00Z")])
    fields = [*LONG_FIELDS, "uncategorized_text"]
    for name in fields[:7]:
        assert submit_evidence(conn, key, evidence={name: "é" * 20000})["status"] == 202
    assert submit_evidence(conn, key, evidence={fields[7]: "x" * 10000})["status"] == 202
    refused = submit_evidence(conn, key, evidence={"customer_name": "A"}, submit=True)
    assert (refused["status"], refused["problem"]) == (None, "invalid-request")
    assert refused["detail"] == {"field": "/evidence", "rule": "max_length", "limit": 150000, "given": 150001}
    assert "customer_name" not in dispute(conn)["evidence"]["given"]
    shorter = submit_evidence(conn, key, evidence={"customer_name": "A", fields[0]: "x"}, submit=True)
    assert shorter["status"] == 202


@pytest.mark.parametrize(
    ("status", "due"), [("lost", "2099-01-01T00:00:00Z"), ("needs_response", "2020-01-01T00:00:00Z")]
)
def test_late_evidence_is_refused(conn: Connection, status: str, due: str) -> None:
    _, key = add_merchant(conn)
    record(conn, [dispute_fact(captured(conn, key), status, 0, evidence_due_at=due)])
    assert submit_evidence(conn, key)["problem"] == "wrong-state"


def test_evidence_due_soon_is_announced_once(conn: Connection) -> None:
    _, key = add_merchant(conn)
    record(conn, [dispute_fact(captured(conn, key), "needs_response", 0, evidence_due_at="2020-01-01T00:00:00Z")])
    remind = "select surety.emit_evidence_reminders('3 days')"
    assert conn.execute(remind).fetchone() == (["dispute.evidence_due"],)
    assert conn.execute(remind).fetchone() == ([],)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("disputes"), "--hang-seconds=0.1") as sandbox:
        yield sandbox


async def disputed(conn: Connection, worker: Worker, sandbox: SandboxProcess, key: bytes) -> str:
    """The provider's id of a dispute that waits for evidence. No webhook announces its later changes."""
    [payment_id] = pay(conn, key)
    await run_until_idle(worker, "submit", "confirm")
    [(intent,)] = conn.execute("select provider_id from surety.payments where id = %s", (payment_id,)).fetchall()
    made: str = sandbox.control("disputes", {"payment_intent": intent})["id"]
    record(conn, [dispute_fact(payment_id, "needs_response", 0) | {"object_id": made}])
    return made


async def test_evidence_reaches_the_provider_and_wins(conn: Connection, database: str, sandbox: SandboxProcess) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    async with in_process_worker(database, sandbox.url) as worker:
        made = await disputed(conn, worker, sandbox, key)
        assert (
            submit_evidence(conn, key, evidence={"uncategorized_text": "winning_evidence"}, submit=True)["status"]
            == 202
        )
        await run_until_idle(worker, "evidence")
    there = sandbox.get(f"/v1/disputes/{made}")
    assert there["evidence"]["uncategorized_text"] == "winning_evidence"
    assert dispute(conn)["status"] in {"under_review", "won"}
    assert not violations(conn)


async def test_refused_evidence_is_open_again_and_shows_the_reason(
    conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    async with in_process_worker(database, sandbox.url) as worker:
        made = await disputed(conn, worker, sandbox, key)
        assert submit_evidence(conn, key, submit=True)["status"] == 202
        conn.execute('update surety.disputes set evidence = evidence || \'{"colour": "red"}\'')
        await run_until_idle(worker, "evidence")
        shown = dispute(conn)["evidence"]
        assert shown["failure"]["message"] == "Received unknown parameter: evidence[colour]"
        assert shown["submit_asked_at"] is None and shown["due_at"] is not None
        emitted = conn.execute("select count(*) from outbox.events where type = 'dispute.evidence_refused'")
        assert emitted.fetchone() == (1,)
        assert conn.execute("select count(*) from outbox.dead_letters").fetchone() == (0,)
        conn.execute("update surety.disputes set evidence = evidence - 'colour'")
        again = submit_evidence(conn, key, submit=True)
        assert (again["status"], again["body"]["evidence"]["failure"]) == (202, None)
        await run_until_idle(worker, "evidence")
    assert sandbox.get(f"/v1/disputes/{made}")["evidence_details"]["submission_count"] == 1
    assert dispute(conn)["evidence"]["failure"] is None
    assert not violations(conn)


def evidence_in_vain(conn: Connection, key: bytes) -> str:
    """A disputed payment whose evidence can't be sent: a dead letter."""
    payment_id = captured(conn, key)
    record(conn, [dispute_fact(payment_id, "needs_response", 0, evidence_due_at="2099-01-01T00:00:00Z")])
    assert submit_evidence(conn, key, submit=True)["status"] == 202
    assert len(exhaust_retries(conn, "evidence", "Stripe 404")) == 1
    return payment_id


@pytest.mark.parametrize(
    ("status", "closed"), [("appeal_needs_response", None), ("under_review", "resolved"), ("lost", "resolved")]
)
def test_dead_letter_of_evidence_closes_once_its_dispute_takes_none(
    conn: Connection, status: str, closed: str | None
) -> None:
    _, key = add_merchant(conn)
    payment_id = evidence_in_vain(conn, key)
    record(conn, [dispute_fact(payment_id, status, 1)])
    assert conn.execute("select closed_as from outbox.dead_letters").fetchall() == [(closed,)]


def test_discarded_evidence_is_open_again(conn: Connection) -> None:
    _, key = add_merchant(conn)
    evidence_in_vain(conn, key)
    discard = "select d.outcome from outbox.dead_letters as l, outbox.discard_dead_letter(l.id, 'a', 'old') as d"
    assert conn.execute(discard).fetchall() == [("discarded",)]
    shown = dispute(conn)["evidence"]
    assert shown["submit_asked_at"] is None
    assert shown["failure"] == {"code": "processing_error", "message": "It could not be submitted."}
    assert shown["due_at"] == "2099-01-01T00:00:00.000Z"
    assert submit_evidence(conn, key, submit=True)["status"] == 202


@pytest.mark.parametrize("fault", ["timeout_before", "timeout_after", "error_500_before", "error_500_after"])
async def test_evidence_with_a_lost_response_is_submitted_once(
    conn: Connection, database: str, sandbox: SandboxProcess, fault: str
) -> None:
    """A second submission is refused; then the dispute shows the first."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    async with in_process_worker(database, sandbox.url) as worker:
        made = await disputed(conn, worker, sandbox, key)
        body = submit_evidence(conn, key, submit=True)["body"]
        sandbox.order("disputes.update", fault, match=body["id"])
        for _ in range(3):
            await run_until_idle(worker, "evidence")
            due(conn)
    assert sandbox.get(f"/v1/disputes/{made}")["evidence_details"]["submission_count"] == 1
    assert dispute(conn)["status"] == "under_review"
    assert attempts(conn) == []
    assert conn.execute("select count(*) from outbox.dead_letters").fetchone() == (0,)
    assert not violations(conn)


@pytest.mark.parametrize("first", ["opened", "lost"])
def test_latest_started_of_two_concurrent_dispute_fetches_wins(conn: Connection, first: str) -> None:
    """Each should be alone; a lock is lost with its connection."""
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key)
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    dispute = fact(payment_id, "dispute_opened", "dp", 10000)
    query = "select surety.next_fetch_number('stripe', '', false, %s) from generate_series(1, 2)"
    (earlier,), (later,) = conn.execute(query, (dispute["object_id"],)).fetchall()
    assert earlier < later
    result = [dispute | {"revision": earlier}, dispute | {"revision": later, "kind": "dispute_lost"}]
    for one in result if first == "opened" else reversed(result):
        record(conn, [one])
    assert state_of(conn, payment_id) == "reversed"
    assert not violations(conn)


# ---------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def merchant(conn: Connection, database: str) -> Iterator[Merchant]:
    with running_server("api", database) as api:
        merchant = Merchant(conn, api.url)
        with merchant.client:
            yield merchant


def test_api_shows_disputes_accepts_evidence_and_shows_the_balance(conn: Connection, merchant: Merchant) -> None:
    assert merchant.get("/v1/balance")["data"] == []
    payment_id = merchant.pay(amount=10000)["id"]
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 10000)])
    record(conn, [dispute_fact(payment_id, "needs_response", 0, evidence_due_at="2099-01-01T00:00:00Z")])
    [shown] = merchant.get("/v1/disputes")["data"]
    assert (shown["status"], shown["amount"], shown["payment"]) == ("needs_response", 10000, payment_id)
    assert merchant.get(f"/v1/disputes/{shown['id']}") == shown | {"evidence": shown["evidence"] | {"texts": {}}}
    assert merchant.get("/v1/disputes", payment=payment_id)["data"] == [shown]
    assert merchant.get("/v1/disputes", payment=f"pay_{24 * '0'}")["data"] == []
    path = f"/v1/disputes/{shown['id']}/evidence"
    body = {"evidence": {"uncategorized_text": "it was sent"}, "submit": True}
    answer = merchant.client.post(path, json=body, headers={"Idempotency-Key": "a"})
    assert answer.status_code == 202, answer.text
    again = merchant.client.post(path, json=body, headers={"Idempotency-Key": "a"})
    assert (again.content, again.headers["idempotency-replayed"]) == (answer.content, "true")
    problem(merchant.client.post(path, json=body, headers={"Idempotency-Key": "b"}), 409, "wrong-state")
    conn.execute('select surety.reopen_evidence(%s, 1, \'{"code": "c", "message": "m"}\')', (shown["id"],))
    assert merchant.get(f"/v1/disputes/{shown['id']}")["evidence"] == {
        "due_at": "2099-01-01T00:00:00.000Z",
        "given": ["uncategorized_text"],
        "texts": {"uncategorized_text": "it was sent"},
        "submit_asked_at": None,
        "failure": {"code": "c", "message": "m"},
    }
    for number, name in enumerate(LONG_FIELDS):
        body = {"evidence": {name: "x" * 20000}}
        answer = merchant.client.post(path, json=body, headers={"Idempotency-Key": f"long {number}"})
        assert answer.status_code == 202, answer.text
    body = {"evidence": {"refund_policy_disclosure": "x", "uncategorized_text": "x" * 20000}}
    merchant.client.post(path, json=body, headers={"Idempotency-Key": "c"})
    body = {"evidence": {"refund_policy_disclosure": "x" * 20000}, "submit": True}
    refused = merchant.client.post(path, json=body, headers={"Idempotency-Key": "d"})
    [broken] = problem(refused, 400, "invalid-request")["errors"]
    assert (broken["field"], broken["rule"], broken["limit"]) == ("/evidence", "max_length", 150000)
    assert (broken["given"], "at most 150000 characters" in broken["message"]) == (160000, True)
    event = next(e for e in merchant.get("/v1/events")["data"] if e["type"].startswith("dispute."))
    assert (event["type"], event["data"]["id"]) == ("dispute.needs_response", shown["id"])
    [usd] = merchant.get("/v1/balance")["data"]
    reserved = {"reserved_for_refunds": 0, "reserved_for_payouts": 0}
    owed = {"pending": 9625, "available": -10000, "disputed": 10000} | reserved
    assert usd == {"currency": "usd"} | owed
    listed = merchant.get("/v1/balance/transactions")["data"]
    assert [row["type"] for row in listed] == ["dispute_opened", "captured"]
    assert listed[0]["changes"] == [
        {"account": "available", "amount": -10000, "currency": "usd"},
        {"account": "disputed", "amount": 10000, "currency": "usd"},
    ]
    page = merchant.get("/v1/balance/transactions", limit=1)
    assert (page["data"], page["has_more"]) == (listed[:1], True)
    assert merchant.get("/v1/balance/transactions", starting_after=listed[0]["id"])["data"] == listed[1:]
    problem(merchant.client.get(f"/v1/disputes/dp_{24 * '0'}"), 404, "not-found")


def shown_payment(conn: Connection, payment_id: str) -> dict[str, Any]:
    """The payment, as merchants see it."""
    row = conn.execute(
        "select s.document from surety.payments as p cross join api.show_payment(p) as s where p.id = %s", (payment_id,)
    ).fetchone()
    assert row is not None
    shown: dict[str, Any] = row[0]
    return shown


@pytest.mark.parametrize("kept", [1, 9950, 10000])
def test_payment_with_a_loss_is_reversed_however_small_the_part(conn: Connection, kept: int) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [dispute_fact(payment_id, "needs_response", 0)])
    record(conn, [dispute_fact(payment_id, "lost", 1)])
    record(conn, [dispute_fact(payment_id, "lost", 2, kept)])
    shown = shown_payment(conn, payment_id)
    assert (shown["state"], shown["status"], shown["amount_reversed"]) == ("reversed", "lost", kept)
    assert not violations(conn)


def test_partial_refund_has_a_status_of_its_own(conn: Connection) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [fact(payment_id, "refund_succeeded", "re", 1)])
    shown = shown_payment(conn, payment_id)
    assert (shown["status"], shown["amount_refunded"]) == ("partially_refunded", 1)


@pytest.mark.parametrize("end", ["won", "lost"])
def test_dispute_of_more_than_was_captured_is_no_discrepancy(conn: Connection, end: str) -> None:
    _, key = add_merchant(conn)
    payment_id = captured(conn, key)
    record(conn, [dispute_fact(payment_id, "needs_response", 0, 10500)])
    record(conn, [money(payment_id, "txn_d", "dispute", -10500, 1500)])
    record(conn, [dispute_fact(payment_id, end, 1, 10500)])
    assert conn.execute("select detail from surety.discrepancies").fetchall() == []
    assert state_of(conn, payment_id) == {"won": "confirmed", "lost": "reversed"}[end]
    assert not violations(conn)
