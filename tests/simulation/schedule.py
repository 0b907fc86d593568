"""One schedule: its parts, its decisions and its faults. It begins in initial_state.py and ends in recovery.py.

Decisions are drawn from one random stream, each kind of fault from one of its own: a seed always gives the same
schedule, and leaving out a kind of fault, or stopping earlier, changes the rest as little as possible.
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

from app.sandbox.faults import PASSING_FAULTS
from tests.simulation.clients import WantedPayment, request_until_answered, send_command
from tests.simulation.customers import act_on_customer, add_customers
from tests.simulation.database import SimulatedDatabase
from tests.simulation.erasures import erase_someone, has_erasures
from tests.simulation.initial_state import add_merchants, advance_some_payments, draw_wanted_payments
from tests.simulation.invariants import ONLY_AT_THE_END, check, check_database_invariants
from tests.simulation.limits import add_limits, decide_some_hold
from tests.simulation.locks import Locks
from tests.simulation.loop import PROCESS, Killed, Loop, Process
from tests.simulation.months import let_months_pass
from tests.simulation.processes import PERIODIC_JOB_NAMES, ListeningProcess, WorkerProcess, deliver
from tests.simulation.provider import SENDER, SimulatedProvider
from tests.simulation.recovery import FEW, recover

# The probability of each fault where it can occur, in schedules that have it seldom or often.
RATES: dict[str, tuple[float, float]] = {
    "cut_before": (0.01, 0.05),
    "cut_open": (0.01, 0.05),
    "cut_after": (0.01, 0.05),
    **dict.fromkeys(PASSING_FAULTS, (0.05, 0.3)),
    "refused_400": (0.02, 0.1),
    "reads": (0.1, 0.5),
    "other_amount": (0.1, 0.5),
    "misread_amount": (0.1, 0.3),
    "webhook_lost": (0.1, 1.0),
    **dict.fromkeys(("webhook_repeated", "webhook_delayed", "webhook_changed"), (0.1, 0.5)),
    "worker_killed": (0.02, 0.1),
    "worker_stopped": (0.01, 0.05),
    "api_killed": (0.01, 0.05),
    "stalled": (0.1, 0.6),
    "deploy": (0.03, 0.15),
    "outage": (0.2, 1.0),
    "access_refused": (0.2, 1.0),
}
LEAPS = (0.05, 1.5, 6.0, 21.0, 61.0, 200.0, 3700.0, 90_000.0)
JOBS_MAX = 4
BOOTED_SECONDS = 1000.0
SIZE_OPTIONS = {
    "steps": "--steps",
    "payments": "--payments",
    "workers": "--workers",
    "batching_connections": "--lanes",
    "days": "--days",
}
"""Fields of SchedulePlan and the command line's options for them."""


class SchedulePlan(Struct, frozen=True, kw_only=True):
    """The parameters of a schedule. Smaller numbers make a smaller schedule."""

    seed: int
    steps: int = 80
    payments: int = 3
    workers: int = 2
    batching_connections: int = 3
    days: int = 0
    """How many days pass between the faults and the recovery."""
    without: frozenset[str] = frozenset()

    def command(self) -> str:
        """The command that repeats the schedule."""
        words = ["python -m tests.simulation --schedules 1", f"--seed {self.seed}"]
        usual = SchedulePlan(seed=self.seed, days=days_of(self.seed))
        words += [
            f"{option} {getattr(self, name)}"
            for name, option in SIZE_OPTIONS.items()
            if getattr(self, name) != getattr(usual, name)
        ]
        if self.without:
            words.append(f"--without {','.join(sorted(self.without))}")
        return " ".join(words)


def days_of(seed: int) -> int:
    """The days that pass in a seed's usual schedule: 400 in every third one."""
    return 0 if seed % 3 else 400


class Outcome(Struct):
    """The result of a schedule."""

    plan: SchedulePlan
    steps: int
    faults: dict[str, int]
    violations: dict[str, str]
    """An example for each violated invariant."""
    digest: str
    """A hash of all decisions and of the final states."""


