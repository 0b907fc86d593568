"""The loop for calls to the provider: what a verdict of surety.begin_calls leads to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.payments import Connection, add_merchant, create, request
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import attempts, in_process_worker, run_until_idle


@pytest.fixture
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("calls")) as sandbox:
        yield sandbox


async def test_unknown_verdict_sends_nothing(conn: Connection, database: str, sandbox: SandboxProcess) -> None:
    [(source,)] = conn.execute("select pg_get_functiondef('surety.plan_payment_calls'::regproc)").fetchall()
    assert "then 'send'" in source
    conn.execute(source.replace("then 'send'", "then 'guess'").encode())
    create(conn, [request(add_merchant(conn)[1])])
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker, "submit")
    assert sandbox.get("/v1/payment_intents")["data"] == []
    [(handler, failures, [error])] = attempts(conn)
    assert (handler, failures) == ("submit", 1)
    assert "guess" in error
