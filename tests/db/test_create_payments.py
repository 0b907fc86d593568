"""Requests in SQL: a batch's outcomes, keys and references under races, amounts, operators' doings."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import errors

from app.sandbox.stripe.objects.currencies import MAXIMUM_MINOR, MINIMUM_MINOR, STEP_MINOR
from tests.conftest import Connect
from tests.support.payments import Connection, add_merchant, create, pay, request


@pytest.fixture
def merchant(conn: Connection) -> tuple[str, bytes]:
    return add_merchant(conn)


@pytest.fixture
def key(merchant: tuple[str, bytes]) -> bytes:
    return merchant[1]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def outcome(row: dict[str, Any]) -> tuple[int, str | None]:
    return row["status"], row["problem"]


def one(conn: Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def operations(conn: Connection) -> list[tuple[str, str]]:
    """Who did what, by the audit trail."""
    rows = conn.execute("select actor, outcome from audit.entries where kind = 'operator' order by at, id").fetchall()
    return [(actor, done) for actor, done in rows]


# ------------------------------------------------------------------------------------------------------------ batches


def test_outcomes_carry_the_numbers_of_their_requests(conn: Connection, key: bytes) -> None:
    asked = [request(key, idempotency_key=f"k{99 - n}", amount=100 + n) | {"n": n} for n in range(20)]
    rows = create(conn, asked)
    assert [row["n"] for row in rows] == list(range(20))
    amounts: dict[str, int] = dict(conn.execute("select id, amount_minor from surety.payments").fetchall())
    assert [amounts[row["payment_id"]] for row in rows] == [100 + n for n in range(20)]


def test_one_batch_serves_many_merchants_and_unknown_keys(conn: Connection, key: bytes) -> None:
    other, other_key = add_merchant(conn)
    suspended, suspended_key = add_merchant(conn)
    conn.execute("select surety.suspend_merchant(%s, true)", (suspended,))
    rows = create(
        conn,
        [
            request(other_key),
            request(b"\0" * 32),
            request(key, amount=1),
            request(suspended_key),
            request(key),
            request(key, currency="xyz"),
        ],
    )
    assert sorted(map(outcome, rows), key=str) == sorted(
        [
            (201, None),
            (None, "unauthenticated"),
            (None, "invalid-request"),
            (None, "merchant-suspended"),
            (201, None),
            (None, "invalid-request"),
        ],
        key=str,
    )
    assert one(conn, "select count(*) from surety.payments where merchant_id = %s", other) == 1
    assert one(conn, "select count(*) from surety.idempotency_keys") == 2


def test_two_requests_with_one_key_in_a_batch_make_one_payment(conn: Connection, key: bytes) -> None:
    rows = create(conn, [request(key, idempotency_key="k") for _ in range(3)])
    assert [row["is_replayed"] for row in rows] == [False, True, True]
    assert len({row["body"] for row in rows}) == 1
    assert one(conn, "select count(*) from surety.payments") == 1


def test_second_of_two_requests_with_one_key_and_different_bodies_is_refused(conn: Connection, key: bytes) -> None:
    rows = create(conn, [request(key, idempotency_key="k"), request(key, idempotency_key="k", request_hash="01")])
    assert [outcome(row) for row in rows] == [(201, None), (None, "idempotency-key-reused")]
    assert rows[1]["body"] is None


def test_invalid_request_does_not_use_up_its_key(conn: Connection, key: bytes) -> None:
    refused = request(key, idempotency_key="k", amount=1, request_hash="01")
    rows = create(conn, [refused, request(key, idempotency_key="k")])
    assert [outcome(row) for row in rows] == [(None, "invalid-request"), (201, None)]


def test_two_requests_of_a_batch_with_one_reference_make_one_payment(conn: Connection, key: bytes) -> None:
    rows = create(conn, [request(key, reference="order-1"), request(key, reference="order-1")])
    assert sorted(str(row["problem"]) for row in rows) == ["None", "reference-taken"]
    [made] = [row["payment_id"] for row in rows if row["status"] == 201]
    [refused] = [row for row in rows if row["problem"] == "reference-taken"]
    assert refused["detail"] == {"payment_id": made}
    assert one(conn, "select count(*) from surety.idempotency_keys") == 1


def test_a_repeated_request_is_answered_although_its_reference_is_in_use_by_itself(
    conn: Connection, key: bytes
) -> None:
    asked = request(key, reference="order-1")
    first, again = create(conn, [asked]), create(conn, [asked])
    assert again[0]["body"] == first[0]["body"]
    assert again[0]["is_replayed"]


def test_batch_of_only_repetitions_writes_nothing(conn: Connection, key: bytes) -> None:
    asked = [request(key) for _ in range(5)]
    create(conn, asked)
    before = one(conn, "select count(*) from audit.entries")
    assert all(row["is_replayed"] for row in create(conn, asked))
    assert one(conn, "select count(*) from audit.entries") == before


def test_accepted_payment_writes_outbox_and_audit_entries_in_its_transaction(
    conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    [payment_id] = pay(conn, key)
    found = conn.execute("select kind, xid from audit.entries where payment_id = %s order by kind", (payment_id,))
    queued = conn.execute("select type, xid from outbox.events where merchant_id = %s", (merchant_id,))
    [(kind, xid)] = found.fetchall()
    [(event_type, event_xid)] = queued.fetchall()
    assert (kind, event_type) == ("step", "payment.initiated")
    assert xid == event_xid


# -------------------------------------------------------------------------------------------------------------- races


def test_two_connections_with_keys_and_references_in_opposite_order_never_deadlock(
    connect: Connect, key: bytes, conn: Connection, pool: ThreadPoolExecutor
) -> None:
    connections = [connect("api") for _ in range(4)]
    for turn in range(10):
        asked = [request(key, idempotency_key=f"{turn}-{n:02}", reference=f"{turn}-{40 - n:02}") for n in range(40)]
        batches = [asked, asked[::-1], asked[::2] + asked[1::2], asked[::-3]]
        answers = list(pool.map(create, connections, batches))
        assert {row["status"] for rows in answers for row in rows} == {201}
    assert one(conn, "select count(*) from surety.payments") == 400


def test_second_transaction_with_a_key_waits_and_repeats_the_first(
    conn: Connection, connect: Connect, key: bytes, pool: ThreadPoolExecutor
) -> None:
    first, second = connect("api"), connect("api")
    asked = request(key, idempotency_key="k")
    with first.transaction():
        made = create(first, [asked])
        waiting = pool.submit(create, second, [asked])
        until_waiting(conn, second)
    assert waiting.result()[0]["body"] == made[0]["body"]
    assert waiting.result()[0]["is_replayed"]


def test_second_transaction_with_a_key_continues_when_the_first_fails(
    conn: Connection, connect: Connect, key: bytes, pool: ThreadPoolExecutor
) -> None:
    first, second = connect("api"), connect("api")
    asked = request(key, idempotency_key="k")
    with first.transaction(force_rollback=True):
        made = create(first, [asked])
        waiting = pool.submit(create, second, [asked])
        until_waiting(conn, second)
    [row] = waiting.result()
    assert outcome(row) == (201, None)
    assert not row["is_replayed"]
    assert row["payment_id"] != made[0]["payment_id"]


def test_key_freed_by_a_reference_conflict_serves_the_waiting_request(
    conn: Connection, connect: Connect, key: bytes, pool: ThreadPoolExecutor
) -> None:
    pay(conn, key, reference="order-1")
    first, second = connect("api"), connect("api")
    with first.transaction():
        [refused] = create(first, [request(key, idempotency_key="k", reference="order-1")])
        assert refused["problem"] == "reference-taken"
        waiting = pool.submit(create, second, [request(key, idempotency_key="k", reference="order-2")])
        until_waiting(conn, second)
    assert outcome(waiting.result()[0]) == (201, None)


def until_waiting(conn: Connection, other: psycopg.Connection[Any]) -> None:
    """Return when the other connection waits for a lock."""
    while one(conn, "select count(*) from pg_locks where pid = %s and not granted", other.info.backend_pid) == 0:
        pass


# ------------------------------------------------------------------------------------------------------------ amounts


def test_each_currency_has_a_smallest_and_a_largest_amount(conn: Connection, key: bytes) -> None:
    query = "select currency, minimum_minor, maximum_minor, step_minor from surety.currencies"
    rows = conn.execute(query).fetchall()
    assert len(rows) >= 18
    for currency, minimum, maximum, step in rows:
        assert step == STEP_MINOR.get(currency, 1)
        assert minimum >= MINIMUM_MINOR[currency] and maximum <= MAXIMUM_MINOR, "the provider accepts it"
        amounts = (minimum - 1, minimum, maximum, maximum + 1)
        asked = [request(key, currency=currency, amount=amount) | {"n": n} for n, amount in enumerate(amounts)]
        low, least, most, high = create(conn, asked)
        assert (least["status"], most["status"]) == (201, 201)
        assert low["detail"] == {
            "field": "/amount",
            "rule": "minimum",
            "limit": minimum,
            "given": minimum - 1,
            "currency": currency,
        }
        assert high["detail"]["rule"] == "maximum"
    assert one(conn, "select api.check_amount_bounds(100, 'usd')") is None
    assert one(conn, "select api.check_amount_bounds(100, 'xyz')") == {
        "field": "/currency",
        "rule": "known",
        "given": "xyz",
    }


@pytest.mark.parametrize("amount", [1234, 35205])
def test_three_decimal_amount_that_does_not_end_in_zero_is_refused(conn: Connection, key: bytes, amount: int) -> None:
    refused, accepted = create(
        conn,
        [
            request(key, currency="kwd", amount=amount) | {"n": 0},
            request(key, currency="kwd", amount=amount - amount % 10) | {"n": 1},
        ],
    )
    detail = {"field": "/amount", "rule": "multiple", "limit": 10, "given": amount, "currency": "kwd"}
    assert (refused["problem"], refused["detail"]) == ("invalid-request", detail)
    assert accepted["status"] == 201
    assert one(conn, "select api.check_amount_bounds(%s, 'kwd')", amount) == detail


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("step_minor = 1 where currency = 'kwd'", "three_decimal_amounts_end_in_zero"),
        ("minimum_minor = 205 where currency = 'kwd'", "currency_bounds_are_multiples_of_the_step"),
        ("step_minor = 3 where currency = 'czk'", "currency_step_is_a_power_of_ten"),
        ("fee_fixed_minor = 50 where currency = 'jpy'", "currency_fee_is_below_the_smallest_amount"),
        ("fee_fixed_minor = -1 where currency = 'jpy'", "currency_fee_is_below_the_smallest_amount"),
    ],
)
def test_currency_that_breaks_the_rules_is_refused(conn: Connection, change: str, constraint: str) -> None:
    with pytest.raises(errors.CheckViolation) as refused:
        conn.execute(f"update surety.currencies set {change}".encode())
    assert refused.value.diag.constraint_name == constraint


# ---------------------------------------------------------------------------------------------------------- operators


def test_operator_actions_are_audited_with_the_operator_name(conn: Connection) -> None:
    merchant_id = one(conn, "select surety.add_merchant('Acme Books', '', 'ada')")
    assert one(conn, "select surety.suspend_merchant(%s, true, 'ada')", merchant_id) is True
    assert one(conn, "select surety.suspend_merchant(%s, true, 'ada')", merchant_id) is False
    assert one(conn, "select surety.suspend_merchant(%s, false, 'bob')", merchant_id) is True
    key_id = one(conn, "select surety.add_api_key(%s, %s, 'xyz9', 'bob')", merchant_id, b"\1" * 32)
    assert one(conn, "select surety.revoke_api_key(%s, 'eve')", key_id) is True
    assert one(conn, "select surety.revoke_api_key(%s, 'eve')", key_id) is False
    assert operations(conn) == [
        ("operator:ada", "merchant added"),
        ("operator:ada", "merchant suspended"),
        ("operator:bob", "merchant resumed"),
        ("operator:bob", "key created"),
        ("operator:eve", "key revoked"),
    ]


def test_unknown_object_cannot_be_changed(conn: Connection) -> None:
    assert one(conn, "select surety.suspend_merchant('mer_none', true)") is None
    assert one(conn, "select surety.revoke_api_key('key_none')") is None
    with pytest.raises(errors.ForeignKeyViolation):
        conn.execute("select surety.add_api_key('mer_none', %s, 'xyz9')", (b"\1" * 32,))
    assert operations(conn) == []


def test_only_existing_keys_leave_a_denial(conn: Connection, key: bytes) -> None:
    for key_hash in (key, b"\0" * 32):
        conn.execute("select api.audit_denial(%s, 'req_1', '127.0.0.1', 'GET /', 'not-found')", (key_hash,))
    assert one(conn, "select count(*) from audit.entries where kind = 'denied'") == 1
    assert conn.execute("select reason, actor ~ '^key:', count from audit.refusals").fetchall() == [
        ("not-found", True, 1)
    ]


def test_denials_are_all_counted_and_the_first_hundred_of_an_hour_are_audited(conn: Connection, key: bytes) -> None:
    denial = (
        "select api.audit_denial(%s, 'req_' || n, '127.0.0.1', 'GET /', 'not-found') from generate_series(1, 250) n"
    )
    conn.execute(denial.encode(), (key,))
    assert one(conn, "select sum(count) from audit.refusals") == 250
    # Two hours, if the hour turned between.
    assert one(conn, "select count(*) from audit.entries where kind = 'denied'") in {100, 200}


def test_counts_of_refusals_are_deleted_after_thirty_days(conn: Connection) -> None:
    conn.execute("select surety.count_refusals('denied', '{\"unauthenticated\": 7, \"not-found\": 2}')")
    assert conn.execute("select reason, is_known_key, day_count from surety.list_refusals()").fetchall() == [
        ("not-found", False, 2),
        ("unauthenticated", False, 7),
    ]
    assert one(conn, "select surety.delete_old_refusals()") == 0
    conn.execute("update audit.refusals set hour = hour - interval '30 days 2 hours' where reason = 'not-found'")
    assert one(conn, "select surety.delete_old_refusals()") == 1
    with pytest.raises(errors.CheckViolation):
        conn.execute("select surety.count_refusals('denied', '{\"a reason of the sender\": 1}')")


def test_idempotency_keys_are_deleted_after_thirty_days(conn: Connection, key: bytes) -> None:
    asked = request(key)
    create(conn, [asked, request(key)])
    conn.execute(
        "update surety.idempotency_keys set created_at = created_at - interval '31 days' where key = %s",
        (asked["idempotency_key"],),
    )
    assert one(conn, "select surety.delete_expired_idempotency_keys()") == 1
    assert one(conn, "select count(*) from surety.idempotency_keys") == 1
    assert not create(conn, [asked])[0]["is_replayed"]


# ------------------------------------------------------------------------------------------------------------- events


def test_a_reader_of_events_goes_on_into_a_new_restore_generation(conn: Connection, key: bytes) -> None:
    def read(after: str | None) -> dict[str, Any]:
        document: dict[str, Any] = one(conn, "select body::json from api.list_events(%s, %s, 2)", key, after)
        return document

    before = pay(conn, key, 5)
    page = read(None)
    seen = [event["data"]["id"] for event in page["data"]]
    conn.execute("update outbox.restore_generations set system_identifier = 1")
    conn.execute("select outbox.begin_restore_generation('test')")
    after = pay(conn, key, 3)
    while page["has_more"]:
        page = read(page["next"])
        seen += [event["data"]["id"] for event in page["data"]]
    assert sorted(seen) == sorted(before + after)
    assert len(seen) == 8


def test_concurrent_use_of_a_key_with_different_bodies_is_a_reuse(conn: Connection, key: bytes) -> None:
    pay(conn, key, reference="order-1")
    both = [
        request(key, idempotency_key="one", reference="order-1"),
        request(key, idempotency_key="one", reference="order-1"),
        request(key, idempotency_key="one", reference="order-2", request_hash="01"),
    ]
    answers = [(answer["status"], answer["problem"], answer["detail"] is None) for answer in create(conn, both)]
    assert answers == [
        (None, "reference-taken", False),
        (None, "reference-taken", False),
        (None, "idempotency-key-reused", True),
    ]
    assert create(conn, both[2:])[0]["status"] == 201, "nothing took effect, so the key is free"
