"""Money limits: how many payments, and how much, a merchant accepts in a UTC day; exact under concurrency."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.conftest import Connect
from tests.db.test_create_payments import until_waiting
from tests.support.payments import Connection, add_merchant, create, pay, request, violations

LIMIT_QUERY = "select surety.set_money_limit(%s, %s, %s, %s, 'test')"


@pytest.fixture
def merchant(conn: Connection) -> tuple[str, bytes]:
    return add_merchant(conn)


def limit(conn: Connection, merchant_id: str, currency: str = "usd", *, count: int | None = None,
          amount: int | None = None) -> Any:  # fmt: skip
    """Set a merchant's limit."""
    row = conn.execute(LIMIT_QUERY, (merchant_id, currency, count, amount)).fetchone()
    assert row is not None
    return row[0]


def problems(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["problem"] for row in rows]


def counters(conn: Connection) -> list[tuple[int, int]]:
    return conn.execute("select payments, amount_minor::integer from surety.accepted_money order by day").fetchall()


def move_clock(conn: Connection, to: str) -> None:
    """Move the database's clock to a time of its next day, by UTC: `23:59:59`."""
    conn.execute("update surety.environment set kind = 'test'")
    conn.execute(
        "insert into surety.clock (ahead) values (date_trunc('day', now(), 'UTC') + interval '1 day' + %s - now())"
        " on conflict (kind) do update set ahead = excluded.ahead",
        (to,),
    )


def test_payments_beyond_the_count_are_refused_in_the_order_of_their_requests(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=3)
    rows = create(conn, [request(key, idempotency_key=f"k{9 - n}") for n in range(5)])
    assert problems(rows) == [None, None, None, "limit-exceeded", "limit-exceeded"]
    detail = rows[3]["detail"]
    day = conn.execute("select (surety.time_now() at time zone 'UTC')::date").fetchone()
    assert day is not None
    assert detail == {
        "exceeded": "count", "maximum": 3, "remaining": 0, "currency": "usd", "day": str(day[0]),
        "resets_at": detail["resets_at"],
    }  # fmt: skip
    assert detail["resets_at"].endswith("T00:00:00.000Z")
    assert counters(conn) == [(3, 30000)]
    assert not violations(conn)


def test_a_payment_that_does_not_fit_is_refused_and_a_smaller_one_after_it_is_accepted(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, amount=1000)
    rows = create(conn, [request(key, amount=amount) for amount in (700, 301, 300, 50)])
    assert problems(rows) == [None, "limit-exceeded", None, "limit-exceeded"]
    assert (rows[1]["detail"]["exceeded"], rows[1]["detail"]["remaining"]) == ("amount", 300)
    assert counters(conn) == [(2, 1000)]


def test_a_refused_request_leaves_nothing_so_that_it_is_accepted_the_next_day(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=1)
    move_clock(conn, "-0:00:10")
    pay(conn, key)
    asked = request(key, idempotency_key="again", reference="order-1", customer={"email": "a@example.com"})
    assert problems(create(conn, [asked, asked])) == ["limit-exceeded", "limit-exceeded"]
    for table in ("surety.idempotency_keys", "surety.payments", "surety.steps", "outbox.events"):
        assert conn.execute(f"select count(*) from {table}".encode()).fetchone() == (1,), table
    for table in ("surety.payment_references", "surety.payment_labels"):
        assert conn.execute(f"select count(*) from {table}".encode()).fetchone() == (0,), table
    move_clock(conn, "0:00:10")
    [row] = create(conn, [asked])
    assert (row["status"], row["is_replayed"]) == (201, False)
    assert counters(conn) == [(1, 10000), (1, 10000)]
    assert not violations(conn)


def test_a_repetition_counts_once_and_other_refusals_count_nothing(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=2)
    asked = request(key, reference="order-1")
    create(conn, [asked])
    rows = create(conn, [asked, request(key, reference="order-1"), request(key, amount=1)])
    assert problems(rows) == [None, "reference-taken", "invalid-request"]
    assert counters(conn) == [(1, 10000)]
    assert problems(create(conn, [request(key), asked])) == [None, None], "a repetition is no new payment"


def test_a_limit_bounds_its_merchant_and_currency_alone(conn: Connection, merchant: tuple[str, bytes]) -> None:
    merchant_id, key = merchant
    _, other_key = add_merchant(conn)
    limit(conn, merchant_id, "usd", count=0)
    limit(conn, merchant_id, "eur", count=1)
    rows = create(
        conn, [request(key), request(key, currency="eur"), request(key, currency="gbp"), request(other_key)] * 1
    )
    assert problems(rows) == ["limit-exceeded", None, None, None]
    assert problems(create(conn, [request(key, currency="eur")])) == ["limit-exceeded"]


