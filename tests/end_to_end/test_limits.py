"""Money limits and holds over real sockets: two API processes share a limit; a payment on hold, from request to end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest

from app.api.schemas.holds import HeldPayment, HeldPaymentList, HoldDecisionResult
from app.api.schemas.payments import Payment
from tests.support.http_client import CONTEXT, Connection, Merchant, assert_matches, payment, problem, running_server
from tests.support.operators import add_operator
from tests.support.payments import path_of, violations
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import in_process_worker, run_until_idle

LIMIT = 37
REQUESTS = 30
HOLDS = "/v1/operator/holds"
ADA = {"customer": {"email": "ada@example.com"}}


@pytest.fixture
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("limits")) as sandbox:
        yield sandbox


async def submit_and_confirm(database: str, sandbox: SandboxProcess) -> None:
    """Handle all waiting events of both handlers."""
    async with in_process_worker(database, sandbox.url) as worker:
        for handler in ("submit", "confirm"):
            await run_until_idle(worker, handler)


def test_two_api_processes_accept_exactly_the_limit(database: str, conn: Connection) -> None:
    with running_server("api", database) as one, running_server("api", database) as other:
        merchants = [Merchant(conn, one.url)]
        conn.execute("select surety.set_money_limit(%s, 'usd', %s, null, 'test')", (merchants[0].id, LIMIT))
        statuses: list[int] = []

        def request_all(url: str) -> None:
            headers = {"Authorization": f"Bearer {merchants[0].key}"}
            with httpx.Client(base_url=url, headers=headers, verify=CONTEXT, timeout=30) as client:
                for number in range(REQUESTS):
                    sent = {"Idempotency-Key": f"{threading.get_ident()}-{number}"}
                    statuses.append(client.post("/v1/payments", json=payment(), headers=sent).status_code)

        threads = [threading.Thread(target=request_all, args=(api.url,)) for api in (one, other, one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (statuses.count(201), statuses.count(403)) == (LIMIT, 4 * REQUESTS - LIMIT)
        problem(merchants[0].post(), 403, "limit-exceeded")
        merchants[0].client.close()
    assert conn.execute("select count(*) from surety.payments").fetchone() == (LIMIT,)
    assert not violations(conn)


def test_payments_on_hold_are_released_and_refused_by_an_operator(
    database: str, conn: Connection, sandbox: SandboxProcess
) -> None:
    conn.execute("select surety.add_velocity_rule(null, 'email', '1 hour', 0, null, null, 'hold', 'test')")
    support = {"Authorization": f"Bearer {add_operator(conn, 'sam', 'support')}"}
    finance = {"Authorization": f"Bearer {add_operator(conn, 'fay', 'finance')}"}
    with running_server("api", database) as api:
        merchant = Merchant(conn, api.url)
        first, second = (merchant.pay(**ADA) for _ in range(2))
        assert_matches(first, Payment)
        assert (first["status"], first["hold"]["status"]) == ("pending", "open")
        asyncio.run(submit_and_confirm(database, sandbox))
        assert path_of(conn, first["id"]) == ["initiated"]
        with httpx.Client(base_url=api.url, verify=CONTEXT, timeout=30) as operator:
            listed = operator.get(HOLDS, headers=support).json()
            assert_matches(listed, HeldPaymentList)
            assert [each["id"] for each in listed["data"]] == [first["id"], second["id"]]
            assert_matches(operator.get(f"{HOLDS}/{first['id']}", headers=support).json(), HeldPayment)
            reason = {"reason": "the payer is known"}
            problem(operator.post(f"{HOLDS}/{first['id']}/release", json=reason, headers=support), 403, "scope-missing")
            released = operator.post(f"{HOLDS}/{first['id']}/release", json=reason, headers=finance).json()
            assert_matches(released, HoldDecisionResult)
            again = operator.post(f"{HOLDS}/{first['id']}/release", json=reason, headers=finance).json()
            assert (released["outcome"], again["outcome"]) == ("released", "unchanged")
            problem(operator.post(f"{HOLDS}/{first['id']}/refuse", json=reason, headers=finance), 409, "wrong-state")
            refused = operator.post(f"{HOLDS}/{second['id']}/refuse", json=reason, headers=finance).json()
            assert refused["outcome"] == "refused"
            problem(operator.post(f"{HOLDS}/pay_{'0' * 24}/refuse", json=reason, headers=finance), 404, "not-found")
        asyncio.run(submit_and_confirm(database, sandbox))
        assert path_of(conn, first["id"])[:3] == ["initiated", "submitting", "provider_submitted"]
        ended = merchant.client.get(f"/v1/payments/{second['id']}").json()
        seen = ended["status"], ended["failure"]["code"], ended["hold"]["status"]
        assert seen == ("failed", "hold_refused", "refused")
        events = merchant.client.get("/v1/events", params={"object": first["id"]}).json()["data"]
        types = [event["type"].removeprefix("payment.") for event in events[:4]]
        assert (set(types[:2]), types[2:]) == ({"initiated", "held"}, ["released", "submitting"])
        merchant.client.close()
    assert conn.execute("select sends from surety.calls where operation = 'create'").fetchall() == [(1,)]
    assert not violations(conn)
