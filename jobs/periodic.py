"""What nobody has to ask for.

Every round runs in one worker at a time, whichever takes its job; a round that finds another under way leaves it alone.
How often the provider is asked is SURETY_POLL_SECONDS.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from msgspec import Struct
from procrastinate import App, JobContext
from psycopg.types.json import Jsonb

from db.settings import Settings
from jobs import app
from jobs.stripe_facts import Fact, Origin, intent_facts, money_facts, payout_facts
from jobs.stripe_rail import ProviderError
from jobs.worker import Worker, worker_of

log = logging.getLogger("surety.periodic")

QUESTIONS_MAX = 200
QUESTIONS_AT_ONCE = 16
LINES_MAX = 1000
# A list may show a row late, and the provider's clock may lag behind ours.
OVERLAP_POLLS = 10
GAP = timedelta(hours=1)

Round = Callable[[Worker], Awaitable[None]]


class Question(Struct):
    """A row of surety.claim_questions."""

    payment_id: str
    provider_id: str
    account: str


class List(Struct):
    """A row of surety.lists_to_poll."""

    account: str
    read_from: datetime
    read_to: datetime


class Line(Struct):
    """A row of surety.claim_money."""

    account: str
    object_id: str
    created_at: datetime


async def tick(worker: Worker) -> None:
    """Wake the handlers that have due work: what a kick missed, what is due again, what a dead worker left."""
    await worker.database.value("select outbox.kick_due()")


async def sweep(worker: Worker) -> None:
    """Ask about unfinished payments: all would end even if every webhook were lost."""
    questions = await worker.database.rows(
        Question, "select payment_id, provider_id, account from surety.claim_questions(%s)", QUESTIONS_MAX
    )
    places = asyncio.Semaphore(QUESTIONS_AT_ONCE)

    async def ask(question: Question) -> list[Fact]:
        async with places:
            try:
                answer = await worker.stripe.fetch_intent(question.account, question.provider_id)
            except ProviderError as error:
                log.warning("%s could not be asked about: %s", question.payment_id, error)
                return []
        origin = Origin(question.account, bool(answer.body["livemode"]), "poll", answer.request_id)
        return intent_facts(answer.body, origin)

    answers = await asyncio.gather(*(ask(question) for question in questions))
    await record_facts(worker, [fact for facts in answers for fact in facts])


async def settlements(worker: Worker) -> None:
    """Balance transactions, which no webhook announces reliably, by the time of their creation."""
    overlap = timedelta(seconds=OVERLAP_POLLS * worker.settings.surety_poll_seconds)
    for account in await lists(worker, "balance_transactions", overlap):
        lines = await worker.stripe.list_balance_transactions(account.account, account.read_from)
        origin = Origin(account.account, worker.stripe.livemode, "poll")
        await record_facts(worker, [fact for line in lines for fact in money_facts(line, origin)])
        await worker.database.value(
            "select surety.polled('stripe', %s, 'balance_transactions', %s)", account.account, account.read_to
        )


async def due_money(worker: Worker) -> None:
    """Balance transactions that should have become available."""
    due = await worker.database.rows(
        Line, "select account, object_id, created_at from surety.claim_money(%s, make_interval(secs => %s))",
        LINES_MAX, worker.settings.surety_poll_seconds,
    )  # fmt: skip
    for account in sorted({line.account for line in due}):
        moments = sorted(line.created_at for line in due if line.account == account)
        for since, until in spans(moments, GAP):
            lines = await worker.stripe.list_balance_transactions(account, since, until)
            origin = Origin(account, worker.stripe.livemode, "poll")
            await record_facts(worker, [fact for line in lines for fact in money_facts(line, origin)])


def spans(moments: list[datetime], gap: timedelta) -> list[tuple[datetime, datetime]]:
    """The stretches of time in which the moments, sorted, lie without a gap."""
    found: list[tuple[datetime, datetime]] = []
    for moment in moments:
        if found and moment - found[-1][1] <= gap:
            found[-1] = (found[-1][0], moment)
        else:
            found.append((moment, moment))
    return found


async def payouts(worker: Worker) -> None:
    """What the provider sent to the bank."""
    overlap = timedelta(seconds=OVERLAP_POLLS * worker.settings.surety_poll_seconds)
    for account in await lists(worker, "payouts", overlap):
        found = await worker.stripe.list_payouts(account.account, account.read_from)
        origin = Origin(account.account, worker.stripe.livemode, "poll")
        await record_facts(worker, [fact for payout in found for fact in payout_facts(payout, origin)])
        await worker.database.value("select surety.polled('stripe', %s, 'payouts', %s)", account.account, account.read_to)


async def lists(worker: Worker, name: str, overlap: timedelta) -> list[List]:
    """The accounts whose list is to be read, and from when."""
    return await worker.database.rows(
        List, "select account, read_from, read_to from surety.lists_to_poll(%s, %s)", name, overlap
    )


async def parked(worker: Worker) -> None:
    """Facts that found no payment, once more."""
    await worker.wake(await worker.database.value("select surety.retry_parked()"))


async def overdue(worker: Worker) -> None:
    """What should have followed by now and didn't; payers who were asked to act and don't."""
    await worker.database.value("select surety.open_overdue()")
    made = await worker.database.value(
        "select surety.call_off_overdue(make_interval(secs => %s))", worker.settings.surety_action_seconds
    )
    await worker.wake(made)


async def upkeep(worker: Worker) -> None:
    """Partitions for the months ahead; keys that need be remembered no longer."""
    await worker.database.value("select surety.maintain_partitions()")
    await worker.database.value("select surety.forget_idempotency_keys()")


async def record_facts(worker: Worker, facts: list[Fact]) -> None:
    """Record what was read, and wake who is concerned."""
    if facts:
        made = await worker.database.value("select surety.record_facts(%s, %s)", Jsonb(facts), worker.actor)
        await worker.wake(made)


def schedule(app: App, settings: Settings) -> None:
    """Let the rounds begin: called once, when a worker starts."""
    every_second = "* * * * * *"
    poll = cron(settings.surety_poll_seconds)
    plan: dict[Round, str] = {
        tick: every_second,
        sweep: poll,
        settlements: poll,
        due_money: poll,
        payouts: poll,
        parked: poll,
        overdue: poll,
        upkeep: "0 * * * *",
    }
    for work, when in plan.items():
        app.periodic(cron=when)(as_task(app, work))


def as_task(app, work: Round):
    name = work.__name__

    @app.task(name=name, queue="periodic", queueing_lock=name, pass_context=True)
    async def run(context: JobContext, timestamp: int) -> None:
        worker = worker_of(context)
        async with worker.database.alone(name) as is_alone:
            if is_alone:
                await work(worker)

    return run


def cron(seconds: int) -> str:
    """Every so many seconds, as a crontab line with seconds last; whole minutes from a minute on."""
    if seconds < 60:
        return f"* * * * * */{seconds}"
    return f"*/{min(59, seconds // 60)} * * * *"