class Turn:
    """A process that waits to continue."""

    __slots__ = ("doing", "future", "process")

    def __init__(self, process: Process, doing: str, future: asyncio.Future[None]) -> None:
        self.process = process
        self.doing = doing
        self.future = future


class Schedule:
    """A running schedule."""

    def __init__(self, plan: SchedulePlan, database: SimulatedDatabase, *, verbose: bool = False) -> None:
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
        self.faults: Counter[str] = Counter()
        self.violations: dict[str, str] = {}
        self.turns: list[Turn] = []
        self.api: ListeningProcess
        self.locks = Locks(self)
        self.is_calm, self.has_faults = False, True
        self.steps, self.period, self.partitioned_month = 0, 0, ""
        self.scheduled: dict[str, None] = {}
        self._verbose, self._digest = verbose, hashlib.sha256()
        # The database's time at the beginning, in Unix seconds; the loop counts from there.
        self.started_at = 0.0

    # Turns and faults

    async def turn(self, process: Process, doing: str) -> None:
        """Wait until the schedule lets this process continue."""
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
        # A task of another process that waited for this one continues without it.
        if process.is_dead:
            raise Killed

    def draw_fault(self, kind: str, where: str = "") -> bool:
        """Whether a fault occurs here."""
        drawn = self._fault_streams[kind].random() < self.rates[kind]
        # Without turns, the same event would meet one cut after the other, each time in its claim.
        if self.is_calm and (not self.has_faults or kind.startswith("cut_")):
            return False
        if not drawn or kind in self.plan.without:
            return False
        self.faults[f"{kind} {where}".strip()] += 1
        self.note("fault", kind, where)
        return True

    def keeps_transaction_open(self) -> bool:
        """Whether a transaction stays open during others' turns."""
        return not self.is_calm and self.chance.random() < self.openness

    def note(self, *what: str) -> None:
        """Add a decision to the digest."""
        line = " ".join(what)
        self._digest.update(line.encode() + b"\n")
        if self._verbose:
            print(f"{self.steps:4} {self.loop.seconds:12.3f}  {line}", flush=True)

    def report_violation(self, invariant: str, example: str) -> None:
        """Record a violated invariant, with its first example."""
        self.note("violated", invariant, example if self._verbose else "")
        self.violations.setdefault(invariant, example)

    def schedule_handlers(self, *handlers: str) -> None:
        """Note that handlers have work."""
        self.scheduled.update(dict.fromkeys(handlers))

    def on_statement(self, doing: str, params: Any) -> None:
        """Scheduled handlers are drained soon."""
        if doing == "outbox.schedule_handlers" and params:
            self.schedule_handlers(*params[0])

    def note_handled(self, process: Process, event_ids: list[str]) -> None:
        """Some schedules have a poison event, which kills each worker that handles it."""
        self.handled_events.update(dict.fromkeys(event_ids))
        if self.poison is None and self.poison_position is not None and len(self.handled_events) > self.poison_position:
            self.poison = list(self.handled_events)[self.poison_position]
        if self.poison in event_ids:
            self.note(process.name, "is killed by the poison event")
            self.replace_worker(process)
            self.end(process)
            raise Killed

    def end(self, process: Process) -> None:
        """Kill a process. The server notices that its connections are gone."""
        process.kill()
        self.provider.process.start(self.roll_back_dead(process))

    async def roll_back_dead(self, process: Process) -> None:
        """Roll back the open transactions of a dead process."""
        if left := [task for task in process.tasks if task is not asyncio.current_task()]:
            await asyncio.wait(left)
        self.database.release_all(process)

    def replace_worker(self, process: Process) -> None:
        """Start another worker in the place of a dead one, as a supervisor would."""
        for number, worker in enumerate(self.workers):
            if worker is process:
                self.workers[number] = WorkerProcess(self, f"{worker.name}'")

    def on_error(self, doing: str, error: psycopg.Error) -> None:
        """A refused statement is a violation, unless it asks for its own repetition."""
        if error.sqlstate is not None and not (error.sqlstate == "40001" and "meanwhile" in str(error)):
            self.report_violation("no statement fails", f"{doing}: {error.sqlstate} {str(error)[:300]}")

    # Decisions

    def decide(self) -> None:
        """Draw the next action. Called when all tasks wait."""
        if self.is_calm:
            self.advance_until_quiet()
            return
        self.steps += 1
        if self.steps > self.plan.steps:
            self.is_calm, self.has_faults = True, False
            for turn in self.turns:
                if not turn.future.done():
                    turn.future.set_result(None)
            self.enough.set_result(None)
            return
        timer = self.loop.next_timer()
        soon = timer is not None and timer - self.loop.seconds < 1
        going = [worker for worker in self.workers if sum(worker.running.values()) < JOBS_MAX]
        ways: list[tuple[float, Any]] = [
            (12.0 if self.turns else 0.0, self.resume_one),
            (3.0 if soon else 0.3 if timer is not None else 0.0, self.advance_to_timer),
            (1.0 if not soon else 0.2, self.jump_in_time),
            (3.0 if going else 0.0, self.start_job),
            (2.0 if self.unasked else 0.0, self.send_request),
            (0.5 if len(self.unasked) < len(self.wanted) else 0.0, self.request_again),
            (2.0 if self.provider.mailbox else 0.0, self.deliver_webhook),
            (0.5, self.let_payer_act),
            (1.2, lambda: send_command(self)),
            (0.6, self.let_third_party_act),
            (0.5, self.inject_process_faults),
            (0.1, self.inspect),
            (0.8 if self.limits.has_holds else 0.0, lambda: decide_some_hold(self)),
            (1.2 if self.customers else 0.0, lambda: act_on_customer(self)),
            (0.8 if has_erasures(self) else 0.0, lambda: erase_someone(self)),
        ]
        [way] = self.chance.choices([way for _, way in ways], [weight for weight, _ in ways])
        way()

    def resume_one(self) -> None:
        """Let one of the waiting processes continue."""
        turn = self.turns.pop(self.chance.randrange(len(self.turns)))
        self.note(turn.process.name, turn.doing)
        turn.future.set_result(None)

    def advance_to_timer(self) -> None:
        """Advance time to the next timer."""
        timer = self.loop.next_timer()
        assert timer is not None
        self.move_to(max(timer, self.loop.seconds + 0.001))

    def jump_in_time(self) -> None:
        """Advance time, and schedule the handlers that have due work by then."""
        far = len(LEAPS) if self.poison_position is None and self.draw_fault("stalled") else 3
        self.move_to(self.loop.seconds + self.chance.choice(LEAPS[:far]))
        self.database.move_clock(self.loop.seconds)
        query = "select handler from outbox.handlers where outbox.has_work(handler) order by handler"
        self.schedule_handlers(*(handler for (handler,) in self.database.rows(query)))

    def move_to(self, seconds: float) -> None:
        """Set the simulated time."""
        self.loop.seconds = seconds
        self.note("time")
        self.provider.run_due()

    def start_job(self) -> None:
        """A worker starts a job: a scheduled one, or any."""
        names = (
            list(self.scheduled)
            if self.scheduled and self.chance.random() < 0.85
            else [*self.database.handlers, *PERIODIC_JOB_NAMES]
        )
        self.begin(self.chance.choice(names))

    def begin(self, name: str) -> None:
        """A worker starts a job of that name."""
        worker = self.chance.choice([one for one in self.workers if sum(one.running.values()) < JOBS_MAX])
        self.scheduled.pop(name, None)
        self.note(worker.name, "begins", name)
        if name in self.database.handlers:
            worker.drain(name)
        else:
            worker.run_periodic_job(name)

    def send_request(self) -> None:
        """A client sends a request, possibly several at once with one key."""
        wanted = self.unasked.pop()
        for _ in range(self.chance.choice((1, 1, 2, 3))):
            self.asking.append(self.clients.start(request_until_answered(self, wanted)))

    def request_again(self) -> None:
        """All clients repeat their requests at once."""
        asked = [wanted for wanted in self.wanted if wanted not in self.unasked]
        self.asking.append(self.clients.start(self.request_all_at_once(asked)))

    async def request_all_at_once(self, asked: list[WantedPayment]) -> None:
        """One request is served alone, then all arrive at once, each time in another order."""
        self.asking.append(self.clients.start(request_until_answered(self, self.chance.choice(asked), at_once=True)))
        await self.turn(self.clients, "all requests arrive")
        for _ in range(self.plan.batching_connections):
            for wanted in self.chance.sample(asked, len(asked)):
                self.asking.append(self.clients.start(request_until_answered(self, wanted, at_once=True)))

    def deliver_webhook(self) -> None:
        """The provider delivers one of the waiting webhooks."""
        mailbox = self.provider.mailbox
        self.asking.append(self.provider.process.start(deliver(self, mailbox.pop(self.chance.randrange(len(mailbox))))))

    def let_payer_act(self) -> None:
        """A payer completes or fails the requested authentication."""
        if self.provider.payer_acts():
            self.note("payer")

    def let_third_party_act(self) -> None:
        """A cardholder, a bank or a dashboard user acts at the provider."""
        if done := self.provider.third_party_acts():
            self.note(done)

    def inject_process_faults(self) -> None:
        """Kill or stop processes and replace them, and deploy beside running ones."""
        for worker in list(self.workers):
            # With a poison event no worker is killed at random: only the poison event may be dead-lettered for deaths.
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
            self.note("the deploy gave up")

    def inspect(self) -> None:
        """Check the invariants of committed data in the middle of the schedule."""
        self.note("inspection")
        check_database_invariants(self, besides=ONLY_AT_THE_END)

    async def deliver_all(self) -> None:
        """Deliver all waiting webhooks now."""
        events, self.provider.mailbox = self.provider.mailbox, []
        if delivering := [self.provider.process.start(deliver(self, event_id)) for event_id in events]:
            await asyncio.wait(delivering)

    # Running

    def run(self) -> Outcome:
        """Run the schedule; returns its outcome."""
        SENDER.provider = None
        random.seed(self.plan.seed)
        self.database.empty(self.plan.seed)
        if self.plan.days:
            self.database.rows("select surety.maintain_partitions()")
        self.database.set_batch_size(FEW)
        [(self.started_at,)] = self.database.rows("select extract(epoch from surety.time_now())::float8")
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
            SENDER.provider = None
        for broken in self.loop.broken:
            self.report_violation("no task fails", broken)
        return Outcome(self.plan, self.steps, dict(self.faults), self.violations, self._digest.hexdigest()[:16])

    async def live(self) -> None:
        """Faults, recovery, and the checks."""
        await self.prepare()
        await self.enough
        if self.plan.days:
            await let_months_pass(self)
        await recover(self)
        check(self)

    async def prepare(self) -> None:
        """Create merchants, payments and processes."""
        self.enough: asyncio.Future[None] = self.loop.create_future()
        self.clients = Process("client")
        self.provider = SimulatedProvider(self)
        SENDER.provider = self.provider
        self.asking: list[asyncio.Task[Any]] = []
        self.merchants, self.keys = add_merchants(self.database)
        self.note("shops", *(merchant[-20:] for merchant in self.merchants))  # the random part of their ids
        self.unasked = draw_wanted_payments(self.chance, self.plan.payments)
        self.wanted = list(self.unasked)
        self.workers = [WorkerProcess(self, f"worker-{number}") for number in range(self.plan.workers)]
        self.api = ListeningProcess(self, "api")
        self.is_calm, self.has_faults = True, False
        await self.api.open()
        await advance_some_payments(self)
        self.limits = add_limits(self, draw_wanted_payments(random.Random(self.plan.seed), 4, first=500)[:4])
        self.customers = await add_customers(self)
        self.is_calm, self.has_faults = False, True
        # Faults begin when jobs are running.
        for name in list(self.scheduled)[: JOBS_MAX * self.plan.workers]:
            self.begin(name)

    def advance_until_quiet(self) -> None:
        """Without faults only time may have to advance."""
        if self.locks.waiting:
            self.locks.resume_granted()
            return
        timer = self.loop.next_timer()
        assert timer is not None, "all tasks wait, and no timer is set"
        self.loop.seconds = max(timer, self.loop.seconds)
        self.provider.run_due()
