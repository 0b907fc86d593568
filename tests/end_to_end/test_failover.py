"""Two servers behind one address: processes follow a failover without a restart, past a host that never answers."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from db.deploy.deploy import deploy
from db.embedded.server import EmbeddedServer
from tests.cli.test_status import read_status
from tests.support.http_client import Merchant, ServerProcess, connect_as_owner, payment, problem, running_server
from tests.support.payments import violations
from tests.support.sandbox_process import eventually, running_sandbox
from tests.support.silent_host import SilentHost
from tests.support.standby import ReplicatedServers, replicated_servers
from tests.support.workers import shorten_delays, wait_for_worker, worker_process

CONFIRMED = "select count(*) from surety.payments where state in ('confirmed', 'settled') and id = any(%s)"
# A connection to a host that never answers is given up after 5 s.
FAILOVER_SECONDS = 30


@pytest.fixture
def servers() -> Iterator[ReplicatedServers]:
    with EmbeddedServer(durable=True) as primary:
        deploy(primary.url)
        with replicated_servers(primary) as servers:
            shorten_delays(servers.conn)
            servers.conn.execute("update surety.environment set kind = 'test'")
            yield servers


@pytest.fixture
def silent_host() -> Iterator[SilentHost]:
    host = SilentHost()
    yield host
    host.close()


def address_of(servers: ReplicatedServers, silent_host: SilentHost) -> str:
    """The address of both servers, after that of another host."""
    given = [conninfo_to_dict(server.url) for server in (servers.primary, servers.standby)]
    hosts = ["127.0.0.1", *(str(server["host"]) for server in given)]
    ports = [str(silent_host.port), *(str(server["port"]) for server in given)]
    return make_conninfo(servers.primary.url, host=",".join(hosts), port=",".join(ports))


@contextmanager
def merchant_of(servers: ReplicatedServers, api: ServerProcess) -> Generator[Merchant]:
    merchant = Merchant(servers.conn, api.url)
    with merchant.client:
        yield merchant


def pay_until_accepted(merchant: Merchant, key: str) -> str:
    """The id of a payment that is requested again until a server accepts it. Any refusal is temporary."""

    def answered() -> httpx.Response | None:
        answer = merchant.post(payment(), key=key)
        if answer.status_code == 201:
            return answer
        problem(answer, 503, "unavailable")
        return None

    return str(eventually(answered, FAILOVER_SECONDS).json()["id"])


@pytest.mark.parametrize("is_first_host_silent", [False, True])
def test_processes_follow_a_failover_and_nothing_accepted_is_lost(
    servers: ReplicatedServers, silent_host: SilentHost, is_first_host_silent: bool, tmp_path: Path
) -> None:
    address = address_of(servers, silent_host)
    with (
        running_sandbox(tmp_path) as sandbox,
        running_server("api", address) as api,
        worker_process(address, sandbox.url) as worker,
        merchant_of(servers, api) as merchant,
    ):
        wait_for_worker(servers.conn)
        before = [merchant.pay()["id"] for _ in range(3)]
        if is_first_host_silent:
            silent_host.fall_silent()
        servers.fail_over()
        after = pay_until_accepted(merchant, "order-after")
        assert api.process.poll() is None and worker.poll() is None
        with connect_as_owner(servers.standby.url) as conn:
            paid = [*before, after]
            eventually(lambda: conn.execute(CONFIRMED, (paid,)).fetchone() == (len(paid),), FAILOVER_SECONDS)
            assert violations(conn) == {}
        assert worker.poll() is None


def test_status_without_a_primary_says_so_unless_only_the_standby_is_named(
    servers: ReplicatedServers, silent_host: SilentHost
) -> None:
    address = address_of(servers, silent_host)
    assert "no-primary" not in [finding["id"] for finding in read_status(address)[1]["findings"]]
    servers.primary.halt("immediate")
    code, state = read_status(address)
    assert (code, state["findings"][0]["id"]) == (2, "no-primary")
    _, state = read_status(servers.standby.url)
    assert "no-primary" not in [finding["id"] for finding in state["findings"]]


def test_processes_start_while_the_first_host_never_answers(
    servers: ReplicatedServers, silent_host: SilentHost, tmp_path: Path
) -> None:
    silent_host.fall_silent()
    address = address_of(servers, silent_host)
    with (
        running_sandbox(tmp_path) as sandbox,
        running_server("api", address) as api,
        worker_process(address, sandbox.url),
        merchant_of(servers, api) as merchant,
    ):
        payment_id = pay_until_accepted(merchant, "order-1")
        confirmed = [payment_id]
        eventually(lambda: servers.conn.execute(CONFIRMED, (confirmed,)).fetchone() == (1,), FAILOVER_SECONDS)
