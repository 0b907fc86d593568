"""Permits: never more than a limit allows, on a clock that the test moves."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.errors import CheckViolation
from psycopg.rows import dict_row

from app.web.keys import new_key, new_operator_key
from tests.conftest import Connect
from tests.support.payments import Connection, add_merchant

SECOND = 1_000_000


def limit(conn: Connection, subject: str, rate: int | None, burst: int | None) -> bool | None:
    row = conn.execute("select surety.set_rate_limit(%s, %s, %s, 'test')", (subject, rate, burst)).fetchone()
    assert row is not None
    changed: bool | None = row[0]
    return changed


def no_defaults(conn: Connection) -> None:
    for subject in ("keys", "merchants", "operator-keys"):
        limit(conn, subject, 0, 0)


def lease(conn: Connection, *asked: tuple[bytes, int] | tuple[bytes, int, int]) -> list[dict[str, Any]]:
    """The answers for keys and the permits they want and hold."""
    requests = [
        {"n": n, "key_hash": one[0].hex(), "wanted": one[1], "held": one[2] if len(one) > 2 else one[1]}
        for n, one in enumerate(asked)
    ]
    with conn.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute("select * from api.lease_permits(%s)", (json.dumps(requests),)).fetchall()
    return sorted(rows, key=lambda row: int(row["n"]))


def granted(conn: Connection, *asked: tuple[bytes, int] | tuple[bytes, int, int]) -> list[int]:
    return [row["granted"] for row in lease(conn, *asked)]


class FrozenClock:
    """The database's clock, which stands still until it is moved."""

    def __init__(self, conn: Connection) -> None:
        [(now,)] = conn.execute("select surety.time_now()").fetchall()
        conn.execute(
            (
                "create or replace function surety.time_now() returns timestamptz language sql stable parallel safe"
                f" begin atomic select timestamptz '{now}'"
                " + coalesce((select clock.ahead from surety.clock), interval '0'); end"
            ).encode()
        )
        self.conn = conn
        self.micros = 0

    def move(self, micros: int) -> None:
        self.micros += micros
        self.conn.execute(
            "insert into surety.clock (ahead) values (%s * interval '1 microsecond')"
            " on conflict (kind) do update set ahead = excluded.ahead",
            (self.micros,),
        )


@pytest.fixture
def clock(postgresql: Connection) -> FrozenClock:
    postgresql.autocommit = True
    postgresql.execute("update surety.environment set kind = 'test'")
    return FrozenClock(postgresql)


