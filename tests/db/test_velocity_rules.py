"""Velocity rules: many payments of one payer within a period are refused, or accepted and put on hold."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import Connect
from tests.db.test_create_payments import until_waiting
from tests.db.test_money_limits import limit, move_clock, problems
from tests.support.payments import Connection, add_merchant, command, create, request, violations


@pytest.fixture
def merchant(conn: Connection) -> tuple[str, bytes]:
    return add_merchant(conn)


def add_rule(
    conn: Connection,
    action: str = "refuse",
    *,
    merchant_id: str | None = None,
    per: str = "1 hour",
    count: int | None = None,
    amount: int | None = None,
    currency: str | None = None,
    subject: str = "email",
) -> str:
    """A new rule's id."""
    row = conn.execute(
        "select surety.add_velocity_rule(%s, %s, %s, %s, %s, %s, %s, 'test')",
        (merchant_id, subject, per, count, amount, currency, action),
    ).fetchone()
    assert row is not None
    return str(row[0])


def of(payer: str | None, key: bytes, **fields: Any) -> dict[str, Any]:
    """A request of one payer."""
    return request(key, customer={"email": payer} if payer else None, **fields)


def test_payments_of_one_address_beyond_the_count_are_refused(conn: Connection, merchant: tuple[str, bytes]) -> None:
    merchant_id, key = merchant
    rule = add_rule(conn, merchant_id=merchant_id, count=2)
    payers = ("zoë@example.com", "ZOË@Example.com", "Zoe\u0308@example.com", "bob@example.com")
    asked = [of(payer, key) for payer in payers]
    rows = create(conn, [*asked, of(None, key), of(None, key), of(None, key)])
    assert problems(rows) == [None, None, "velocity-exceeded", None, None, None, None]
    assert rows[2]["detail"] == {
        "rule": rule, "subject": "email", "exceeded": "count", "maximum": 2, "period_seconds": 3600, "currency": None,
    }  # fmt: skip
    assert problems(create(conn, [of("ZOË@example.com", key)])) == ["velocity-exceeded"]
    assert conn.execute("select count(*) from surety.idempotency_keys").fetchone() == (6,)


