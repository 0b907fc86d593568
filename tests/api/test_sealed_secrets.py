"""Client secrets with real processes: API, workers, sandbox. The payer's page acts by the secret as Stripe.js does."""

from __future__ import annotations

import re
import signal
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import httpx
import psycopg
import pytest

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.support.http_client import Connection, Merchant, ServerProcess, problem, running_server
from tests.support.payments import fact, record
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import shorten_delays, wait_for_worker, worker_process

CARD = {"type": "card", "token": "pm_card_threeDSecure2Required"}


class SecretScenario:
    """An API, a sandbox, a merchant with a connected account; workers come and go."""

    def __init__(self, conn: Connection, database: str, sandbox: SandboxProcess, api: ServerProcess) -> None:
        self.conn, self.database, self.sandbox, self.api = conn, database, sandbox, api
        self.merchant = Merchant(conn, api.url, account="acct_1SuretyBooks")

    def worker(self, name: str = "w", *, stderr: IO[bytes] | None = None) -> ExitStack:
        """A worker at work."""
        stack = ExitStack()
        stack.enter_context(
            worker_process(
                self.database, self.sandbox.url, name, SURETY_PROVIDER_TIMEOUT="2", SURETY_POLL_SECONDS="3600",
                stderr=stderr,
            )
        )  # fmt: skip
        return stack

    def pay(self) -> str:
        """A payment whose payer must act by script."""
        made = self.merchant.pay(payment_method=CARD, authentication="script", return_url=None)
        assert made["authentication"] == "script"
        self.wait_for(made["id"], "requires_action")
        return str(made["id"])

    def wait_for(self, payment: str, state: str) -> None:
        eventually(lambda: self.merchant.get(f"/v1/payments/{payment}")["state"] == state, 30)

    def ask(self, payment: str, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.merchant.client.post(f"/v1/payments/{payment}/client_secret", headers=headers)

    def is_asked(self) -> bool:
        """Whether a request waits for a worker."""
        return bool(self.conn.execute("select from surety.client_secret_requests where sealed is null").fetchall())


@contextmanager
def running_secrets(server: str, folder: Path) -> Generator[SecretScenario]:
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database(server, "surety_test"))
        deploy(database)
        conn = stack.enter_context(psycopg.connect(harden(database, "deploy"), autocommit=True))
        shorten_delays(conn)
        api = stack.enter_context(running_server("api", database))
        webhooks = stack.enter_context(running_server("webhooks", database))
        result = (f"--webhook-url={webhooks.url}/stripe", "--webhook-secret=whsec_new", "--hang-seconds=5")
        sandbox = stack.enter_context(running_sandbox(folder, *result))
        running = SecretScenario(conn, database, sandbox, api)
        stack.enter_context(running.merchant.client)
        yield running


@pytest.fixture(scope="module")
def scenario(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecretScenario]:
    with running_secrets(server, tmp_path_factory.mktemp("secrets")) as running:
        yield running


def test_payer_acts_by_the_secret_and_the_payment_succeeds(scenario: SecretScenario) -> None:
    with scenario.worker():
        payment = scenario.pay()
        shown = scenario.merchant.get(f"/v1/payments/{payment}")
        assert shown["next_action"] == {"type": "script"}
        answer = scenario.ask(payment)
        assert answer.status_code == 200, answer.text
        assert answer.headers["cache-control"] == "no-store"
        secret = answer.json()
        assert secret == {
            "object": "client_secret",
            "payment": payment,
            "client_secret": secret["client_secret"],
            "provider_account": "acct_1SuretyBooks",
        }
        assert secret["client_secret"].startswith(shown["provider"]["id"] + "_secret_")
        assert scenario.ask(payment).json() == secret
        account = secret["provider_account"]
        acted = scenario.sandbox.answer_by_script(secret["client_secret"], "approve", account=account)
        assert acted["status"] == "succeeded"
        # Before the webhook was applied, the provider says it; after it, the payment's state does.
        problem(scenario.ask(payment), 409, "wrong-state")
        eventually(lambda: scenario.merchant.get(f"/v1/payments/{payment}")["status"] == "succeeded", 30)
    assert scenario.conn.execute("select count(*) from surety.client_secret_requests").fetchone() == (0,)


def test_secret_of_a_payment_that_has_ended_at_the_provider_is_not_given(scenario: SecretScenario) -> None:
    with scenario.worker():
        payment = scenario.pay()
        intent = scenario.merchant.get(f"/v1/payments/{payment}")["provider"]["id"]
        # The state here is kept: events are not delivered in time.
        scenario.conn.execute("update outbox.handlers set paused_at = now() where handler = 'apply_webhooks'")
        scenario.sandbox.post(f"/v1/payment_intents/{intent}/cancel", key=payment, account="acct_1SuretyBooks")
        document = problem(scenario.ask(payment), 409, "wrong-state")
        assert document["state"] == "requires_action"
        scenario.conn.execute("update outbox.handlers set paused_at = null where handler = 'apply_webhooks'")


