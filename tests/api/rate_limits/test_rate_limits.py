"""Rate limits over real sockets: one process and several, refusals and response fields."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import http_sf
import httpx
import pytest

from app.api.routes import ROUTES
from app.web.keys import new_key
from app.web.rate_limits.leases import LEASE_SECONDS
from tests.support.http_client import (
    CONTEXT,
    Connection,
    Merchant,
    ServerProcess,
    connect_as_owner,
    payment,
    problem,
    running_server,
    unique_name,
)
from tests.support.operators import add_operator

WAIT_SECONDS_MAX = 20.0


def limit(conn: Connection, subject: str, rate: int, burst: int) -> None:
    changed = conn.execute("select surety.set_rate_limit(%s, %s, %s, 'test')", (subject, rate, burst)).fetchone()
    assert changed != (None,)


def parse(answer: httpx.Response, name: str) -> dict[str, dict[str, Any]]:
    """A field as a structured list: the parameters of each item."""
    items: Any = http_sf.parse(answer.headers[name].encode(), tltype="list")
    return dict(items)


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds, as a limit acts within a second or so."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def server_time(conn: Connection) -> float:
    row = conn.execute("select extract(epoch from clock_timestamp())::double precision").fetchone()
    assert row is not None
    return float(row[0])


@pytest.fixture
def two_apis(database: str) -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running_server("api", database)) for _ in range(2)]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_two_processes_together_admit_no_more_than_rate_times_time_plus_burst(
    two_apis: list[ServerProcess], conn: Connection, method: str
) -> None:
    merchant = Merchant(conn, two_apis[0].url)
    limit(conn, merchant.id, 1, 80)

    def flood(number: int) -> tuple[int, int]:
        admitted = refused = 0
        headers = {"Authorization": f"Bearer {merchant.key}"}
        with httpx.Client(base_url=two_apis[number % 2].url, verify=CONTEXT, timeout=30, headers=headers) as client:
            for _ in range(24):
                if method == "GET":
                    answer = client.get("/v1/payments")
                else:
                    key = {"Idempotency-Key": unique_name("key")}
                    answer = client.post("/v1/payments", json=payment(), headers=key)
                assert answer.status_code in {200, 201, 429}, answer.text
                admitted += answer.is_success
                refused += answer.status_code == 429
        return admitted, refused

    began = server_time(conn)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(flood, range(4)))
    seconds = server_time(conn) - began
    admitted, refused = (sum(counts) for counts in zip(*results, strict=True))
    assert admitted <= 80 + seconds
    assert refused > 0
    # The burst was used, but for what each process leased ahead.
    assert admitted >= 80 - 2
    if method == "POST":
        assert merchant.count() == admitted
    merchant.client.close()
    for one in two_apis:
        one.stop()
    counted = conn.execute("select reason, actor, sum(count)::integer from audit.refusals group by 1, 2").fetchall()
    assert counted == [("merchant", merchant.id, refused)]


def test_every_route_with_a_key_shows_what_is_left_of_both_limits(merchant: Merchant) -> None:
    limit(merchant.conn, merchant.id, 7, 40)
    limit(merchant.conn, merchant.key_id, 30, 30)
    left = []
    for path in ("/v1/payments", "/v1/payments/pay_unknown", "/v1/payments?limit=0", "/v1/operator/status"):
        answer = merchant.client.get(path)
        policy, state = parse(answer, "ratelimit-policy"), parse(answer, "ratelimit")
        key_hash = hashlib.sha256(merchant.key.encode()).digest()
        merchant_hash = hashlib.sha256(merchant.id.encode()).digest()
        partitions = {"key": {"pk": key_hash[:6]}, "merchant": {"pk": merchant_hash[:6]}}
        assert policy == {
            "key": {"q": 30, "w": 1} | partitions["key"], "merchant": {"q": 40, "w": 6} | partitions["merchant"]
        }  # fmt: skip
        assert {name: {"pk": shown["pk"]} for name, shown in state.items()} == partitions
        assert all(0 <= shown["r"] <= policy[name]["q"] and shown["t"] >= 1 for name, shown in state.items())
        left.append(state["merchant"]["r"])
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]
    post = merchant.post()
    assert post.status_code == 201
    assert set(parse(post, "ratelimit")) == {"key", "merchant"}


def test_routes_without_a_key_have_no_limit(api: ServerProcess) -> None:
    for path in [row.path.format(name="internal") for row in ROUTES if row.is_public] + ["/docs", "/docs/openapi.json"]:
        answer = httpx.get(api.url + path)
        assert answer.status_code == 200
        assert "ratelimit" not in answer.headers


def test_a_refusal_says_which_limit_and_when_to_come_again_and_stores_nothing(merchant: Merchant) -> None:
    limit(merchant.conn, merchant.id, 1, 5)
    statuses = [merchant.post().status_code for _ in range(5)]
    assert statuses == [201] * 5
    refused = merchant.post(key="the key")
    document = problem(refused, 429, "rate-limited")
    assert (document["rate_limit"], document["retry_after"]) == ("merchant", int(refused.headers["retry-after"]))
    assert int(refused.headers["retry-after"]) >= parse(refused, "ratelimit")["merchant"]["t"] >= 1
    assert parse(refused, "ratelimit")["merchant"]["r"] == 0
    assert merchant.count() == 5
    until(lambda: merchant.post(key="the key").status_code == 201)
    assert merchant.count() == 6


def test_keys_of_a_merchant_share_its_limit_and_a_key_may_have_a_lower_one(merchant: Merchant) -> None:
    slow = {"Authorization": f"Bearer {merchant.another_key()}"}
    limit(merchant.conn, merchant.key_id, 1, 2)
    limit(merchant.conn, merchant.id, 1, 6)
    statuses = [merchant.client.get("/v1/balance", headers=slow).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = merchant.client.get("/v1/balance", headers=slow)
    if refused.status_code == 429:
        assert problem(refused, 429, "rate-limited")["rate_limit"] == "key"
    admitted = 0
    while (answer := merchant.client.get("/v1/balance")).status_code == 200:
        admitted += 1
    assert 4 <= admitted + (refused.status_code == 200) <= 10
    assert problem(answer, 429, "rate-limited")["rate_limit"] == "merchant"


def test_a_new_limit_acts_soon_on_a_running_process(merchant: Merchant) -> None:
    assert parse(merchant.client.get("/v1/balance"), "ratelimit-policy")["merchant"]["q"] == 2000
    limit(merchant.conn, merchant.id, 3, 4)
    until(lambda: parse(merchant.client.get("/v1/balance"), "ratelimit-policy")["merchant"]["q"] == 4)
    limit(merchant.conn, merchant.id, 0, 0)
    until(lambda: "merchant" not in parse(merchant.client.get("/v1/balance"), "ratelimit-policy"))
    limit(merchant.conn, merchant.key_id, 0, 0)
    until(lambda: "ratelimit" not in merchant.client.get("/v1/balance").headers)
    limit(merchant.conn, merchant.key_id, 1, 1)
    until(lambda: merchant.client.get("/v1/balance").status_code == 429)
    assert LEASE_SECONDS <= 1.0


def test_a_revoked_key_is_refused_with_its_reason_whatever_is_leased(merchant: Merchant) -> None:
    assert merchant.client.get("/v1/balance").status_code == 200
    merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    problem(merchant.client.get("/v1/balance"), 401, "key-revoked")
    until(lambda: "ratelimit" not in merchant.client.get("/v1/balance").headers)
    problem(merchant.client.get("/v1/balance"), 401, "key-revoked")


def test_an_operators_key_is_limited(api: ServerProcess, rights: Connection) -> None:
    key = add_operator(rights, unique_name("operator"), "viewer")
    [(key_id,)] = rights.execute(
        "select id from surety.operator_keys where hash = %s", (hashlib.sha256(key.encode()).digest(),)
    ).fetchall()
    limit(rights, key_id, 1, 3)
    with httpx.Client(base_url=api.url, verify=CONTEXT, headers={"Authorization": f"Bearer {key}"}) as client:
        assert [client.get("/v1/operator/dead-letters").status_code for _ in range(3)] == [200] * 3
        refused = client.get("/v1/operator/dead-letters")
    assert problem(refused, 429, "rate-limited")["rate_limit"] == "key"
    assert set(parse(refused, "ratelimit")) == {"key"}


def test_the_permits_of_a_killed_process_are_lost_and_no_others(database: str, conn: Connection) -> None:
    with running_server("api", database) as other:
        victim = ServerProcess("api", database)
        merchant = Merchant(conn, victim.url)
        limit(conn, merchant.id, 1, 50)
        assert merchant.client.get("/v1/balance").status_code == 200
        victim.process.kill()
        victim.process.communicate()
        merchant.client.close()
        headers = {"Authorization": f"Bearer {merchant.key}"}
        began = server_time(conn)
        with httpx.Client(base_url=other.url, verify=CONTEXT, headers=headers) as client:
            admitted = 0
            while client.get("/v1/balance").status_code == 200:
                admitted += 1
        assert 48 <= admitted <= 50 + server_time(conn) - began


def test_failed_authentications_of_an_address_are_limited_and_a_valid_key_is_not(database: str) -> None:
    with running_server("api", database, SURETY_ADDRESS_RATE="2") as api, connect_as_owner(database) as conn:
        merchant = Merchant(conn, api.url)
        wrong = [f"Bearer {new_key(livemode=False).text}", "Bearer nonsense", ""]
        answers = [merchant.client.get("/v1/balance", headers={"Authorization": wrong[n % 3]}) for n in range(14)]
        assert [answer.status_code for answer in answers[:10]] == [401] * 10
        limited = [answer for answer in answers if answer.status_code == 429]
        assert limited
        document = problem(limited[0], 429, "rate-limited")
        seconds = int(limited[0].headers["retry-after"])
        assert (document["rate_limit"], document["retry_after"]) == ("address", seconds)
        assert parse(limited[0], "ratelimit-policy") == {"address": {"q": 10, "w": 5}}
        assert merchant.client.get("/v1/balance").status_code == 200
        assert merchant.post().status_code == 201
        merchant.client.close()


def test_unknown_keys_leave_nothing_behind(database: str, conn: Connection) -> None:
    with (
        running_server("api", database, SURETY_ADDRESS_RATE="0") as api,
        httpx.Client(base_url=api.url, verify=CONTEXT) as client,
    ):
        for _ in range(300):
            headers = {"Authorization": f"Bearer {new_key(livemode=False).text}"}
            problem(client.get("/v1/balance", headers=headers), 401, "unauthenticated")
    assert conn.execute("select count(*) from surety.rate_limit_uses").fetchone() == (0,)


def test_partition_keys_are_the_beginning_of_hashes(merchant: Merchant) -> None:
    """As docs/api.md says, so that a client can compute them."""
    shown = merchant.client.get("/v1/balance").headers["ratelimit-policy"]
    for name in (merchant.key, merchant.id):
        assert f"pk=:{base64.b64encode(hashlib.sha256(name.encode()).digest()[:6]).decode()}:" in shown
