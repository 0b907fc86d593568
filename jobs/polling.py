"""What nobody has to ask for.

Each of these rounds is a job that runs in one worker at a time, whichever takes it; one that finds another under way
leaves it alone. How often the provider is asked is SURETY_POLL_SECONDS.

    tick           wakes handlers that have due work             every second
    sweep          asks about unfinished payments, refunds and disputes
    news           reads the provider's list of events, for what no webhook has told
    settlements    reads what moved in the provider's balance
    due_money      looks again at what should be available by now
    payouts        reads what was sent to the bank
    parked         facts that found no payment, once more
    overdue        what should have followed, payers who don't act, evidence that is due
    upkeep         partitions ahead, what may be forgotten       every hour
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any, LiteralString, TypeVar

from msgspec import Struct, field
from procrastinate import JobContext
from procrastinate.tasks import Task
from psycopg.types.json import Jsonb

from db.settings import Settings
from jobs import Workers, app
from jobs.database import in_halves
from jobs.handlers.calls import Result, Subject, in_groups, not_sent, outcome
from jobs.handlers.webhooks import LISTED, Source, fetch_dispute, take_listed
from jobs.stripe.client import Absent, Answer, ProviderError
from jobs.stripe.facts import Fact, Json, Origin, money_facts, payout_facts, redacted, refund_facts
from jobs.worker import Worker, worker_of

log = logging.getLogger("surety.periodic")

QUESTIONS_MAX = 200
LINES_MAX = 1000
# Every reading of a list overlaps the last by so many polls: a list may show a row late, a clock may be behind.
OVERLAP_POLLS = 3
GAP = timedelta(hours=1)
MINUTE = 60
# How long before its deadline a dispute's missing evidence is told of.
REMIND_BEFORE = timedelta(days=3)

Round = Callable[[Worker], Awaitable[None]]


class Question(Subject, kw_only=True):
    """A row of surety.claim_questions."""

    first_sent_at: datetime | None
    last_sent_at: datetime | None
    begun_at: float = field(default_factory=time.monotonic)


class RefundQuestion(Struct):
    """A row of surety.claim_refund_questions."""

    refund_id: str
    payment_id: str
    provider_id: str | None
    intent_id: str
    account: str
    livemode: bool


class DisputeQuestion(Struct):
    """A row of surety.claim_dispute_questions."""

    payment_id: str
    provider_id: str
    account: str
    livemode: bool


Asked = TypeVar("Asked", Question, RefundQuestion, DisputeQuestion)


class Unread(Struct):
    """A row of surety.lists_to_poll."""

    account: str
    read_from: datetime
    read_to: datetime


class Line(Struct):
    """A row of surety.claim_money."""

    account: str
    created_at: datetime


async def tick(worker: Worker) -> None:
    """Wake the handlers that have due work: what a kick missed, what is due again, what a dead worker left."""
    await worker.database.value("select outbox.kick_due()")


async def sweep(worker: Worker) -> None:
    """Ask about what is unfinished: all would end even if every webhook were lost."""
    await ask_about(
        worker, Question, "fetch", ask,
        "select payment_id, provider_id, account, amount_minor, currency, livemode, first_sent_at, last_sent_at"
        " from surety.claim_questions(%s)",
    )  # fmt: skip
    await ask_about(
        worker, RefundQuestion, "fetch refund", ask_refund,
        "select refund_id, payment_id, provider_id, intent_id, account, livemode"
        " from surety.claim_refund_questions(%s)",
    )  # fmt: skip
    await ask_about(
        worker, DisputeQuestion, "fetch dispute", ask_dispute,
        "select payment_id, provider_id, account, livemode from surety.claim_dispute_questions(%s)",
    )  # fmt: skip


async def ask_about(
    worker: Worker,
    kind: type[Asked],
    operation: str,
    ask_one: Callable[[Worker, Asked], Awaitable[list[Result]]],
    claim: LiteralString,
) -> None:
    """Ask whatever is due, a bounded number of questions at once, and record what is answered."""
    while not worker.stopping.is_set() and (questions := await worker.database.rows(kind, claim, QUESTIONS_MAX)):
        await tell(worker, [asking(operation, question.payment_id) for question in questions])
        async for results in in_groups([partial(ask_one, worker, question) for question in questions]):
            await record(worker, results)


async def ask_dispute(worker: Worker, question: DisputeQuestion) -> list[Result]:
    """What the provider says about one dispute."""
    source = Source(question.account, question.livemode, "dispute", question.provider_id)
    began = time.monotonic()
    try:
        told = await fetch_dispute(worker, source, Origin(question.account, question.livemode, "poll"))
    except ProviderError as error:
        told = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    except (KeyError, TypeError, AttributeError) as error:
        told = {"outcome": "unknown"} | unreadable(question.provider_id, error)
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    return [{"payment_id": question.payment_id, "operation": "fetch dispute", "duration_ms": duration_ms, **told}]


async def ask_refund(worker: Worker, question: RefundQuestion) -> list[Result]:
    """What the provider says about one refund."""
    origin = Origin(question.account, question.livemode, "poll")
    began = time.monotonic()
    told: Result
    try:
        answer = await find_refund(worker, question)
        told = {"outcome": "answered", "status": answer.status, "snapshot": redacted(answer.body)}
        if question.provider_id in {None, answer.body.get("id")}:
            told |= read_one(answer.body, origin, refund_facts)
    except ProviderError as error:
        told = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    return [{"payment_id": question.payment_id, "operation": "fetch refund", "duration_ms": duration_ms, **told}]


async def find_refund(worker: Worker, question: RefundQuestion) -> Answer:
    """The refund as it is at the provider. Raises Absent if it never came there."""
    if question.provider_id is not None:
        return await worker.stripe.fetch(question.account, "refunds", question.provider_id)
    found = await worker.stripe.find_refund(question.account, question.intent_id, question.refund_id)
    if found is None:
        raise Absent(f"{question.intent_id} has no refund {question.refund_id}")
    return found


async def ask(worker: Worker, question: Question) -> list[Result]:
    """What the provider says about one payment."""
    if question.account in worker.breaker.blocked:
        return [not_sent(question, "fetch")]
    return [await outcome(question, "fetch", find_intent(worker, question), source="poll")]


async def find_intent(worker: Worker, question: Question) -> Answer:
    """The payment's intent as it is at the provider. Raises Absent if it never came there."""
    if question.provider_id is not None:
        return await worker.stripe.fetch_intent(question.account, question.provider_id)
    assert question.first_sent_at is not None
    assert question.last_sent_at is not None
    sent = question.first_sent_at, question.last_sent_at
    found = await worker.stripe.find_intent(question.account, question.payment_id, *sent, question.begun_at)
    if found is None:
        raise Absent(f"no intent is made for {question.payment_id}")
    return found


