"""What must hold when a schedule has healed, beside what the database checks about itself."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import psycopg

from tests.simulation.actors import decoded

if TYPE_CHECKING:
    from app.sandbox.memory import Record
    from tests.simulation.schedule import Schedule

ENDED_WELL = frozenset({"settled"})


def check(schedule: Schedule) -> None:
    """Say which promises are broken."""
    keep_invariants(schedule)
    keep_acknowledgements(schedule)
    keep_uniqueness(schedule)
    keep_effects(schedule)
    keep_charges(schedule)
    keep_money(schedule)
    keep_expectations(schedule)
    refuse_lies(schedule)
    conclude(schedule)


def keep_invariants(schedule: Schedule) -> None:
    """What check_invariants() says."""
    for name, count, example in schedule.ground.rows("select name, violations, example from surety.check_invariants()"):
        if count:
            schedule.violate(name, f"{count}, such as {example}")


def keep_acknowledgements(schedule: Schedule) -> None:
    """What was answered stays true: one payment per key, one answer per payment, and it is there."""
    present = dict(schedule.ground.rows("select id, amount_minor from surety.payments"))
    states = dict(schedule.ground.rows("select id, state from surety.payments"))
    made: dict[str, str] = {}
    keys = Counter((wanted.merchant, wanted.key) for wanted in schedule.wanted)
    for wanted in schedule.wanted:
        refusals = {"reference-taken"} | (
            {"idempotency-key-reused"} if keys[wanted.merchant, wanted.key] > 1 else set()
        )
        answers = {(row[1], row[2], row[4]) for row in wanted.answers}
        if len({answer for answer in answers if answer[0] == 201}) > 1:
            schedule.violate("a repeated request gets the first answer", f"{wanted.key}: {answers}")
        for row in wanted.answers:
            if row[1] != 201:
                if row[2] not in refusals:
                    schedule.violate("no sound request is refused", f"{wanted.key}: {row[1:4]}")
                continue
            payment_id = row[6]
            if present.get(payment_id) != wanted.amount or decoded(row)["id"] != payment_id:
                schedule.violate("every acknowledged payment is present", f"{wanted.key}: {payment_id}")
            if wanted.commands.get("cancel_payment") == 200 and states.get(payment_id) != "canceled":
                schedule.violate(
                    "what was canceled before anything was sent stays so", f"{payment_id}: {wanted.commands}"
                )
            if made.setdefault(payment_id, wanted.key) != wanted.key:
                schedule.violate("two keys are two payments", f"{payment_id}: {made[payment_id]} and {wanted.key}")
    if strange := present.keys() - made.keys():
        schedule.violate("a key makes one payment", ", ".join(sorted(strange)))


ONCE = {
    "a reference is one living payment's": (
        "select reference from surety.payments where state not in ('failed', 'canceled') and reference is not null"
        " group by merchant_id, reference having count(*) > 1"
    ),
    "a repeated webhook is stored once": "select event_id from surety.inbox group by event_id having count(*) > 1",
    "what kills no worker is not buried for it": (
        "select event_id from outbox.dead_letters where reason like 'its worker died%%'"
        " and (%(poison)s::text is not null and event_id <> %(poison)s)"
    ),
}


def keep_uniqueness(schedule: Schedule) -> None:
    """What must not be there twice, nor at all."""
    for promise, query in ONCE.items():
        found = schedule.ground.overseer.execute(query.encode(), {"poison": schedule.poison}).fetchone()
        if found is not None:
            schedule.violate(promise, str(found[0]))


def keep_effects(schedule: Schedule) -> None:
    """Each event was effective once."""
    rows = schedule.ground.rows(
        "select e.id, e.type, count(x.event_id) from outbox.events as e left join simulation.effects as x"
        " on x.event_id = e.id where e.type = any(select unnest(event_types) from outbox.handlers"
        " where handler = 'probe') group by e.id, e.type having count(x.event_id) <> 1"
    )
    # What kills each worker that touches it has no effect, and is given up.
    rows = [row for row in rows if row[0] != schedule.poison or row[2]]
    if rows:
        schedule.violate("every event is effective once per handler", str(rows[0]))


def keep_charges(schedule: Schedule) -> None:
    """What the provider did and what we believe are the same."""
    memory = schedule.provider.memory
    charged: dict[str, int] = {}
    intents = {intent.id: intent for intent in memory.every("payment_intent")}
    for charge in memory.every("charge"):
        if charge.body["captured"]:
            payment_id = intents[charge.body["payment_intent"]].body["metadata"]["surety_payment"]
            if payment_id in charged:
                schedule.violate("no payment is charged twice", payment_id)
            charged[payment_id] = charge.body["amount_captured"]
    made = Counter(intent.body["metadata"].get("surety_payment") for intent in intents.values())
    # What comes a day late leaves an orphan, which can't charge; without that there is none.
    if not any(fault.startswith(("slow", "stalled")) for fault in schedule.faults) and made.total() > len(made):
        schedule.violate("a payment has one intent", str(made.most_common(1)))
    keep_states(schedule, intents, charged)


def keep_states(schedule: Schedule, intents: dict[str, Record], charged: dict[str, int]) -> None:
    """Where each payment ended is what became of its intent."""
    rows = schedule.ground.rows("select id, state, captured_minor, provider_id from surety.payments order by id")
    for payment_id, state, captured, provider_id in rows:
        if captured != charged.get(payment_id, 0):
            schedule.violate(
                "what was charged is what we captured",
                f"{payment_id}: {captured} here, {charged.get(payment_id)} there",
            )
        if (state in ENDED_WELL) != (payment_id in charged):
            schedule.violate("who was charged is told so", f"{payment_id}: {state}")
        if provider_id is not None and state in {"failed", "canceled"}:
            status = intents[provider_id].body["status"]
            if status != "canceled":
                schedule.violate("what has failed can't succeed any more", f"{payment_id}: {state}, {status}")


def keep_money(schedule: Schedule) -> None:
    """The ledger as an accountant would have kept it, from what the provider did and what was agreed."""
    memory = schedule.provider.memory
    expected: dict[str, int] = {}

    def book(account: str, amount: int) -> None:
        expected[account] = expected.get(account, 0) + amount

    for line in memory.every("balance_transaction"):
        book(f"stripe {line.currency}", -line.body["net"])
        book(f"cost {line.currency}", -line.body["fee"])
    for payment_id, merchant, currency in schedule.ground.rows(
        "select id, merchant_id, currency from surety.payments where captured_minor > 0"
    ):
        [(amount,)] = schedule.ground.rows("select captured_minor from surety.payments where id = %s", payment_id)
        fee = (amount * 340 + 5000) // 10000 + 35
        book(f"avail {merchant} {currency}", amount - fee)
        book(f"rev {currency}", fee)
    found = {
        f"{kind} {owner} {currency}" if kind in {"avail", "pend"} else f"{kind} {currency}": int(total)
        for kind, owner, currency, total in schedule.ground.rows(
            "select a.kind, a.owner_id, a.currency, sum(case when l.is_credit then l.amount_minor"
            " else - l.amount_minor end) from (select credit_account as id, amount_minor, true as is_credit"
            " from ledger.transfers union all select debit_account, amount_minor, false from ledger.transfers) as l"
            " join ledger.accounts as a on a.id = l.id group by 1, 2, 3"
        )
        if total
    }
    expected = {account: total for account, total in expected.items() if total}
    if found != expected:
        differing = {name: (expected.get(name), found.get(name)) for name in sorted(found.keys() | expected.keys())}
        wrong = {name: both for name, both in differing.items() if both[0] != both[1]}
        schedule.violate("the ledger is what was agreed and what happened", f"expected and found: {wrong}")


def keep_expectations(schedule: Schedule) -> None:
    """Nobody waits without somebody's looking, and a lie is told to a person."""
    rows = schedule.ground.rows(
        "select s.payment_id from surety.steps as s left join surety.expectations as x on x.payment_id = s.payment_id"
        " where s.to_state = 'confirmed' and x.payment_id is null"
    )
    if rows:
        schedule.violate("what is confirmed is expected to settle", rows[0][0])
    rows = schedule.ground.rows(
        "select p.id from audit.entries as e join surety.payments as p on p.id = e.payment_id where e.kind = 'answer'"
        " and (e.snapshot ->> 'amount')::bigint <> p.amount_minor and e.snapshot ->> 'object' = 'payment_intent'"
        " and not exists (select from surety.discrepancies as d where d.payment_id = p.id and d.kind = 'amount')"
    )
    if rows:
        schedule.violate("another amount than asked for is a discrepancy", rows[0][0])