def test_a_limit_that_is_set_during_the_day_counts_what_was_accepted_before(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    pay(conn, key, 3)
    assert limit(conn, merchant_id, count=4) is True
    assert limit(conn, merchant_id, count=4) is False
    assert problems(create(conn, [request(key), request(key)])) == [None, "limit-exceeded"]
    assert limit(conn, merchant_id) is True, "removed"
    pay(conn, key, 2)
    limit(conn, merchant_id, count=7)
    assert problems(create(conn, [request(key), request(key)])) == [None, "limit-exceeded"]
    listed = conn.execute("select payments, count_max from surety.list_money_limits(null)").fetchall()
    assert listed == [(7, 7)]
    assert limit(conn, "mer_" + "0" * 24, count=1) is None
    assert not violations(conn)


def test_a_canceled_payment_counts(conn: Connection, merchant: tuple[str, bytes]) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=1)
    [payment_id] = pay(conn, key)
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'command', now(), 'test')",
        (payment_id,),
    )
    assert problems(create(conn, [request(key)])) == ["limit-exceeded"]
    assert not violations(conn)


# -------------------------------------------------------------------------------------------------------------- races


def test_concurrent_transactions_never_accept_more_than_the_limit(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=57, amount=57 * 10000)
    connections = [connect("api") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            batches = [[request(key) for _ in range(5)] for _ in connections]
            list(pool.map(create, connections, batches))
    assert conn.execute("select count(*) from surety.payments").fetchone() == (57,)
    assert not violations(conn)


def test_second_transaction_waits_for_the_first_and_takes_what_is_left(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=3)
    first, second = connect("api"), connect("api")
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            create(first, [request(key), request(key)])
            waiting = pool.submit(create, second, [request(key), request(key)])
            until_waiting(conn, second)
        assert problems(waiting.result()) == [None, "limit-exceeded"]


def test_payments_of_two_days_at_midnight_count_for_their_own_days(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    limit(conn, merchant_id, count=2)
    move_clock(conn, "-0:00:05")
    first, second = connect("api"), connect("api")
    pay(conn, key)
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            create(first, [request(key)])
            # It began before midnight, and is judged after it.
            waiting = pool.submit(create, second, [request(key)])
            until_waiting(conn, second)
            move_clock(conn, "0:00:05")
        assert problems(waiting.result()) == ["limit-exceeded"]
    assert problems(create(conn, [request(key) for _ in range(3)])) == [None, None, "limit-exceeded"]
    assert not violations(conn)


def test_a_new_limit_waits_for_payments_that_have_not_seen_it(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    first, operator = connect("api"), connect("deploy")
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            create(first, [request(key)])
            waiting = pool.submit(limit, operator, merchant_id, count=2)
            until_waiting(conn, operator)
        assert waiting.result() is True
    assert problems(create(conn, [request(key), request(key)])) == [None, "limit-exceeded"]
    assert not violations(conn)


def test_payments_that_meet_a_new_limit_unseen_are_judged_again(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    first, operator = connect("api"), connect("deploy")
    asked = [request(key), request(key)]
    with ThreadPoolExecutor(1) as pool:
        with operator.transaction():
            limit(operator, merchant_id, count=1)
            waiting = pool.submit(create, first, asked)
            until_waiting(conn, first)
        with pytest.raises(psycopg.errors.SerializationFailure):
            waiting.result()
    assert problems(create(first, asked)) == [None, "limit-exceeded"]
    assert not violations(conn)


def test_batches_of_several_limited_merchants_in_opposite_order_do_not_deadlock(
    conn: Connection, connect: Connect
) -> None:
    merchants = [add_merchant(conn) for _ in range(4)]
    for merchant_id, _ in merchants:
        limit(conn, merchant_id, count=1000)
    connections = [connect("api") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            orders = [merchants, merchants[::-1], merchants[1:] + merchants[:1], merchants[2:] + merchants[:2]]
            batches = [[request(key) for _, key in itertools.chain(order, order)] for order in orders]
            answers = list(pool.map(create, connections, batches))
            assert {row["status"] for rows in answers for row in rows} == {201}
    assert not violations(conn)


def test_two_at_once_who_set_one_part_each_set_both(conn: Connection, connect: Connect) -> None:
    merchant_id, _ = add_merchant(conn)
    one, other = connect("deploy"), connect("deploy")
    for first, second in (((5, None), (None, 700)), ((None, 800), (6, None))):
        with ThreadPoolExecutor(1) as pool:
            with one.transaction():
                one.execute(LIMIT_QUERY, (merchant_id, "usd", *first))
                waiting = pool.submit(limit, other, merchant_id, count=second[0], amount=second[1])
                until_waiting(conn, other)
            assert waiting.result(60) is True
        bounds = conn.execute("select count_max, amount_max_minor from surety.money_limits").fetchall()
        assert bounds == [(first[0] or second[0], first[1] or second[1])]