async def news(worker: Worker) -> None:
    """What the provider has told of and nobody heard: all would be known even if every webhook were lost."""
    for unread in await unread_lists(worker, "events"):
        pages = worker.stripe.events(unread.account, unread.read_from, sorted(LISTED))
        take = partial(take_listed, worker, unread.account)
        if await read_list(worker, "list events", unread.account, unread.read_from, pages, take):
            await mark_read(worker, unread, "events")


async def settlements(worker: Worker) -> None:
    """Balance transactions, which no webhook tells of, by the time of their creation."""
    for unread in await unread_lists(worker, "balance_transactions"):
        if await read_balance(worker, unread.account, unread.read_from):
            await mark_read(worker, unread, "balance_transactions")


async def due_money(worker: Worker) -> None:
    """Balance transactions that should have become available. They lie close together, so lists find them."""
    due = await worker.database.rows(
        Line,
        "select account, created_at from surety.claim_money(%s, make_interval(secs => %s))",
        LINES_MAX,
        worker.settings.surety_poll_seconds,
    )
    for account in sorted({line.account for line in due}):
        for since, until in stretches([line.created_at for line in due if line.account == account]):
            await read_balance(worker, account, since, until)


async def payouts(worker: Worker) -> None:
    """What the provider sent to the bank."""
    for unread in await unread_lists(worker, "payouts"):
        pages = worker.stripe.payouts(unread.account, unread.read_from)
        take = partial(book, worker, unread.account, payout_facts)
        if await read_list(worker, "list payouts", unread.account, unread.read_from, pages, take):
            await mark_read(worker, unread, "payouts")


async def parked(worker: Worker) -> None:
    """Facts that found no payment, once more."""
    await worker.wake(await worker.database.value("select surety.retry_parked()"))


async def overdue(worker: Worker) -> None:
    """What should have followed by now and didn't; payers who were asked to act and don't."""
    await worker.database.value("select surety.open_overdue()")
    query = "select surety.call_off_overdue(make_interval(secs => %s))"
    await worker.wake(await worker.database.value(query, worker.settings.surety_action_seconds))
    await worker.wake(await worker.database.value("select surety.remind_evidence(%s)", REMIND_BEFORE))


async def upkeep(worker: Worker) -> None:
    """Partitions for the months ahead; what need not be remembered any longer."""
    await worker.database.value("select surety.maintain_partitions()")
    await worker.database.value("select surety.forget_idempotency_keys()")
    await worker.database.value("select outbox.forget_jobs()")


async def read_balance(worker: Worker, account: str, since: datetime, until: datetime | None = None) -> bool:
    """Record what moved in an account's balance; whether the provider told all of it."""
    pages = worker.stripe.balance_transactions(account, since, until)
    take = partial(book, worker, account, money_facts)
    return await read_list(worker, "list balance transactions", account, since, pages, take)


async def book(worker: Worker, account: str, read: Callable[[Json, Origin], list[Fact]], page: list[Json]) -> None:
    """Record what the objects of a list say."""
    origin = Origin(account, worker.stripe.livemode, "poll")
    await record(worker, [read_one(line, origin, read) for line in page])