@pytest.mark.parametrize(("rate", "burst"), [(1, 1), (3, 7), (7, 2), (100, 100), (999, 50)])
def test_no_history_of_leases_exceeds_rate_times_time_plus_burst(clock: FrozenClock, rate: int, burst: int) -> None:
    conn = clock.conn
    no_defaults(conn)
    merchant_id, key_hash = add_merchant(conn)
    limit(conn, merchant_id, rate, burst)
    chance = random.Random(f"{rate} {burst}")
    taken: list[tuple[int, int]] = []
    for _ in range(150):
        clock.move(chance.choice((0, 1, 999, chance.randrange(2 * SECOND // rate), 3 * SECOND * burst // rate)))
        taken.append((clock.micros, granted(conn, (key_hash, chance.choice((1, 1, 2, burst, 10 * burst))))[0]))
    for first, (began, _) in enumerate(taken):
        total = 0
        for at, count in taken[first:]:
            total += count
            assert total <= burst + (at - began) * rate / SECOND
    # What the limit allows is not withheld either.
    assert any(count == burst for _, count in taken)


def test_a_burst_is_whole_at_first_and_refills_at_the_rate(clock: FrozenClock) -> None:
    conn = clock.conn
    no_defaults(conn)
    merchant_id, key_hash = add_merchant(conn)
    limit(conn, merchant_id, 10, 5)
    assert granted(conn, (key_hash, 100)) == [5]
    [answer] = lease(conn, (key_hash, 1))
    assert (answer["granted"], answer["merchant_left"], answer["merchant_wait"]) == (0, 0, 0.1)
    clock.move(99_999)
    assert granted(conn, (key_hash, 1)) == [0]
    clock.move(1)
    assert granted(conn, (key_hash, 1)) == [1]
    clock.move(300_000)
    assert granted(conn, (key_hash, 100)) == [3]
    clock.move(60 * SECOND)
    assert granted(conn, (key_hash, 100)) == [5]


def test_a_clock_that_steps_back_or_a_lower_limit_leaves_at_most_an_empty_burst(clock: FrozenClock) -> None:
    conn = clock.conn
    no_defaults(conn)
    merchant_id, key_hash = add_merchant(conn)
    limit(conn, merchant_id, 1, 1000)
    clock.move(86_400 * SECOND)
    assert granted(conn, (key_hash, 1000)) == [1000]
    clock.move(-86_000 * SECOND)
    limit(conn, merchant_id, 10, 10)
    assert granted(conn, (key_hash, 10)) == [0]
    clock.move(SECOND)
    assert granted(conn, (key_hash, 100)) == [10]


def test_two_keys_share_the_merchants_limit_and_each_has_its_own(conn: Connection) -> None:
    no_defaults(conn)
    merchant_id, first = add_merchant(conn)
    second = new_key(livemode=False)
    added = conn.execute("select surety.add_api_key(%s, %s, 'test')", (merchant_id, second.hash)).fetchone()
    assert added is not None
    limit(conn, merchant_id, 1, 10)
    limit(conn, added[0], 1, 4)
    assert granted(conn, (second.hash, 20)) == [4]
    # The key that wants least comes first, and nothing is granted twice within a batch.
    assert granted(conn, (first, 20), (second.hash, 1)) == [6, 0]
    assert granted(conn, (first, 1), (second.hash, 1)) == [0, 0]


def test_keys_of_a_merchant_in_one_batch_get_no_more_than_its_limit(conn: Connection) -> None:
    no_defaults(conn)
    merchant_id, first = add_merchant(conn)
    others = [new_key(livemode=False) for _ in range(2)]
    for number, key in enumerate(others):
        add = "select surety.add_api_key(%s, %s, 'test', p_name => %s)"
        conn.execute(add, (merchant_id, key.hash, f"other{number}"))
    limit(conn, merchant_id, 1, 10)
    # Those that want least come first.
    assert granted(conn, (first, 8), (others[0].hash, 3), (others[1].hash, 1)) == [6, 3, 1]


def test_permits_are_leased_ahead_only_while_half_of_each_burst_is_left(clock: FrozenClock) -> None:
    conn = clock.conn
    no_defaults(conn)
    merchant_id, key_hash = add_merchant(conn)
    limit(conn, merchant_id, 100, 40)
    assert granted(conn, (key_hash, 1, 0)) == [10]
    assert granted(conn, (key_hash, 0, 8)) == [2]
    assert granted(conn, (key_hash, 1, 0)) == [8]
    assert granted(conn, (key_hash, 3, 0)) == [3]


def test_processes_that_lease_at_once_never_share_a_permit(conn: Connection, connect: Connect) -> None:
    no_defaults(conn)
    keys = []
    for _ in range(4):
        merchant_id, key_hash = add_merchant(conn)
        limit(conn, merchant_id, 1, 300)
        keys.append(key_hash)

    def take(api: psycopg.Connection[Any]) -> list[int]:
        sums = [0] * len(keys)
        order = list(range(len(keys)))
        for turn in range(60):
            random.Random(turn).shuffle(order)
            for place, count in zip(order, granted(api, *((keys[place], 2) for place in order)), strict=True):
                sums[place] += count
        return sums

    began = conn.execute("select clock_timestamp()").fetchone()
    with ThreadPoolExecutor(4) as pool:
        totals = [sum(counts) for counts in zip(*pool.map(take, [connect("api") for _ in range(4)]), strict=True)]
    ended = conn.execute("select clock_timestamp()").fetchone()
    assert began is not None
    assert ended is not None
    for total in totals:
        assert 300 <= total <= 300 + (ended[0] - began[0]).total_seconds()


def test_unknown_revoked_and_expired_keys_get_no_permit_and_leave_no_row(conn: Connection) -> None:
    _, revoked = add_merchant(conn)
    _, expired = add_merchant(conn)
    conn.execute("update surety.api_keys set revoked_at = surety.time_now() where hash = %s", (revoked,))
    conn.execute(
        "update surety.api_keys set created_at = created_at - interval '1 day',"
        " expires_at = surety.time_now() where hash = %s",
        (expired,),
    )
    unknown = [(new_key(livemode=False).hash, 1) for _ in range(500)]
    assert {row["key_id"] for row in lease(conn, *unknown, (revoked, 1), (expired, 1))} == {None}
    assert conn.execute("select count(*) from surety.rate_limit_uses").fetchone() == (0,)


def test_an_operators_key_has_a_limit_of_its_own_and_no_merchant(conn: Connection) -> None:
    key = new_operator_key()
    conn.execute("select surety.add_operator('ana', 'a@example.com', 'admin', %s, %s, 'ana')", (key.hash, key.hint))
    limit(conn, "operator-keys", 1, 3)
    [answer] = lease(conn, (key.hash, 10))
    shown = [answer[name] for name in ("granted", "key_burst", "merchant_id", "merchant_rate")]
    assert shown == [3, 3, None, None]


def test_without_a_limit_everything_is_granted_and_nothing_written(conn: Connection) -> None:
    no_defaults(conn)
    _, key_hash = add_merchant(conn)
    assert granted(conn, (key_hash, 10**6)) == [10**6]
    assert conn.execute("select count(*) from surety.rate_limit_uses").fetchone() == (0,)


def test_rows_are_deleted_once_their_burst_is_whole(clock: FrozenClock) -> None:
    conn = clock.conn
    limit(conn, "merchants", 10, 20)
    limit(conn, "keys", 0, 0)
    _, key_hash = add_merchant(conn)
    granted(conn, (key_hash, 10))
    assert conn.execute("select surety.delete_whole_bursts()").fetchone() == (0,)
    clock.move(SECOND + 1)
    assert conn.execute("select surety.delete_whole_bursts()").fetchone() == (1,)
    assert conn.execute("select count(*) from surety.rate_limit_uses").fetchone() == (0,)


def test_changes_are_audited_once_and_only_for_what_exists(conn: Connection) -> None:
    merchant_id, _ = add_merchant(conn)
    assert limit(conn, merchant_id, 10, 20) is True
    assert limit(conn, merchant_id, 10, 20) is False
    assert limit(conn, merchant_id, None, None) is True
    assert limit(conn, merchant_id, None, None) is False
    assert limit(conn, "mer_" + 24 * "0", 10, 20) is None
    assert limit(conn, "keys", None, None) is False
    entries = conn.execute(
        "select actor, merchant_id, snapshot ->> 'requests_per_second', snapshot -> 'before' ->> 'burst'"
        " from audit.entries where outcome = 'rate limit changed'"
    ).fetchall()
    assert set(entries) == {("operator:test", merchant_id, "10", None), ("operator:test", merchant_id, None, "20")}
    assert len(entries) == 2


@pytest.mark.parametrize(("rate", "burst"), [(-1, 1), (1, 0), (0, 1), (1_000_001, 1), (1, 1_000_001)])
def test_a_limit_without_sense_is_refused(conn: Connection, rate: int, burst: int) -> None:
    with pytest.raises(CheckViolation):
        limit(conn, "keys", rate, burst)


def test_a_successor_keeps_the_limit_of_its_key(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [(key_id,)] = conn.execute("select id from surety.api_keys where hash = %s", (key_hash,)).fetchall()
    limit(conn, key_id, 3, 4)
    successor = new_key(livemode=False)
    conn.execute("select surety.rotate_api_key(%s, %s, %s, '1 day')", (key_id, successor.hash, successor.hint))
    [answer] = lease(conn, (successor.hash, 1))
    assert (answer["key_rate"], answer["key_burst"]) == (3, 4)
    first, second = new_operator_key(), new_operator_key()
    conn.execute("select surety.add_operator('ana', 'a@example.com', 'admin', %s, %s, 'ana')", (first.hash, first.hint))
    [(key_id,)] = conn.execute("select id from surety.operator_keys").fetchall()
    limit(conn, key_id, 5, 6)
    conn.execute("select surety.rotate_operator_key(%s, %s, %s, '1 day')", (key_id, second.hash, second.hint))
    [answer] = lease(conn, (second.hash, 1))
    assert (answer["key_rate"], answer["key_burst"]) == (5, 6)


def counts(conn: Connection) -> Sequence[Any]:
    return conn.execute("select kind, reason, actor, count from audit.refusals order by 1, 2, 3").fetchall()


def test_refusals_of_a_merchant_are_counted_and_listed(conn: Connection) -> None:
    merchant_id, _ = add_merchant(conn, name="Noisy")
    for _ in range(2):
        conn.execute(
            "select surety.count_refusals('limited', %s)",
            (json.dumps({f"key {merchant_id}": 2, f"merchant {merchant_id}": 3, "address": 5}),),
        )
    assert counts(conn) == [
        ("limited", "address", "", 10), ("limited", "key", merchant_id, 4), ("limited", "merchant", merchant_id, 6),
    ]  # fmt: skip
    listed = conn.execute("select merchant_id, name, hour_count, day_count from surety.list_limited_merchants()")
    assert listed.fetchall() == [(merchant_id, "Noisy", 10, 10)]
