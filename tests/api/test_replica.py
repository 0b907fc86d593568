"""The API with a replica for reads, two real servers: reads use it, and never show less than the primary has."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import httpx
import pytest

from app.web.keys import key_hash_of
from db.deploy.deploy import deploy
from db.embedded.server import EmbeddedServer
from tests.cli.test_status import read_status, surety
from tests.support.http_client import CONTEXT, Connection, Merchant, ServerProcess, connect_as_owner, running_server
from tests.support.payments import fact, pay, record
from tests.support.sandbox_process import eventually
from tests.support.standby import ReplicatedServers, replicated_servers

READS = (
    "select count(*) from pg_stat_activity where application_name = 'surety-api' and query like 'select body from%%'"
)


class ReplicatedApi:
    """Two processes of the API with a replica, a merchant, and connections to both servers."""

    def __init__(self, servers: ReplicatedServers, on_standby: Connection, apis: list[ServerProcess]) -> None:
        self.servers = servers
        self.on_standby = on_standby
        self.apis = apis
        self.merchant = Merchant(servers.conn, apis[0].url)
        headers = {"Authorization": f"Bearer {self.merchant.key}"}
        self.other = httpx.Client(base_url=apis[1].url, timeout=30, headers=headers, verify=CONTEXT)
        eventually(lambda: self.states() == ["ok", "ok"], 30)

    def states(self) -> list[str]:
        return [httpx.get(f"{api.url}/health", verify=CONTEXT, timeout=30).json()["replica"] for api in self.apis]

    def reads_on_replica(self) -> int:
        """Connections of the API whose last statement on the replica was a read."""
        [(count,)] = self.on_standby.execute(READS).fetchall()
        return int(count)

    @contextmanager
    def without_replay(self) -> Generator[None]:
        """The replica receives, and replays nothing."""
        self.on_standby.execute("select pg_wal_replay_pause()")
        paused = "select pg_get_wal_replay_pause_state() = 'paused'"
        eventually(lambda: self.on_standby.execute(paused).fetchone() == (True,), 30)
        try:
            yield
        finally:
            self.on_standby.execute("select pg_wal_replay_resume()")


@pytest.fixture(scope="module")
def replicated() -> Iterator[ReplicatedApi]:
    with EmbeddedServer(durable=True) as primary:
        deploy(primary.url)
        with replicated_servers(primary) as servers:
            reader = {"SURETY_READER_DATABASE_URL": servers.standby.url}
            with (
                connect_as_owner(f"{servers.standby.url}&target_session_attrs=standby") as on_standby,
                running_server("api", primary.url, **reader) as first,
                running_server("api", primary.url, **reader) as second,
            ):
                replicated = ReplicatedApi(servers, on_standby, [first, second])
                with replicated.merchant.client, replicated.other:
                    yield replicated


def test_reads_use_the_replica_and_show_what_was_written_before(replicated: ReplicatedApi) -> None:
    for _ in range(20):
        made = replicated.merchant.post()
        assert made.status_code == 201 and made.headers["surety-position"]
        [newest] = replicated.other.get("/v1/payments", params={"limit": 1}).json()["data"]
        assert newest["id"] == made.json()["id"]
    assert replicated.reads_on_replica()


def test_replica_that_is_behind_shows_no_client_less(replicated: ReplicatedApi) -> None:
    with replicated.without_replay():
        made = replicated.merchant.pay()
        for client in (replicated.merchant.client, replicated.other):
            assert client.get(f"/v1/payments/{made['id']}").json() == made
            [newest] = client.get("/v1/payments", params={"limit": 1}).json()["data"]
            assert newest["id"] == made["id"]
        eventually(lambda: replicated.states() == ["behind", "behind"], 30)
        done = surety(replicated.servers.primary.url, "status", reader=replicated.servers.standby.url)
        assert "the replica for reads is behind" in done.stdout
    eventually(lambda: replicated.states() == ["ok", "ok"], 30)
    done = surety(replicated.servers.primary.url, "status", reader=replicated.servers.standby.url)
    assert "replica for reads  ok" in done.stdout


def test_read_with_a_position_shows_that_write(replicated: ReplicatedApi) -> None:
    with replicated.without_replay():
        made = replicated.merchant.post()
        position = {"Surety-Position": made.headers["surety-position"]}
        shown = replicated.other.get(f"/v1/payments/{made.json()['id']}", headers=position)
        assert shown.json() == made.json()
    eventually(lambda: replicated.states() == ["ok", "ok"], 30)
    assert replicated.other.get(f"/v1/payments/{made.json()['id']}", headers=position).json() == made.json()
    forged = replicated.other.get("/v1/payments", headers={"Surety-Position": "ffffffff-ffffffffffffffff"})
    assert forged.status_code == 200
    assert replicated.states() == ["ok", "ok"]


@pytest.mark.parametrize("path", ["/v1/payments", "/v1/events", "/v1/balance"])
def test_malformed_position_is_refused_with_its_rule(replicated: ReplicatedApi, path: str) -> None:
    answer = replicated.other.get(path, headers={"Surety-Position": "0/16B3748"})
    assert answer.status_code == 400
    [broken] = answer.json()["errors"]
    assert (broken["field"], broken["in"]) == ("Surety-Position", "header")
    unknown = {"Surety-Position": "0/16B3748", "Authorization": "Bearer " + replicated.merchant.key[:-4] + "0000"}
    assert replicated.other.get(path, headers=unknown).status_code == 401


def test_revoked_key_is_refused_although_the_replica_knows_it_as_valid(replicated: ReplicatedApi) -> None:
    merchant = replicated.merchant
    position = {"Surety-Position": merchant.post().headers["surety-position"]}
    key = {"Authorization": f"Bearer {merchant.another_key()}"}
    # A new key works at once, whatever the replica knows.
    assert replicated.other.get("/v1/payments", headers=key | position).status_code == 200
    with replicated.without_replay():
        merchant.conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
        assert replicated.other.get("/v1/payments", headers=key).status_code == 401
        eventually(lambda: replicated.other.get("/v1/payments", headers=key | position).status_code == 401)
    eventually(lambda: replicated.states() == ["ok", "ok"], 30)


def test_reader_of_events_misses_none_that_commits_late(replicated: ReplicatedApi) -> None:
    merchant = replicated.merchant
    key_hash = key_hash_of(f"Bearer {merchant.key}".encode())
    assert key_hash is not None
    merchant.pay()
    with connect_as_owner(replicated.servers.primary.url) as late:
        with late.transaction():
            [payment_id] = pay(late, key_hash, idempotency_key="late")
            merchant.pay()
            after = replicated.other.get("/v1/events", params={"limit": 100}).json()["next"]
        record(late, [fact(payment_id, "submitted", "pi_late", 10000), fact(payment_id, "captured", "ch_late", 10000)])
    page = replicated.other.get("/v1/events", params={"limit": 100, "starting_after": after}).json()
    assert payment_id in {event["data"]["id"] for event in page["data"]}


def test_lost_replica_costs_no_read(replicated: ReplicatedApi) -> None:
    made = replicated.merchant.pay()
    replicated.on_standby.close()
    with replicated.servers.without_standby():
        for client in (replicated.merchant.client, replicated.other):
            assert client.get(f"/v1/payments/{made['id']}").json() == made
        eventually(lambda: replicated.states() == ["away", "away"], 30)
        assert client.get("/v1/payments", params={"limit": 1}).status_code == 200
    eventually(lambda: replicated.states() == ["ok", "ok"], 30)


def test_promoted_replica_gets_no_reads(replicated: ReplicatedApi) -> None:
    servers = replicated.servers
    servers.conn.execute("alter system reset synchronous_standby_names")
    servers.conn.execute("select pg_reload_conf()")
    with connect_as_owner(f"{servers.standby.url}&target_session_attrs=any") as promoted:
        promoted.execute("select pg_promote()")
        key_hash = key_hash_of(f"Bearer {replicated.merchant.key}".encode())
        assert key_hash is not None
        [elsewhere] = pay(promoted, key_hash, idempotency_key="elsewhere")
    assert replicated.other.get(f"/v1/payments/{elsewhere}").status_code == 404
    eventually(lambda: replicated.states() == ["promoted", "promoted"], 30)
    made = replicated.merchant.pay()
    assert replicated.other.get(f"/v1/payments/{made['id']}").json() == made
    _, state = read_status(servers.primary.url, reader=servers.standby.url)
    assert "replica-unusable" in [finding["id"] for finding in state["findings"]]