def test_without_a_worker_the_merchant_asks_again(scenario: SecretScenario) -> None:
    with scenario.worker():
        payment = scenario.pay()
    answer = scenario.ask(payment)
    problem(answer, 503, "provider-unavailable")
    assert answer.headers["retry-after"] == "1"
    # Its event is still there, and its request is not.
    with scenario.worker("later"):
        scenario.pay()
        assert scenario.ask(payment).status_code == 200


def test_payment_that_ends_while_its_request_waits_gives_no_secret(scenario: SecretScenario) -> None:
    with scenario.worker():
        payment = scenario.pay()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(scenario.ask, payment)
        eventually(scenario.is_asked)
        [(intent,)] = scenario.conn.execute(
            "select provider_id from surety.payments where id = %s", (payment,)
        ).fetchall()
        ended = fact(payment, "canceled", intent, account="acct_1SuretyBooks") | {"object_id": intent}
        record(scenario.conn, [ended])
        assert problem(asked.result(), 409, "wrong-state")["state"] == "canceled"


def test_request_survives_a_worker_that_is_killed(scenario: SecretScenario) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        killed = stack.enter_context(
            worker_process(
                scenario.database, scenario.sandbox.url, "killed", SURETY_PROVIDER_TIMEOUT="30",
                SURETY_POLL_SECONDS="3600",
            )
        )  # fmt: skip
        payment = scenario.pay()
        scenario.sandbox.order("payment_intents.retrieve", "timeout_after")
        asked = pool.submit(scenario.ask, payment)
        held = "select from outbox.batches where handler = 'seal_secret' and leased_by = 'killed'"
        eventually(lambda: scenario.conn.execute(held).fetchall(), 20)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        stack.enter_context(scenario.worker("second"))
        answer = asked.result()
        # The lease may end after the request's patience; the merchant's repetition is answered in any case.
        assert answer.status_code in (200, 503), answer.text
        scenario.pay()
        assert scenario.ask(payment).status_code == 200
        eventually(lambda: not scenario.conn.execute("select from outbox.batches").fetchall(), 20)
    assert scenario.conn.execute("select from outbox.dead_letters").fetchall() == []


def test_two_workers_answer_each_request_once(scenario: SecretScenario) -> None:
    with scenario.worker("one"), scenario.worker("two"):
        wait_for_worker(scenario.conn, 2)
        payments = [scenario.pay() for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(scenario.ask, payments))
        assert [answer.status_code for answer in answers] == [200] * 6
        for payment, answer in zip(payments, answers, strict=True):
            intent = scenario.merchant.get(f"/v1/payments/{payment}")["provider"]["id"]
            assert answer.json()["client_secret"].startswith(f"{intent}_secret_")


def test_secret_is_in_no_table_no_log_and_not_in_the_write_ahead_log(tmp_path: Path) -> None:
    settings = {"log_min_duration_statement": "0", "log_parameter_max_length": "-1", "log_statement": "all"}
    with (
        EmbeddedServer(settings=settings) as server,
        (tmp_path / "worker.log").open("wb") as log,
        running_secrets(server.url, tmp_path) as scenario,
    ):
        with scenario.worker(stderr=log):
            payment = scenario.pay()
            answers = [scenario.ask(payment) for _ in range(2)]
            problem(scenario.ask(payment, scenario.merchant.another_key(scopes=["read"])), 403, "scope-missing")
            secret = answers[0].json()["client_secret"]
            queries = scenario.conn.execute("select query from pg_stat_activity").fetchall()
            trace = scenario.merchant.client.get(f"/v1/payments/{payment}/trace").text
        # What a process would still hold in memory is written.
        scenario.conn.execute("checkpoint")
        needle, hidden = secret.encode(), secret.partition("_secret_")[2].encode()
        assert len(hidden) > 8
        assert server.folder is not None
        files = [path for path in server.folder.rglob("*") if path.is_file()]
        assert any(path.parent.name == "pg_wal" for path in files)
        assert [path for path in files if hidden in path.read_bytes()] == []
        # The search finds a text that is there.
        assert [path.parent.name for path in files if b"client_secret_requested" in path.read_bytes()] != []
        assert (tmp_path / "worker.log").read_bytes().find(hidden) == -1
        assert hidden.decode() not in trace + str(queries)
        assert re.search(r"POST /v1/payments/\{id\}/client_secret", trace)
        status, said = scenario.api.stop()
        assert (status, needle.decode() in said) == (0, False)
