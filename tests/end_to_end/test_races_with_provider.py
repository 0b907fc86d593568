"""A command or an event of the network crosses the provider's answer: before it, after it, and when it was lost.

The worker makes its call and records the result by its own code. The other side has a connection of its own. The first
of the two holds its transaction open until the other waits for it. A lost answer took effect: the worker that polls
records it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from jobs.drain import claim_batch, handle_batch
from jobs.handlers.table import HANDLERS
from jobs.stripe.facts import FactOrigin, dispute_facts, intent_facts
from jobs.worker import Worker
from tests.db.test_races import Two
from tests.support.payments import Connection, add_merchant, command, ledger_of, pay, record, state_of, violations
from tests.support.sandbox_process import SandboxProcess, eventually, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, attempts, due, in_process_worker, run_until_idle, shorten_delays

WEEK = 7 * 86400.0
WEBHOOK = FactOrigin("", False, "webhook")
WAITS = "select cardinality(pg_blocking_pids(%s)) > 0"
WAITED_FOR = "select exists (select from pg_stat_activity where %s = any(pg_blocking_pids(pid)))"
# The provider's money moves when its lines are read, which is no crossing's business.
NOT_THE_PROVIDERS = ("pending", "available", "disputed", "reserved_for_refunds", "fee_revenue")
CHARGED = {"pending": 9625, "fee_revenue": 375}
DISPUTED = {"pending": 9625, "disputed": 6000, "fee_revenue": 1875, "available": -7500}


@dataclass
class RaceScenario:
    """A payment, and where everything about it happens."""

    conn: Connection
    sandbox: SandboxProcess
    key: bytes
    payment_id: str
    intent: str = ""
    problems: list[str | None] = field(default_factory=list)

    def ask(self, connection: Connection, function: str, **asked: Any) -> str:
        """The id of what a command answers; "" if it is refused, and why is kept."""
        outcome = command(connection, function, self.key, payment_id=self.payment_id, **asked)
        self.problems.append(outcome["problem"])
        return str((outcome["body"] or {}).get("id", ""))

    def expire(self) -> None:
        """The hold expires at the provider."""
        self.sandbox.control("clock", {"advance": WEEK})
        eventually(lambda: self.sandbox.read(self.intent)["status"] == "canceled")

    def record_intent(self, connection: Connection) -> None:
        record(connection, intent_facts(self.sandbox.read(self.intent), WEBHOOK))

    def record_dispute(self, connection: Connection) -> None:
        made = self.sandbox.control("disputes", {"payment_intent": self.intent, "amount": 6000})
        record(connection, dispute_facts(self.sandbox.get(f"/v1/disputes/{made['id']}"), WEBHOOK, 0))


End = tuple[list[str | None], str, dict[str, int]]
"""Why the other was refused, the payment's state, the balances that are not the provider's."""


@dataclass(frozen=True)
class Race:
    """A command whose answer is crossed, by what, and where that ends by who is first."""

    handler: str
    function: str
    other: Callable[[RaceScenario, Connection], object]
    answer_first: End
    other_first: End
    amount: int | None = None
    is_expired: bool = False
    before_the_call: End | None = None
    """If the other comes before the call is made, and that makes a difference to the provider."""

    @property
    def operation(self) -> str:
        return "refunds.create" if self.handler == "refund" else f"payment_intents.{self.handler}"

    def end(self, *, is_first: bool, is_lost: bool) -> End:
        """Where it ends, by whether the other is first and the answer lost."""
        if is_first and not is_lost and self.before_the_call:
            return self.before_the_call
        return self.other_first if is_first else self.answer_first


def refunded(amount: int) -> dict[str, int]:
    return CHARGED | {"available": -amount, "reserved_for_refunds": amount}


RACES = {
    "refund × capture": Race(
        "capture",
        "capture_payment",
        lambda scenario, connection: scenario.ask(connection, "create_refund", amount=4000),
        ([None], "partially_refunded", refunded(4000)),
        (["wrong-state"], "confirmed", CHARGED),
    ),
    "cancel × capture": Race(
        "capture",
        "capture_payment",
        lambda scenario, connection: scenario.ask(connection, "cancel_payment"),
        (["wrong-state"], "confirmed", CHARGED),
        (["wrong-state"], "confirmed", CHARGED),
    ),
    "capture × cancel": Race(
        "cancel",
        "cancel_payment",
        lambda scenario, connection: scenario.ask(connection, "capture_payment"),
        (["wrong-state"], "canceled", {}),
        (["wrong-state"], "canceled", {}),
    ),
    "refund × dispute": Race(
        "refund",
        "create_refund",
        RaceScenario.record_dispute,
        ([], "disputed", DISPUTED | {"available": -11500, "reserved_for_refunds": 4000}),
        ([], "disputed", DISPUTED | {"available": -11500, "reserved_for_refunds": 4000}),
        amount=4000,
        before_the_call=([], "disputed", DISPUTED),
    ),
    "refund × refund": Race(
        "refund",
        "create_refund",
        lambda scenario, connection: scenario.ask(connection, "create_refund", amount=6000),
        (["invalid-request"], "partially_refunded", refunded(6000)),
        (["invalid-request"], "partially_refunded", refunded(6000)),
        amount=6000,
    ),
    "capture × expiry": Race(
        "capture",
        "capture_payment",
        RaceScenario.record_intent,
        ([], "canceled", {}),
        ([], "canceled", {}),
        is_expired=True,
    ),
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    folder = tmp_path_factory.mktemp("crossings")
    with running_sandbox(folder, "--hang-seconds=0.1", f"--available-seconds={2 * WEEK}") as sandbox:
        yield sandbox


async def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline, "neither side waits or ends"
        await asyncio.sleep(0.002)


async def cross(
    conn: Connection, two: Two, worker: Worker, handler: str, other: Callable[[Connection], object], *, is_first: bool
) -> None:
    """Run the worker's handler and the other side, each in a transaction that meets the other's.

    The batch is the last lock of the worker's: held up there, it has recorded everything and not committed.
    """
    batch = await claim_batch(worker, handler)
    assert batch is not None
    connection, gate = two

    def is_so(query: str, about: Connection) -> bool:
        return conn.execute(query.encode(), (about.info.backend_pid,)).fetchone() == (True,)

    if is_first:
        other(connection)
        handling = asyncio.create_task(handle_batch(worker, batch, HANDLERS[handler]))
        await until(lambda: is_so(WAITED_FOR, connection))
    else:
        gate.execute("select from outbox.batches where id = %s for update", (batch.batch_id,))
        handling = asyncio.create_task(handle_batch(worker, batch, HANDLERS[handler]))
        await until(lambda: is_so(WAITED_FOR, gate))
        crossing = asyncio.create_task(asyncio.to_thread(other, connection))
        await until(lambda: is_so(WAITS, connection))
        gate.commit()
        await crossing
    connection.commit()
    await handling


@pytest.mark.parametrize("is_lost", [False, True], ids=["answer arrives", "answer lost"])
@pytest.mark.parametrize("is_first", [False, True], ids=["answer first", "other first"])
@pytest.mark.parametrize("name", RACES)
async def test_event_that_races_with_a_response_ends_as_if_serialized(
    conn: Connection, database: str, two: Two, sandbox: SandboxProcess, name: str, is_first: bool, is_lost: bool
) -> None:
    crossing = RACES[name]
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key = add_merchant(conn)
    method = "automatic" if crossing.handler == "refund" else "manual"
    [payment_id] = pay(conn, key, capture_method=method)
    scenario = RaceScenario(conn, sandbox, key, payment_id)
    async with in_process_worker(database, sandbox.url) as worker:
        await run_until_idle(worker)
        [(scenario.intent,)] = conn.execute("select provider_id from surety.payments").fetchall()
        asked = scenario.ask(conn, crossing.function, amount=crossing.amount)
        if crossing.is_expired:
            scenario.expire()
        if is_lost:
            sandbox.order(crossing.operation, "timeout_after", match=asked)
            await run_until_idle(worker, crossing.handler)
            assert len(attempts(conn)) == 1
            due(conn)
        await cross(
            conn,
            two,
            worker,
            crossing.handler,
            lambda connection: crossing.other(scenario, connection),
            is_first=is_first,
        )
        await run_until_idle(worker)
    problems, state, balances = crossing.end(is_first=is_first, is_lost=is_lost)
    assert scenario.problems == [None, *problems]
    assert state_of(conn, payment_id) == state
    assert {kind: total for kind, total in ledger_of(conn).items() if kind in NOT_THE_PROVIDERS} == balances
    charges, refunds = (
        sandbox.control(f"{what}/summary?metadata_key=surety_payment") for what in ("charges", "refunds")
    )
    assert (charges["double"], refunds["double"]) == ([], [])
    assert attempts(conn) == []
    assert violations(conn) == {}
