"""A merchant whose account the provider refuses: new payments, cancellations, and the end of payments that wait."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.support.payments import (
    Connection,
    add_merchant,
    command,
    create,
    path_of,
    pay,
    record_results,
    request,
    state_of,
    violations,
)

ACCOUNT = "acct_shop"
REFUSED = {"status": 403, "outcome": "access_refused", "error": "Stripe 403", "outage": f"stripe:{ACCOUNT}"}
UNKNOWN = {"outcome": "unknown", "error": "no answer", "outage": f"stripe:{ACCOUNT}"}


@pytest.fixture
def shop(conn: Connection) -> bytes:
    """The key of a merchant with an account of its own. Another merchant keeps the handlers running."""
    conn.execute("update surety.environment set kind = 'test'")
    add_merchant(conn)
    return add_merchant(conn, account=ACCOUNT)[1]


def pass_time(conn: Connection, **interval: float) -> None:
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update"
        " set ahead = clock.ahead + excluded.ahead",
        (timedelta(**interval),),
    )


def cut_off(conn: Connection) -> None:
    conn.execute("select surety.open_circuit('stripe', %s, 'account_refused', 'Stripe 403', 'test')", (ACCOUNT,))


def connect(conn: Connection) -> None:
    conn.execute("select surety.close_circuit('stripe', %s, 'it answers', 'test')", (ACCOUNT,))


class Send:
    """A worker's send of one payment's creation: begun when it is made, not recorded yet."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        conn.execute("update outbox.retries set due_at = surety.time_now()")
        claim = "select batch_id, fence, event_ids from outbox.claim_batch('submit', 'w')"
        [(self.batch, self.fence, [self.event_id])] = conn.execute(claim).fetchall()
        self.begin()

    def begin(self) -> None:
        query = "select payment_id, verdict, send_number from surety.begin_calls(%s, %s, 'create', 'worker:w')"
        [(self.payment_id, self.verdict, self.number)] = self.conn.execute(query, (self.batch, self.fence)).fetchall()

    def record(self, result: dict[str, Any]) -> None:
        is_undone = result is not UNKNOWN
        known = {"event_id": self.event_id, "payment_id": self.payment_id, "operation": "create"}
        known |= {"access_refused": True, "undone_send": self.number} if is_undone else {}
        record_results(self.conn, self.batch, self.fence, [known | result])


def outcomes(conn: Connection, *requests: dict[str, Any]) -> list[str | int]:
    """The status or the problem of each request of one batch."""
    return [row["problem"] or row["status"] for row in create(conn, requests)]


def test_new_payments_are_refused_after_five_minutes_and_only_those_of_that_account(
    conn: Connection, shop: bytes
) -> None:
    _, other = add_merchant(conn, account="acct_other")
    _, own = add_merchant(conn)
    cut_off(conn)
    assert outcomes(conn, request(shop)) == [201]
    pass_time(conn, minutes=4, seconds=59)
    assert outcomes(conn, request(shop)) == [201]
    pass_time(conn, seconds=1)
    assert outcomes(conn, request(other), request(shop), request(own)) == [201, "provider-account-refused", 201]
    assert outcomes(conn, request(shop), request(shop)) == ["provider-account-refused"] * 2
    connect(conn)
    assert outcomes(conn, request(shop)) == [201]
    assert not violations(conn)


@pytest.mark.parametrize("cause", ["outage", "key_refused"])
def test_outage_and_refused_key_refuse_no_payment(conn: Connection, shop: bytes, cause: str) -> None:
    conn.execute("select surety.open_circuit('stripe', '', %s, 'no', 'test')", (cause,))
    conn.execute("select surety.open_circuit('stripe', %s, %s, 'no', 'test')", (ACCOUNT, cause))
    pass_time(conn, days=1)
    assert outcomes(conn, request(shop)) == [201]


def test_repetition_of_an_accepted_request_gets_its_first_answer(conn: Connection, shop: bytes) -> None:
    accepted = request(shop, reference="order-1")
    [first] = create(conn, [accepted])
    cut_off(conn)
    pass_time(conn, minutes=5)
    [again, refused] = create(conn, [accepted, request(shop)])
    assert refused["problem"] == "provider-account-refused" and refused["body"] is None
    assert (again["status"], again["body"], again["is_replayed"]) == (201, first["body"], True)
    assert outcomes(conn, accepted | {"request_hash": "01"}) == ["idempotency-key-reused"]


def test_refused_request_keeps_neither_key_nor_reference(conn: Connection, shop: bytes) -> None:
    cut_off(conn)
    pass_time(conn, minutes=5)
    wanted = request(shop, reference="order-1")
    assert outcomes(conn, wanted, wanted, wanted | {"request_hash": "01"}) == [
        "provider-account-refused", "provider-account-refused", "idempotency-key-reused"
    ]  # fmt: skip
    taken = "select (select count(*) from surety.idempotency_keys), (select count(*) from surety.payment_references)"
    assert conn.execute(taken).fetchall() == [(0, 0)]
    connect(conn)
    assert outcomes(conn, wanted) == [201]