def test_a_rule_counts_the_payments_before_it_and_forgets_those_before_its_period(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    _, key = merchant
    move_clock(conn, "10:00:00")
    create(conn, [of("ada@example.com", key)])
    add_rule(conn, count=1, per="30 minutes")
    asked = of("ada@example.com", key)
    move_clock(conn, "10:29:50")
    assert problems(create(conn, [asked])) == ["velocity-exceeded"]
    move_clock(conn, "10:30:10")
    assert problems(create(conn, [asked, of("ada@example.com", key)])) == [None, "velocity-exceeded"]


def test_an_amount_is_bounded_in_its_currency_alone(conn: Connection, merchant: tuple[str, bytes]) -> None:
    _, key = merchant
    add_rule(conn, amount=1000, currency="usd")
    rows = create(
        conn,
        [of("ada@example.com", key, amount=amount, currency=currency)
         for amount, currency in ((700, "usd"), (5000, "eur"), (301, "usd"), (300, "usd"))],
    )  # fmt: skip
    assert problems(rows) == [None, None, "velocity-exceeded", None]
    assert rows[2]["detail"]["exceeded"] == "amount"


def test_a_rule_for_each_merchant_counts_their_payments_apart(conn: Connection, merchant: tuple[str, bytes]) -> None:
    _, key = merchant
    _, other = add_merchant(conn)
    rule = add_rule(conn, count=1)
    assert problems(create(conn, [of("ada@example.com", key), of("ada@example.com", other)])) == [None, None]
    assert problems(create(conn, [of("ada@example.com", other)])) == ["velocity-exceeded"]
    for expected in (True, False):
        assert conn.execute("select surety.remove_velocity_rule(%s)", (rule,)).fetchone() == (expected,)
    assert problems(create(conn, [of("ada@example.com", other)])) == [None]


def test_a_payment_beyond_a_holding_rule_is_accepted_and_held(conn: Connection, merchant: tuple[str, bytes]) -> None:
    merchant_id, key = merchant
    rule = add_rule(conn, "hold", count=1)
    limit(conn, merchant_id, count=2)
    asked = [of("ada@example.com", key) for _ in range(3)]
    rows = create(conn, asked)
    assert problems(rows) == [None, None, "limit-exceeded"], "a payment on hold counts"
    first, second = (json.loads(row["body"]) for row in rows[:2])
    assert first["hold"] is None
    assert (second["status"], second["state"], second["hold"]["status"]) == ("pending", "initiated", "open")
    held = conn.execute("select payment_id, rule_id from surety.payment_holds").fetchall()
    assert held == [(second["id"], rule)]
    events = conn.execute("select type from outbox.events where aggregate_id = %s", (second["id"],)).fetchall()
    assert sorted(events) == [("payment.held",), ("payment.initiated",)]
    [again] = create(conn, [asked[1]])
    assert (again["is_replayed"], again["body"]) == (True, rows[1]["body"])
    assert not violations(conn)


def test_refusing_comes_before_holding(conn: Connection, merchant: tuple[str, bytes]) -> None:
    _, key = merchant
    add_rule(conn, "hold", count=1)
    add_rule(conn, "refuse", count=2)
    rows = create(conn, [of("ada@example.com", key) for _ in range(3)])
    assert problems(rows) == [None, None, "velocity-exceeded"]
    assert [json.loads(row["body"])["hold"] is None for row in rows[:2]] == [True, False]


def test_second_transaction_waits_for_the_first_of_the_same_payer(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    _, key = merchant
    add_rule(conn, count=1)
    first, second = connect("api"), connect("api")
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            create(first, [of("ada@example.com", key)])
            assert problems(create(second, [of("bob@example.com", key)])) == [None], "another payer waits for nothing"
            waiting = pool.submit(create, second, [of("ada@example.com", key)])
            until_waiting(conn, second)
        assert problems(waiting.result()) == ["velocity-exceeded"]


def save_card(conn: Connection, merchant_id: str, key: bytes, fingerprint: str) -> str:
    """A saved payment method of a new customer, saved by a payment of it."""
    customer = command(conn, "create_customer", key)["body"]["id"]
    [saving] = create(conn, [request(key, customer_id=customer)])
    [(method,)] = conn.execute(
        "insert into surety.payment_methods (id, customer_id, merchant_id, type, fingerprint, provider_id, usage,"
        " mandate, payment_id, created_at) select surety.new_id('spm', surety.time_now()), %s, %s, 'card', %s, 'pm_1',"
        " 'off_session', '{}', %s, now() returning id",
        (customer, merchant_id, fingerprint, saving["payment_id"]),
    ).fetchall()
    return str(method)


def by(method: str, key: bytes, **fields: Any) -> dict[str, Any]:
    """A request by a saved payment method."""
    return request(key, saved_method=method, method_token=None, off_session=True, return_url=None, **fields)


def test_payments_of_one_card_are_counted_whichever_customer_saved_it(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    other_id, other_key = add_merchant(conn)
    first, again, different = (save_card(conn, merchant_id, key, card) for card in ("card_1", "card_1", "card_2"))
    elsewhere = save_card(conn, other_id, other_key, "card_1")
    rule = add_rule(conn, count=4, subject="card")
    # Two payments saved the card.
    rows = create(conn, [by(first, key), by(again, key), by(different, key), by(first, key), request(key)])
    assert problems(rows) == [None, None, None, "velocity-exceeded", None], "a new token is not judged"
    assert (rows[3]["detail"]["rule"], rows[3]["detail"]["subject"]) == (rule, "card")
    assert problems(create(conn, [by(again, key), by(elsewhere, other_key)])) == ["velocity-exceeded", None]
    conn.execute("update surety.payment_methods set detached_at = now() where id = %s", (first,))
    assert problems(create(conn, [by(again, key)])) == ["velocity-exceeded"], "a removed method counts"
    conn.execute("update surety.payment_methods set fingerprint = null where id = %s", (first,))
    assert problems(create(conn, [by(again, key)])) == [None], "an erased card is unknown"


def test_amount_of_one_card_is_bounded_in_its_currency_and_period(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    move_clock(conn, "10:00:00")
    method = save_card(conn, merchant_id, key, "card_1")
    add_rule(conn, "hold", amount=1000, currency="usd", subject="card", per="30 minutes")
    move_clock(conn, "10:30:10")
    asked = [by(method, key, amount=amount, currency=currency) for amount, currency in ((700, "usd"), (5000, "eur"))]
    assert [json.loads(row["body"])["hold"] for row in create(conn, asked)] == [None, None]
    [held] = create(conn, [by(method, key, amount=301)])
    assert json.loads(held["body"])["hold"]["status"] == "open"


def test_second_transaction_waits_for_the_first_of_the_same_card(
    conn: Connection, connect: Connect, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    first_method, second_method = (save_card(conn, merchant_id, key, "card_1") for _ in range(2))
    add_rule(conn, count=3, subject="card")
    first, second = connect("api"), connect("api")
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            create(first, [by(first_method, key)])
            waiting = pool.submit(create, second, [by(second_method, key)])
            until_waiting(conn, second)
        assert problems(waiting.result()) == ["velocity-exceeded"]


def test_payments_of_one_stored_customer_are_counted(conn: Connection, merchant: tuple[str, bytes]) -> None:
    _, key = merchant
    add_rule(conn, count=1, subject="customer")
    ids = [command(conn, "create_customer", key)["body"]["id"] for _ in range(2)]
    rows = create(conn, [request(key, customer_id=customer) for customer in (ids[0], ids[0], ids[1], None, None)])
    assert problems(rows) == [None, "velocity-exceeded", None, None, None]
    assert problems(create(conn, [request(key, customer_id=ids[1])])) == ["velocity-exceeded"]