# What nobody may write, whatever rights he has. %(p)s is a payment.
LIES: dict[str, str] = {
    "an illegal step": (
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select id, version + 1, state, 'initiated', 'lie', now(), 'liar' from surety.payments where id = %(p)s"
    ),
    "a step that starts where the last did not end": (
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select id, version + 1, 'refunded', 'settled', 'lie', now(), 'liar' from surety.payments where id = %(p)s"
    ),
    "a state without its step": "update surety.payments set state = 'reversed' where id = %(p)s",
    "another past": "update surety.steps set at = now() where payment_id = %(p)s",
    "another trail": "delete from audit.entries where payment_id = %(p)s",
    "another fact": "update surety.facts set amount_minor = 1 where payment_id = %(p)s",
    "another transfer": "update ledger.transfers set amount_minor = 1",
    "another event": "delete from outbox.events where aggregate_id = %(p)s",
    "more captured than asked for": "update surety.payments set captured_minor = amount_minor + 1 where id = %(p)s",
}


def refuse_lies(schedule: Schedule) -> None:
    """What the database refuses to whoever tries."""
    payments = schedule.ground.rows("select max(id) from surety.payments")
    if payments == [(None,)]:
        return
    for lie, statement in LIES.items():
        try:
            with schedule.ground.overseer.transaction():
                schedule.ground.overseer.execute(statement.encode(), {"p": payments[0][0]})
                schedule.ground.overseer.execute("set constraints all immediate")
                schedule.violate("nobody can write a lie", lie)
                raise psycopg.Rollback
        except psycopg.Error as refusal:
            if refusal.sqlstate is None or not refusal.sqlstate.startswith(("23", "SU003")):
                raise


def conclude(schedule: Schedule) -> None:
    """Where it all ended belongs to the digest, too."""
    rows = schedule.ground.rows(
        "select p.amount_minor, p.state, p.version, (select string_agg(s.to_state, ' ' order by s.version)"
        " from surety.steps as s where s.payment_id = p.id) from surety.payments as p order by p.id"
    )
    for row in rows:
        schedule.note("ended", *map(str, row))
