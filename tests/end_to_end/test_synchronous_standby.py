"""A synchronous standby lost while requests are answered: an answer is given only when the standby has what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, LiteralString

import pytest

from app.status_findings import find_problems
from db.deploy.deploy import deploy
from db.embedded.server import EmbeddedServer
from tests.cli.test_status import read_status, surety
from tests.support.dead_letters import exhaust_retries, open_dead_letter
from tests.support.http_client import Merchant, connect_as_owner, payment, running_server
from tests.support.payments import Connection, add_merchant, fact, pay, record, request
from tests.support.sandbox_process import eventually
from tests.support.standby import ReplicatedServers, replicated_servers

Call = tuple[LiteralString, tuple[Any, ...]]


@pytest.fixture
def servers() -> Iterator[ReplicatedServers]:
    with EmbeddedServer(durable=True) as primary:
        deploy(primary.url)
        with replicated_servers(primary) as servers:
            yield servers


@pytest.mark.parametrize("end_session", ["pg_terminate_backend", "pg_cancel_backend"])
def test_repeated_payment_waits_for_the_standby_as_its_first_request_did(
    servers: ReplicatedServers, end_session: str
) -> None:
    with running_server("api", servers.primary.url) as api, ThreadPoolExecutor() as pool:
        merchant = Merchant(servers.conn, api.url)
        with merchant.client:
            with servers.without_standby():
                first = pool.submit(merchant.post, payment(), key="order-1")
                [session] = eventually(servers.waiting_sessions)
                servers.conn.execute(f"select {end_session}(%s)".encode(), (session,))
                # The API repeats the request itself.
                eventually(lambda: first.done() or {*servers.waiting_sessions()} - {session}, 10)
                assert not first.done()
                second = pool.submit(merchant.post, payment(), key="order-1")
                eventually(lambda: second.done() or len(servers.waiting_sessions()) == 2, 10)
                assert not first.done()
                assert not second.done(), (second.result().status_code, second.result().text)
            answers = [first.result(), second.result()]
        assert [answer.status_code for answer in answers] == [201, 201]
        [payment_id] = {answer.json()["id"] for answer in answers}
        servers.fail_over()
    with connect_as_owner(servers.standby.url) as conn:
        assert conn.execute("select id from surety.payments").fetchall() == [(payment_id,)]


def test_every_answer_that_repeats_an_earlier_one_waits_for_the_standby(servers: ReplicatedServers) -> None:
    calls = repeatable_calls(servers.conn)
    for statement, values in calls.values():
        servers.conn.execute(statement, values)

    def repeat(statement: LiteralString, values: tuple[Any, ...]) -> list[Any]:
        with connect_as_owner(servers.primary.url) as conn:
            return conn.execute(statement, values).fetchall()

    with ThreadPoolExecutor(len(calls)) as pool, servers.without_standby():
        repeated = {name: pool.submit(repeat, *call) for name, call in calls.items()}
        eventually(lambda: len(servers.waiting_sessions()) + len(ended(repeated)) == len(calls), 20)
        assert ended(repeated) == []


def test_status_reports_commits_that_wait_and_ends_none_of_them(servers: ReplicatedServers) -> None:
    _, key_hash = add_merchant(servers.conn)
    servers.conn.execute("insert into procrastinate.procrastinate_workers values (default, now() - interval '1 hour')")
    _, present = read_status(servers.primary.url)
    assert present["replication"]["present"] == present["replication"]["needed"] == 1
    assert "standby_1, 1 of 1 present" in surety(servers.primary.url, "status").stdout
    by_standby = surety(servers.standby.url, "status", "--check")
    assert "this is a standby; its last commit is " in by_standby.stdout, by_standby
    assert "commits wait" not in by_standby.stdout
    checked = json.loads(surety(servers.standby.url, "status", "--check", "--json").stdout)
    assert len(checked["invariants"]) > 10 and not [found for found in checked["invariants"] if found["violations"]]

    def pay_later() -> list[str]:
        with connect_as_owner(servers.primary.url) as conn:
            return pay(conn, key_hash)

    with ThreadPoolExecutor() as pool, servers.without_standby():
        paying = pool.submit(pay_later)
        eventually(lambda: not servers.is_synchronous() and servers.waiting_sessions())
        code, state = read_status(servers.primary.url)
        assert code == 2
        first, *others = state["findings"]
        assert first["id"] == "commits-wait-for-standby"
        assert first["what"].startswith("commits wait for the standby: 0 of 1 present, 1 commit for ")
        assert "no-worker" not in [finding["id"] for finding in others], "heartbeats wait as well"
        [waiting] = [holder for holder in state["holders"] if holder["kind"] == "commit"]
        long_open = waiting | {"seconds": 1000.0}
        findings = find_problems(state | {"holders": [long_open, long_open | {"kind": "transaction"}]})
        assert "old-transaction" in [finding.id for finding in findings]
        assert not [finding for finding in findings if "terminate" in finding.next]
    assert len(paying.result()) == 1
    servers.fail_over()
    _, state = read_status(servers.standby.url)
    [finding] = [finding for finding in state["findings"] if finding["id"] == "no-worker"]
    assert finding["what"].startswith("the database took over ") and finding["urgency"] == 1


def test_replay_writes_nothing_without_a_synchronous_standby(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    again = json.dumps([request(key_hash)])
    for statement in ("select * from api.create_payments(%s)",) * 2:
        with conn.transaction():
            conn.execute(statement, (again,))
            assigned = conn.execute("select pg_current_xact_id_if_assigned() is not null").fetchone()
    assert assigned == (False,)


def repeatable_calls(conn: Connection) -> dict[str, Call]:
    """Calls whose repetition has no effect, by a name."""
    merchant_id, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    [discarded] = pay(conn, key_hash)
    exhaust_retries(conn, "submit")
    letters = open_dead_letter(conn, payment_id), open_dead_letter(conn, discarded)
    [canceled] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency="eur")])
    [(discrepancy,)] = conn.execute("select id from surety.discrepancies limit 1").fetchall()
    [(key_id,)] = conn.execute("select surety.add_api_key(%s, sha256('1'), 'x')", (merchant_id,)).fetchall()
    conn.execute("select surety.add_operator('alice', 'alice@example.com', 'admin', sha256('2'), 'x')")
    [(operator_key,)] = conn.execute("select id from surety.operator_keys").fetchall()
    cancellation = request(key_hash, payment_id=canceled) | {"address": "127.0.0.1"}
    webhook = {"n": 0, "provider": "stripe", "account": "", "livemode": False, "event_id": "evt_1", "type": "charge"}
    return {
        "payment": ("select from api.create_payments(%s)", (json.dumps([request(key_hash)]),)),
        "command": ("select api.cancel_payment(%s)", (json.dumps(cancellation),)),
        "cursor of events": ("select from api.list_events(%s, null, 100)", (key_hash,)),
        "webhook": (
            "select from surety.receive_webhooks(%s)",
            (json.dumps([webhook | {"headers": {"stripe-signature": "v1"}, "body": "{}", "address": "127.0.0.1"}]),),
        ),
        "replay": ("select from outbox.replay_dead_letter(%s, 'operator:a', 'why')", letters[:1]),
        "discard": ("select from outbox.discard_dead_letter(%s, 'operator:a', 'why')", letters[1:]),
        "key": ("select surety.revoke_api_key(%s)", (key_id,)),
        "operator's key": ("select surety.revoke_operator_key(%s)", (operator_key,)),
        "operator": ("select surety.set_operator('alice', null, null, false)", ()),
        "merchant": ("select surety.suspend_merchant(%s, true)", (add_merchant(conn)[0],)),
        "handler": ("select outbox.set_handler_paused('submit', true, 'why')", ()),
        "discrepancy": (
            "select surety.resolve_discrepancy(%s, 'explained', 'why', 'operator:a')",
            (discrepancy,),
        ),
    }


def ended(calls: dict[str, Future[Any]]) -> list[str]:
    """The names of the calls that were answered."""
    return [name for name, call in calls.items() if call.done()]