def test_payment_whose_creation_was_refused_is_canceled_at_once(conn: Connection, shop: bytes) -> None:
    [payment_id] = pay(conn, shop, reference="order-1")
    for _ in range(3):
        Send(conn).record(REFUSED)
    assert state_of(conn, payment_id) == "submitting"
    assert outcomes(conn, request(shop, reference="order-1")) == ["reference-taken"]
    canceled = command(conn, "cancel_payment", shop, payment_id=payment_id)
    assert (canceled["status"], canceled["body"]["state"]) == (200, "canceled")
    assert path_of(conn, payment_id) == ["initiated", "submitting", "canceled"]
    assert outcomes(conn, request(shop, reference="order-1")) == [201]
    assert not violations(conn)


def test_send_that_is_under_way_keeps_a_payment_from_being_canceled_at_once(conn: Connection, shop: bytes) -> None:
    [payment_id] = pay(conn, shop)
    Send(conn).record(REFUSED)
    under_way = Send(conn)
    assert command(conn, "cancel_payment", shop, payment_id=payment_id)["status"] == 202
    under_way.record(REFUSED)
    assert state_of(conn, payment_id) == "submitting"
    conn.execute("select surety.end_refused_payments('worker:w')")
    assert state_of(conn, payment_id) == "canceled"


def test_earlier_send_of_unknown_outcome_is_asked_before_a_payment_ends(conn: Connection, shop: bytes) -> None:
    [payment_id] = pay(conn, shop)
    Send(conn).record(UNKNOWN)
    cut_off(conn)
    Send(conn).record(REFUSED)
    assert command(conn, "cancel_payment", shop, payment_id=payment_id)["status"] == 202
    pass_time(conn, days=30)
    assert conn.execute("select surety.end_refused_payments('worker:w')").fetchall() == [([],)]
    assert state_of(conn, payment_id) == "submitting"
    connect(conn)
    assert Send(conn).verdict == "find"


def test_refusal_that_is_recorded_twice_or_late_proves_nothing_about_another_send(
    conn: Connection, shop: bytes
) -> None:
    [payment_id] = pay(conn, shop)
    first = Send(conn)
    first.begin()
    second = first.number
    assert second == 2, "the first send's outcome is never recorded"
    for _ in range(3):
        first.record(REFUSED)
    assert conn.execute("select sends, refused_through from surety.calls").fetchall() == [(2, 0)]
    first.number = 1
    first.record(REFUSED)
    first.record(REFUSED)
    assert conn.execute("select sends, refused_through from surety.calls").fetchall() == [(2, 1)]
    assert command(conn, "cancel_payment", shop, payment_id=payment_id)["status"] == 202


def test_payment_of_a_refused_account_fails_after_a_day(conn: Connection, shop: bytes) -> None:
    [sent] = pay(conn, shop, reference="sent")
    Send(conn).record(REFUSED)
    [unsent] = pay(conn, shop, reference="unsent")
    [others] = pay(conn, add_merchant(conn)[1])
    end = "select surety.end_refused_payments('worker:w')"
    pass_time(conn, days=2)
    cut_off(conn)
    pass_time(conn, hours=23, minutes=59)
    assert conn.execute(end).fetchall() == [([],)], "the account has been refused for less than a day"
    late = conn.execute("select surety.time_now()").fetchone()
    pass_time(conn, minutes=2)
    assert late and conn.execute(end).fetchall() == [(["payment.failed"],)]
    assert (state_of(conn, sent), state_of(conn, unsent), state_of(conn, others)) == ("failed", "failed", "initiated")
    assert path_of(conn, unsent) == ["initiated", "failed"]
    [(code, reason)] = conn.execute(
        "select p.failure ->> 'code', e.reason from surety.payments as p join audit.entries as e"
        " on e.payment_id = p.id and e.outcome = 'payment ended' where p.id = %s",
        (sent,),
    ).fetchall()
    assert code == "provider_account_refused" and reason.endswith("Stripe 403")
    assert conn.execute("select count(*) from surety.payment_references").fetchone() == (0,)
    assert conn.execute(end).fetchall() == [([],)] and not violations(conn)


def test_young_payment_of_an_account_refused_for_long_waits_for_its_own_day(conn: Connection, shop: bytes) -> None:
    cut_off(conn)
    [payment_id] = pay(conn, shop)
    conn.execute("update surety.circuit_breakers set opened_at = surety.time_now() - interval '10 days'")
    assert conn.execute("select surety.end_refused_payments('worker:w')").fetchall() == [([],)]
    assert state_of(conn, payment_id) == "initiated"


def test_event_of_a_payment_that_has_ended_is_not_held(conn: Connection, shop: bytes) -> None:
    ended, waiting = pay(conn, shop, 2)
    cut_off(conn)
    assert command(conn, "cancel_payment", shop, payment_id=ended)["status"] == 200
    query = "select surety.hold_blocked_events(batch_id, fence, event_ids), event_ids"
    [(held, claimed)] = conn.execute(f"{query} from outbox.claim_batch('submit', 'w')".encode()).fetchall()
    about: dict[str, str] = dict(
        conn.execute("select id, aggregate_id from outbox.events where id = any(%s)", (claimed,)).fetchall()
    )
    assert set(about.values()) == {ended, waiting}
    assert [about[event_id] for event_id in held] == [waiting]
