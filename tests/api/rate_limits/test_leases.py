"""A process's leases and addresses: bounded memory, few statements, and failures of the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.web.batching import Unavailable
from app.web.database import DatabasePool
from app.web.keys import new_key
from app.web.problems import Problem
from app.web.rate_limits import addresses, leases
from app.web.rate_limits.addresses import FailedAuthentications
from app.web.rate_limits.leases import PermitLeases
from app.web.refusals import RefusalCounter
from db.connect import connect_async
from db.settings import Settings
from tests.support.payments import Connection, add_merchant


@pytest.fixture
async def refusals(settings: Settings) -> AsyncIterator[RefusalCounter]:
    pool = DatabasePool("api", settings)
    await pool.open()
    counter = RefusalCounter("limited", pool)
    yield counter
    await counter.close()
    await pool.close()


@pytest.fixture
async def permits(settings: Settings, refusals: RefusalCounter) -> AsyncIterator[PermitLeases]:
    made = PermitLeases(lambda: connect_async("api", settings), refusals)
    await made.open()
    yield made
    await made.close()


async def admit(permits: PermitLeases, key_hash: bytes) -> bool:
    """Whether a request of the key is admitted, as app/api/requests.py asks."""
    try:
        lease = permits.take(key_hash, "req_1") or await permits.wait(key_hash, "req_1")
    except Problem:
        return False
    return lease is not None


async def test_many_requests_at_once_share_leases_and_get_exactly_the_burst(
    permits: PermitLeases, conn: Connection
) -> None:
    merchant_id, key_hash = add_merchant(conn)
    conn.execute("select surety.set_rate_limit('keys', 0, 0), surety.set_rate_limit(%s, 1, 500)", (merchant_id,))
    began = asyncio.get_running_loop().time()
    results = await asyncio.gather(*(admit(permits, key_hash) for _ in range(1000)))
    seconds = asyncio.get_running_loop().time() - began
    assert 500 <= sum(results) <= 501 + seconds


async def test_requests_within_a_lease_need_no_statement(permits: PermitLeases, conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    assert await admit(permits, key_hash)
    # The first answer holds permits for a tenth of a second of the rate.
    for _ in range(20):
        assert permits.take(key_hash, "req_1") is not None


async def test_unknown_keys_leave_nothing_in_memory(permits: PermitLeases, conn: Connection) -> None:
    _, known = add_merchant(conn)
    assert await admit(permits, known)
    for _ in range(20):
        unknown = [new_key(livemode=False).hash for _ in range(100)]
        assert not any(await asyncio.gather(*(admit(permits, one) for one in unknown)))
    assert len(permits._leases) == 1


async def test_known_keys_beyond_the_bound_replace_the_oldest(
    permits: PermitLeases, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "KEPT_KEYS_MAX", 3)
    for _ in range(6):
        assert await admit(permits, add_merchant(conn)[1])
        assert len(permits._leases) <= 3


async def test_a_refusing_database_gives_each_waiting_request_its_error_and_later_ones_go_on(
    permits: PermitLeases, conn: Connection
) -> None:
    _, key_hash = add_merchant(conn)
    conn.execute("revoke execute on function api.lease_permits(jsonb) from surety_api")
    results = await asyncio.gather(*(admit(permits, key_hash) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    assert permits._leases == {}
    conn.execute("grant execute on function api.lease_permits(jsonb) to surety_api")
    assert await admit(permits, key_hash)


async def test_addresses_are_bounded_and_the_oldest_is_forgotten(
    refusals: RefusalCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "KEPT_ADDRESSES_MAX", 100)
    failed = FailedAuthentications(0.001, refusals)
    for n in range(1000):
        failed.note(f"198.51.{n // 250}.{n % 250}")
    assert len(failed._whole_at) == 100
    failed.require_room("198.51.0.0")
    with pytest.raises(Problem):
        failed.require_room("198.51.3.249")


async def test_ipv6_addresses_of_one_network_are_one_client(refusals: RefusalCounter) -> None:
    failed = FailedAuthentications(0.001, refusals)
    failed.note("2001:db8::1")
    with pytest.raises(Problem) as refused:
        failed.require_room("2001:db8::2:3")
    assert refused.value.name == "rate-limited"
    failed.require_room("2001:db8:0:1::1")
    failed.note("not an address:")
    assert refused.value.more["rate_limit"] == "address"


async def test_a_rate_of_zero_is_no_limit_for_addresses(refusals: RefusalCounter) -> None:
    failed = FailedAuthentications(0, refusals)
    for _ in range(100):
        failed.note("198.51.100.1")
    failed.require_room("198.51.100.1")
