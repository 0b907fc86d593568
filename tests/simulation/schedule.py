"""One schedule: what it is made of, who is next, and what goes wrong. How it begins is in beginning.py, how it
heals in healing.py.

Each decision is drawn from one stream of chance, each kind of fault from a stream of its own: so the same seed gives
the same schedule, and leaving a kind of fault out, or stopping earlier, leaves the rest as like it as can be.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from typing import Any

import psycopg
from msgspec import Struct

from app.sandbox.faults import REQUEST_FAULTS
from tests.simulation.clients import WantedPayment, request_until_answered, send_command
from tests.simulation.database import SimulatedDatabase
from tests.simulation.initial_state import add_merchants, advance_some_payments, draw_wanted_payments
from tests.simulation.invariants import ONLY_AT_THE_END, check, check_database_invariants
from tests.simulation.locks import Locks
from tests.simulation.loop import PROCESS, Killed, Loop, Process
from tests.simulation.processes import ROUNDS, ListeningProcess, WorkerProcess, deliver
from tests.simulation.provider import HTTP_CLIENT, SimulatedProvider
from tests.simulation.recovery import FEW, heal

# How often each fault may come where it can, when a schedule has drawn it: seldom or often.
RATES: dict[str, tuple[float, float]] = {
    "cut_before": (0.01, 0.05),
    "cut_open": (0.01, 0.05),
    "cut_after": (0.01, 0.05),
    **dict.fromkeys(REQUEST_FAULTS, (0.05, 0.3)),
    "reads": (0.1, 0.5),
    "other_amount": (0.1, 0.5),
    "misread_amount": (0.1, 0.3),
    "webhook_lost": (0.1, 1.0),
    "webhook_repeated": (0.1, 0.5),
    "webhook_delayed": (0.1, 0.5),
    "worker_killed": (0.02, 0.1),
    "worker_stopped": (0.01, 0.05),
    "api_killed": (0.01, 0.05),
    "stalled": (0.1, 0.6),
    "deploy": (0.01, 0.05),
    "outage": (0.2, 1.0),
}
LEAPS = (0.05, 1.5, 6.0, 21.0, 61.0, 200.0, 3700.0, 90_000.0)
JOBS_MAX = 4
BOOTED_SECONDS = 1000.0


class SchedulePlan(Struct, frozen=True, kw_only=True):
    """What a schedule is drawn from. Fewer of anything makes it smaller."""

    seed: int
    steps: int = 80
    payments: int = 3
    workers: int = 2
    lanes: int = 3
    without: frozenset[str] = frozenset()

    def command(self) -> str:
        """What repeats it."""
        words = ["python -m tests.simulation --schedules 1", f"--seed {self.seed}"]
        usual = SchedulePlan(seed=self.seed)
        sizes = ("steps", "payments", "workers", "lanes")
        words += [f"--{name} {getattr(self, name)}" for name in sizes if getattr(self, name) != getattr(usual, name)]
        if self.without:
            words.append(f"--without {','.join(sorted(self.without))}")
        return " ".join(words)


class Outcome(Struct):
    """What came of a schedule."""

    plan: SchedulePlan
    steps: int
    faults: dict[str, int]
    violations: dict[str, str]
    """By invariant, an example."""
    digest: str
    """Of everything that was decided, and of where it all ended."""


class Turn:
    """Somebody who would go on."""

    __slots__ = ("doing", "future", "process")

    def __init__(self, process: Process, doing: str, future: asyncio.Future[None]) -> None:
        self.process = process
        self.doing = doing
        self.future = future


class Schedule:
    """One schedule under way."""

    def __init__(self, plan: SchedulePlan, database: SimulatedDatabase, *, tell: bool = False) -> None:
        self.plan = plan
        self.database = database
        self.loop = Loop(self.decide)
        self.chance = random.Random(f"{plan.seed}:order")
        self._fault_streams = {kind: random.Random(f"{plan.seed}:{kind}") for kind in RATES}
        self.rates = {
            kind: self._fault_streams[kind].choice((0.0, 0.0, seldom, often)) for kind, (seldom, often) in RATES.items()
        }
        self.openness = self.chance.choice((0.2, 0.5, 0.8))
        self.poison_position = self.chance.randrange(8) if self.chance.random() < 0.25 else None
        self.poison: str | None = None
        self.handled_events: dict[str, None] = {}
        self.steps = 0
        self.faults: Counter[str] = Counter()
        self.violations: dict[str, str] = {}
        self.turns: list[Turn] = []
        self.api: ListeningProcess
        self.locks = Locks(self)
        self.is_calm = False
        self.kicked: dict[str, None] = {}
        self._tell = tell
        self._digest = hashlib.sha256()
        self.epoch_seconds = 0.0

    # What goes on, and what goes wrong

    async def turn(self, process: Process, doing: str) -> None:
        """Wait until it is decided that this process goes on."""
        if process.is_dead:
            raise Killed
        if self.is_calm:
            return
        turn = Turn(process, doing, self.loop.create_future())
        self.turns.append(turn)
        try:
            await turn.future
        finally:
            if turn in self.turns:
                self.turns.remove(turn)
        # Somebody else's task, for whom it did something, goes on without it.
        if process.is_dead:
            raise Killed

    def draw_fault(self, kind: str, where: str = "") -> bool:
        """Whether this goes wrong here."""
        drawn = self._fault_streams[kind].random() < self.rates[kind]
        if not drawn or self.is_calm or kind in self.plan.without:
            return False
        self.faults[f"{kind} {where}".strip()] += 1
        self.note("fault", kind, where)
        return True

    def keeps_transaction_open(self) -> bool:
        """Whether a transaction stays open while others go on."""
        return not self.is_calm and self.chance.random() < self.openness

    def note(self, *what: str) -> None:
        """Remember a decision."""
        line = " ".join(what)
        self._digest.update(line.encode() + b"\n")
        if self._tell:
            print(f"{self.steps:4} {self.loop.seconds:12.3f}  {line}", flush=True)

    def report_violation(self, invariant: str, example: str) -> None:
        """A invariant was broken."""
        self.note("violated", invariant, example if self._tell else "")
        self.violations.setdefault(invariant, example)

    def wake(self, *handlers: str) -> None:
        """Somebody says that there is work."""
        self.kicked.update(dict.fromkeys(handlers))

    def on_statement(self, doing: str, params: Any) -> None:
        """Who was woken is drained soon."""
        if doing == "outbox.schedule_handlers" and params:
            self.wake(*params[0])

    def note_handled(self, process: Process, event_ids: list[str]) -> None:
        """One event in some schedules is poison: it kills each worker that handles it."""
        self.handled_events.update(dict.fromkeys(event_ids))
        if self.poison is None and self.poison_position is not None and len(self.handled_events) > self.poison_position:
            self.poison = list(self.handled_events)[self.poison_position]
        if self.poison in event_ids:
            self.note(process.name, "dies of poison")
            self.replace_worker(process)
            self.end(process)
            raise Killed

    def end(self, process: Process) -> None:
        """A process dies; the server notices that its connections are gone."""
        process.kill()
        self.provider.process.start(self.roll_back_dead(process))

    async def roll_back_dead(self, process: Process) -> None:
        """Roll back what a dead process has left open."""
        if left := [task for task in process.tasks if task is not asyncio.current_task()]:
            await asyncio.wait(left)
        self.database.release_all(process)

    def replace_worker(self, process: Process) -> None:
        """Whoever looks after the processes starts another one."""
        for number, worker in enumerate(self.workers):
            if worker is process:
                self.workers[number] = WorkerProcess(self, f"{worker.name}'")

    def on_error(self, doing: str, error: psycopg.Error) -> None:
        """The product's statements are never refused."""
        if error.sqlstate is not None:
            self.report_violation("no statement fails", f"{doing}: {error.sqlstate} {str(error)[:300]}")

    # Decisions

    def decide(self) -> None:
        """What happens next. Called when everybody waits for something."""
        if self.is_calm:
            self.advance_until_quiet()
            return
        self.steps += 1
        if self.steps > self.plan.steps:
            self.is_calm = True
            for turn in self.turns:
                if not turn.future.done():
                    turn.future.set_result(None)
            self.enough.set_result(None)
            return
        timer = self.loop.next_timer()
        soon = timer is not None and timer - self.loop.seconds < 1
        going = [worker for worker in self.workers if sum(worker.running.values()) < JOBS_MAX]
        ways: list[tuple[float, Any]] = [
            (12.0 if self.turns else 0.0, self.go_on),
            (3.0 if soon else 0.3 if timer is not None else 0.0, self.tick),
            (1.0 if not soon else 0.2, self.jump_in_time),
            (3.0 if going else 0.0, self.start_job),
            (2.0 if self.unasked else 0.0, self.ask),
            (0.5 if len(self.unasked) < len(self.wanted) else 0.0, self.request_again),
            (2.0 if self.provider.mailbox else 0.0, self.post),
            (0.5, self.let_payer_act),
            (1.2, self.send_command),
            (0.6, self.let_third_party_act),
            (0.5, self.inject_process_faults),
            (0.1, self.inspect),
        ]
        [way] = self.chance.choices([way for _, way in ways], [weight for weight, _ in ways])
        way()

    def go_on(self) -> None:
        """One of those who wait for their turn."""
        turn = self.turns.pop(self.chance.randrange(len(self.turns)))
        self.note(turn.process.name, turn.doing)
        turn.future.set_result(None)

    def tick(self) -> None:
        """Time goes on until something is due."""
        timer = self.loop.next_timer()
        assert timer is not None
        self.move_to(max(timer, self.loop.seconds + 0.001))

    def jump_in_time(self) -> None:
        """Time goes on, and the tick finds what is due by then."""
        far = len(LEAPS) if self.poison_position is None and self.draw_fault("stalled") else 3
        self.move_to(self.loop.seconds + self.chance.choice(LEAPS[:far]))
        self.database.move_clock(self.loop.seconds)
        query = "select handler from outbox.handlers where outbox.has_work(handler) order by handler"
        self.wake(*(handler for (handler,) in self.database.rows(query)))

    def move_to(self, seconds: float) -> None:
        """Set the time, for everybody."""
        self.loop.seconds = seconds
        self.note("time")
        self.provider.run_due()

    def start_job(self) -> None:
        """A worker takes a job: one that somebody was woken for, or any."""
        names = list(self.kicked) if self.kicked and self.chance.random() < 0.85 else [*self.database.handlers, *ROUNDS]
        self.begin(self.chance.choice(names))

    def begin(self, name: str) -> None:
        """A worker takes a job of that name."""
        worker = self.chance.choice([one for one in self.workers if sum(one.running.values()) < JOBS_MAX])
        self.kicked.pop(name, None)
        self.note(worker.name, "begins", name)
        if name in self.database.handlers:
            worker.drain(name)
        else:
            worker.round(name)

    def ask(self) -> None:
        """A client asks, perhaps several at once with one key."""
        wanted = self.unasked.pop()
        for _ in range(self.chance.choice((1, 1, 2, 3))):
            self.asking.append(self.clients.start(request_until_answered(self, wanted)))

    def request_again(self) -> None:
        """All clients have lost patience and ask at once."""
        asked = [wanted for wanted in self.wanted if wanted not in self.unasked]
        self.asking.append(self.clients.start(self.request_all_at_once(asked)))

    async def request_all_at_once(self, asked: list[WantedPayment]) -> None:
        """One comes before the others and is served alone; then all come at once, each time in another order."""
        self.asking.append(self.clients.start(request_until_answered(self, self.chance.choice(asked), at_once=True)))
        await self.turn(self.clients, "the crowd comes")
        for _ in range(self.plan.lanes):
            for wanted in self.chance.sample(asked, len(asked)):
                self.asking.append(self.clients.start(request_until_answered(self, wanted, at_once=True)))

    def post(self) -> None:
        """The provider delivers a webhook, any that waits."""
        mailbox = self.provider.mailbox
        self.asking.append(self.provider.process.start(deliver(self, mailbox.pop(self.chance.randrange(len(mailbox))))))

    def let_payer_act(self) -> None:
        """A payer who was asked to act does so, or fails."""
        if self.provider.payer_acts():
            self.note("payer")

    def send_command(self) -> None:
        """A merchant wants something done about a payment of his."""
        send_command(self)

    def let_third_party_act(self) -> None:
        """Somebody else does something about a payment, at the provider."""
        if done := self.provider.third_party_acts():
            self.note(done)

    def inject_process_faults(self) -> None:
        """Processes die, or are replaced; what they call is replaced beside them by a deploy."""
        for worker in list(self.workers):
            # Where one event kills, its neighbours must not owe their deaths to chance.
            if self.poison_position is None and self.draw_fault("worker_killed"):
                self.end(worker)
            elif self.draw_fault("worker_stopped"):
                worker.stop()
            else:
                continue
            self.replace_worker(worker)
        if self.draw_fault("api_killed"):
            self.end(self.api)
            self.api = ListeningProcess(self, f"{self.api.name}'")
            self.asking.append(self.clients.start(self.api.open()))
        if self.draw_fault("deploy") and not self.database.redeploy(self._fault_streams["deploy"]):
            self.note("the deploy gave way")

    def inspect(self) -> None:
        """Somebody looks into the middle of it: what is committed keeps its invariants at any time."""
        self.note("inspection")
        check_database_invariants(self, besides=ONLY_AT_THE_END)

    async def deliver_all(self) -> None:
        """What waits in the mailbox is delivered now."""
        events, self.provider.mailbox = self.provider.mailbox, []
        if delivering := [self.provider.process.start(deliver(self, event_id)) for event_id in events]:
            await asyncio.wait(delivering)

    # A life

    def run(self) -> Outcome:
        """Everything."""
        HTTP_CLIENT.provider = None
        random.seed(self.plan.seed)
        self.database.empty(self.plan.seed)
        self.database.set_batch_size(FEW)
        [(self.epoch_seconds,)] = self.database.rows("select extract(epoch from surety.time_now())::float8")
        PROCESS.set(None)
        asyncio.set_event_loop(self.loop)
        monotonic = time.monotonic
        vars(time)["monotonic"] = lambda: BOOTED_SECONDS + self.loop.seconds
        try:
            self.loop.run_until_complete(self.live())
        finally:
            vars(time)["monotonic"] = monotonic
            self.loop.close()
            asyncio.set_event_loop(None)
            HTTP_CLIENT.provider = None
        for broken in self.loop.broken:
            self.report_violation("no task breaks down", broken)
        return Outcome(self.plan, self.steps, dict(self.faults), self.violations, self._digest.hexdigest()[:16])

    async def live(self) -> None:
        """Trouble, healing, and the reckoning."""
        await self.prepare()
        await self.enough
        await heal(self)
        check(self)

    async def prepare(self) -> None:
        """Everybody in place."""
        self.enough: asyncio.Future[None] = self.loop.create_future()
        self.clients = Process("client")
        self.provider = SimulatedProvider(self)
        HTTP_CLIENT.provider = self.provider
        self.asking: list[asyncio.Task[Any]] = []
        self.merchants, self.keys = add_merchants(self.database)
        # What chance has made of their ids; the rest is the time.
        self.note("shops", *(merchant[-20:] for merchant in self.merchants))
        self.unasked = draw_wanted_payments(self.chance, self.plan.payments)
        self.wanted = list(self.unasked)
        self.workers = [WorkerProcess(self, f"worker-{number}") for number in range(self.plan.workers)]
        self.api = ListeningProcess(self, "api")
        self.is_calm = True
        await self.api.open()
        await advance_some_payments(self)
        self.is_calm = False
        # Trouble comes when all is on its way.
        for name in list(self.kicked)[: JOBS_MAX * self.plan.workers]:
            self.begin(name)

    def advance_until_quiet(self) -> None:
        """Nothing goes wrong any more; only time may have to go on."""
        if self.locks.waiting:
            self.locks.resume_granted()
            return
        timer = self.loop.next_timer()
        assert timer is not None, "everybody waits for nothing"
        self.loop.seconds = max(timer, self.loop.seconds)
        self.provider.run_due()