async def read_list(
    worker: Worker,
    operation: str,
    account: str,
    since: datetime,
    pages: AsyncGenerator[list[Json]],
    take: Callable[[list[Json]], Awaitable[None]],
) -> bool:
    """Take a list of the provider's page by page; whether it could be read to its end."""
    await tell(worker, [asking(operation, None, account=account, since=since.isoformat())])
    began, rows = time.monotonic(), 0
    try:
        async for page in pages:
            rows += len(page)
            await take(page)
        told: Result = {"outcome": "answered", "snapshot": {"account": account, "rows": rows}}
    except ProviderError as error:
        told = {"outcome": error.outcome, "status": error.status, "error": str(error)}
    duration_ms = round((time.monotonic() - began) * 1000, 3)
    await record(worker, [{"operation": operation, "duration_ms": duration_ms, **told}])
    return bool(told["outcome"] == "answered")


def read_one(line: Json, origin: Origin, read: Callable[[Json, Origin], list[Fact]]) -> Result:
    """The facts of one object of a list; one that can't be read is a discrepancy, and stands in nobody's way."""
    try:
        return {"facts": read(line, origin)}
    except (KeyError, TypeError, AttributeError) as error:
        return unreadable(line["id"], error)


def unreadable(object_id: str, error: Exception) -> Result:
    """Something of the provider's that we can't make sense of, so it isn't booked."""
    detail = f"{object_id} can't be recorded: {type(error).__name__} {error}"
    return {"discrepancy": {"kind": "unmatched_cash", "subject": object_id, "detail": detail[:500]}}


async def unread_lists(worker: Worker, name: str) -> list[Unread]:
    """The accounts whose list is to be read, and from when."""
    overlap = timedelta(seconds=OVERLAP_POLLS * worker.settings.surety_poll_seconds)
    query = "select account, read_from, read_to from surety.lists_to_poll(%s, %s)"
    return await worker.database.rows(Unread, query, name, overlap)


async def mark_read(worker: Worker, unread: Unread, name: str) -> None:
    """An account's list was read up to now."""
    await worker.database.value("select surety.polled('stripe', %s, %s, %s)", unread.account, name, unread.read_to)


def stretches(moments: list[datetime]) -> list[tuple[datetime, datetime]]:
    """The stretches of time in which moments lie, without a gap of more than an hour."""
    found: list[tuple[datetime, datetime]] = []
    for moment in sorted(moments):
        if found and moment - found[-1][1] <= GAP:
            found[-1] = (found[-1][0], moment)
        else:
            found.append((moment, moment))
    return found


def asking(operation: str, payment_id: str | None, **more: Json | str) -> Json:
    """What the audit trail keeps of a question."""
    return {"kind": "call", "payment_id": payment_id, "outcome": "asked", "snapshot": {"operation": operation, **more}}


async def tell(worker: Worker, entries: list[Json]) -> None:
    """Tell the audit trail."""
    if entries:
        told = [entry | {"actor": worker.actor} for entry in entries]
        await worker.database.value("select audit.record(%s)", Jsonb(told))


async def record(worker: Worker, results: list[Result]) -> None:
    """Record what came of questions that belong to no event, and wake who is concerned."""

    async def write(results: list[Result]) -> None:
        query = "select surety.record_outcomes(%s, %s)"
        await worker.wake(await worker.database.value(query, worker.actor, Jsonb(results)))

    async def give_up(result: Result, error: Exception) -> None:
        log.error("%s can't be recorded", result.get("payment_id", "a row"), exc_info=error)
        await write([unreadable(fact["object_id"], error) for fact in result.get("facts", [])[:1]])

    if results:
        await in_halves(results, write, give_up)


ROUNDS: tuple[Round, ...] = (tick, sweep, news, settlements, due_money, payouts, parked, overdue, upkeep)


def as_task(work: Round, name: str) -> Task[Any, Any, Any]:
    """A round as a task of Procrastinate's: at most one waits, at most one runs."""

    async def run(context: JobContext, /, timestamp: int) -> None:
        worker = worker_of(context)
        async with worker.database.alone(name) as is_alone:
            if is_alone:
                await work(worker)

    return app.task(name=name, queue="periodic", queueing_lock=name, pass_context=True)(run)


TASKS = {work.__name__: as_task(work, work.__name__) for work in ROUNDS}


def schedule(workers: Workers, settings: Settings) -> None:
    """Say when each round begins; a later start of a worker in the same process says it anew."""
    poll = cron(settings.surety_poll_seconds)
    workers.periodic_registry.periodic_tasks.clear()
    for name, task in TASKS.items():
        when = {"tick": cron(1), "upkeep": "0 * * * *"}.get(name, poll)
        workers.periodic(cron=when)(task)


def cron(seconds: int) -> str:
    """Every so many seconds, below a minute; whole minutes above. Procrastinate's crontab has the seconds last."""
    return f"* * * * * */{seconds}" if seconds < MINUTE else f"*/{min(59, seconds // MINUTE)} * * * *"
