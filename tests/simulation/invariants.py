"""Invariants that hold after recovery, in addition to those that the database checks itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from fractions import Fraction
from typing import TYPE_CHECKING

from tests.simulation.customers import check_customers
from tests.simulation.erasures import check_erasures, erased_subjects, has_erasures, without_payer
from tests.simulation.initial_state import CONNECTED_MERCHANT
from tests.simulation.limits import REFUSALS, check_limits
from tests.simulation.refused_access import check_refusals_uncounted, check_refused_payments

if TYPE_CHECKING:
    from app.sandbox.memory import StoredObject
    from tests.simulation.clients import WantedPayment
    from tests.simulation.schedule import Schedule

# Statuses of refunds at the provider that took the money or will take it.
ACTIVE_REFUND_STATUSES = frozenset({"pending", "requires_action", "succeeded"})
# Invariants that hold only after the periodic jobs have run.
ONLY_AT_THE_END = frozenset(
    {
        "every lease is renewed or taken over",
        "every overdue settlement is a discrepancy",
        "every refund that has ended has moved the money of its state",
        "every dispute's withdrawn amount is the sum of its balance transactions",
    }
)
OPEN_DISPUTE_STATUSES = frozenset({"needs_response", "under_review", "appeal_needs_response", "appeal_under_review"})
KEPT_DISPUTE_STATUSES = frozenset({"lost", "prevented"})


def check(schedule: Schedule) -> None:
    """Report the violated invariants."""
    check_database_invariants(schedule)
    check_acknowledgements(schedule)
    check_uniqueness(schedule)
    check_limits(schedule)
    check_customers(schedule)
    check_erasures(schedule)
    check_effects(schedule)
    check_payers(schedule)
    check_charges(schedule)
    check_refusals_uncounted(schedule)
    check_refused_payments(schedule)
    check_refunds(schedule)
    check_disputes(schedule)
    check_fraud_warnings(schedule)
    check_ledger(schedule)
    check_expectations(schedule)
    check_discrepancies(schedule)
    check_illegal_writes(schedule)
    record_final_states(schedule)


def check_database_invariants(schedule: Schedule, besides: Collection[str] = ()) -> None:
    """The invariants that are views, by one prepared statement."""
    [(query,)] = schedule.database.rows("select surety.invariant_query()")
    for name, count, example, _ in schedule.database.rows(query):
        if count and name not in besides:
            schedule.report_violation(name, f"{count}, such as {example}")


def check_acknowledgements(schedule: Schedule) -> None:
    """Acknowledged payments are present: one payment per key, one answer per payment."""
    present = dict(schedule.database.rows("select id, amount_minor from surety.payments"))
    made: dict[str, str] = {}
    keys = Counter((wanted.merchant, wanted.key) for wanted in schedule.wanted)
    erased = erased_subjects(schedule)
    for wanted in schedule.wanted:
        refusals = acceptable_refusals(schedule, wanted, is_reused=keys[wanted.merchant, wanted.key] > 1)
        is_erased = wanted.payment_id in erased
        answers = {(row[1], row[2], without_payer(schedule, row[4]) if is_erased else row[4]) for row in wanted.answers}
        if len({answer for answer in answers if answer[0] == 201}) > 1:
            schedule.report_violation("a repeated request gets the first answer", f"{wanted.key}: {answers}")
        for row in wanted.answers:
            if row[1] != 201:
                if row[2] not in refusals:
                    schedule.report_violation("no sound request is refused", f"{wanted.key}: {row[1:4]}")
                continue
            payment_id = row[6]
            if present.get(payment_id) != wanted.amount or json.loads(row[4])["id"] != payment_id:
                schedule.report_violation("every acknowledged payment is present", f"{wanted.key}: {payment_id}")
            if made.setdefault(payment_id, wanted.key) != wanted.key:
                schedule.report_violation(
                    "two keys are two payments", f"{payment_id}: {made[payment_id]} and {wanted.key}"
                )
        check_commands(schedule, wanted, is_erased=is_erased)
    if strange := present.keys() - made.keys():
        schedule.report_violation("a key makes one payment", ", ".join(sorted(strange)))


def acceptable_refusals(schedule: Schedule, wanted: WantedPayment, *, is_reused: bool) -> set[str]:
    """The problems that a sound request may meet in this schedule."""
    refusals = {"reference-taken"} | ({"idempotency-key-reused"} if is_reused else set())
    if schedule.provider.was_refused and wanted.merchant == CONNECTED_MERCHANT:
        refusals.add("provider-account-refused")
    if wanted.saved_method is not None or (wanted.customer_id is not None and has_erasures(schedule)):
        # The method may have been removed, the customer erased.
        refusals.add("invalid-request")
    return refusals | (REFUSALS if schedule.limits.count_max else set())


def check_commands(schedule: Schedule, wanted: WantedPayment, *, is_erased: bool) -> None:
    """Answered commands keep their answers and their effects."""
    for key, answers in wanted.command_answers.items():
        shown = {(status, without_payer(schedule, text) if is_erased else text) for status, text in answers}
        if len(shown) > 1:
            schedule.report_violation("a repeated request gets the first answer", f"{key}: {answers}")
        status, document = answers[0][0], json.loads(answers[0][1])
        if key.startswith("cancel_payment") and status == 200:
            [(state,)] = schedule.database.rows("select state from surety.payments where id = %s", document["id"])
            if state != "canceled":
                schedule.report_violation(
                    "a payment canceled before it was sent stays canceled", f"{document['id']}: {state}"
                )
        if key.startswith("create_refund"):
            query = "select amount_minor from surety.refunds where id = %s and payment_id = %s"
            if schedule.database.rows(query, document["id"], document["payment"]) != [(document["amount"],)]:
                schedule.report_violation("every acknowledged refund is present", document["id"])


UNIQUENESS_QUERIES = {
    "a reference is one living payment's": (
        "select reference from surety.payments where state not in ('failed', 'canceled') and reference is not null"
        " group by merchant_id, reference having count(*) > 1"
    ),
    "a repeated webhook is stored once": (
        "select event_id from surety.provider_events group by event_id having count(*) > 1"
    ),
    "only the event that kills workers is dead-lettered for it": (
        "select event_id from outbox.dead_letters where reason like 'its worker died%%'"
        " and (%(poison)s::text is not null and event_id <> %(poison)s)"
    ),
}


def check_uniqueness(schedule: Schedule) -> None:
    """Rows that must be unique or absent."""
    for invariant, query in UNIQUENESS_QUERIES.items():
        found = schedule.database.observer.execute(query.encode(), {"poison": schedule.poison}).fetchone()
        if found is not None:
            schedule.report_violation(invariant, str(found[0]))


def check_effects(schedule: Schedule) -> None:
    """Each event took effect once, and none of the other mode did."""
    rows = schedule.database.rows(
        "select e.id, e.type, count(x.event_id) from outbox.events as e left join simulation.effects as x"
        " on x.event_id = e.id where e.type = any(select event_type from outbox.handler_events"
        " where handler = 'probe') group by e.id, e.type having count(x.event_id) <> 1"
    )
    # The event that kills each worker has no effect and is dead-lettered.
    rows = [row for row in rows if row[0] != schedule.poison or row[2]]
    if rows:
        schedule.report_violation("every event is effective once per handler", str(rows[0]))
    rows = schedule.database.rows(
        "select id from surety.facts where livemode union all select id from surety.unmatched_facts where livemode"
    )
    if rows:
        schedule.report_violation("no event of the other mode becomes a fact", rows[0][0])


def check_discrepancies(schedule: Schedule) -> None:
    """No fault of the simulation causes a discrepancy of these kinds, or one of an object that stays unreadable."""
    rows = schedule.database.rows(
        "select kind, detail from surety.discrepancies"
        " where kind = any(%s) or kind = 'unrecorded' and closed_at is null",
        ["currency", "livemode", "account", "foreign", "missing_here", "category"],
    )
    if rows:
        schedule.report_violation("no absent field is taken for a discrepancy", f"{rows[0][0]}: {rows[0][1]}")


def check_payers(schedule: Schedule) -> None:
    """Payers can act where they must. Their addresses reach the provider, and not the audit trail."""
    rows = schedule.database.rows(
        "select p.id from surety.payments as p where p.failure ->> 'code' = 'authentication_required'"
        " and not p.off_session"
        " or p.state = 'requires_action' and (p.next_action ->> 'url' is null) <> (p.authentication = 'script')"
    )
    if rows:
        schedule.report_violation("a payer can act", rows[0][0])
    absent = {"email": None, "name": None}
    given = {id: payer or absent for id, payer in schedule.database.rows("select id, customer from surety.payments")}
    erased = erased_subjects(schedule)
    for intent in schedule.provider.memory.all_of_kind("payment_intent"):
        if intent.body["metadata"]["surety_payment"] in erased:
            continue
        customer = given.get(intent.body["metadata"]["surety_payment"])
        sent = {"email": intent.body["receipt_email"], "name": intent.body["metadata"].get("customer_name")}
        if sent != customer:
            schedule.report_violation("the provider has the payer's name and address", f"{intent.id}: {sent}")
    rows = schedule.database.rows(
        "select e.id from audit.entries as e where concat(e.reason, e.snapshot) like any(array['%%@%%', '%%Payer %%'])"
    )
    if rows:
        schedule.report_violation("the audit trail has no payer's name or address", rows[0][0])


def check_charges(schedule: Schedule) -> None:
    """Charges at the provider and here are the same."""
    memory = schedule.provider.memory
    charged: dict[str, int] = {}
    intents = {intent.id: intent for intent in memory.all_of_kind("payment_intent")}
    for charge in memory.all_of_kind("charge"):
        if charge.body["captured"]:
            payment_id = intents[charge.body["payment_intent"]].body["metadata"]["surety_payment"]
            if payment_id in charged:
                schedule.report_violation("no payment is charged twice", payment_id)
            charged[payment_id] = charge.body["amount_captured"]
    made = Counter(intent.body["metadata"].get("surety_payment") for intent in intents.values())
    # Only a request executed a day late makes a second intent, which is never confirmed.
    if not any(fault.startswith(("slow", "stalled")) for fault in schedule.faults) and made.total() > len(made):
        schedule.report_violation("a payment has one intent", str(made.most_common(1)))
    for intent in intents.values():
        # A second intent is canceled when it is seen.
        if intent.body["status"] not in {"succeeded", "canceled"}:
            schedule.report_violation(
                "no payer can succeed with what has ended", f"{intent.id}: {intent.body['status']}"
            )
    check_states(schedule, charged)


def check_states(schedule: Schedule, charged: dict[str, int]) -> None:
    """Each payment's final state agrees with the provider's record."""
    memory = schedule.provider.memory
    refunded: Counter[str] = Counter()
    for refund in memory.all_of_kind("refund"):
        if refund.body["status"] == "succeeded":
            refunded[paid_by(schedule, refund)] += refund.body["amount"]
    at_risk: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for dispute in memory.all_of_kind("dispute"):
        if dispute.body["status"] in OPEN_DISPUTE_STATUSES:
            at_risk[paid_by(schedule, dispute)] += max(0, -dispute.net)
        if dispute.body["status"] in KEPT_DISPUTE_STATUSES:
            lost[paid_by(schedule, dispute)] += max(0, -dispute.net)
    rows = schedule.database.rows("select id, state, captured_minor from surety.payments order by id")
    for payment_id, state, captured in rows:
        if captured != charged.get(payment_id, 0):
            schedule.report_violation(
                "what was charged is what we captured",
                f"{payment_id}: {captured} here, {charged.get(payment_id)} there",
            )
        expected = {"failed", "canceled"}
        if payment_id in charged:
            given, gone = refunded[payment_id], lost[payment_id]
            is_back = given + gone >= captured
            expected = {
                "disputed" if at_risk[payment_id]
                else "reversed" if gone
                else "refunded" if is_back
                else "partially_refunded" if given
                else "settled"
            }  # fmt: skip
        if state not in expected:
            schedule.report_violation(
                "a payment is where the provider has it", f"{payment_id}: {state}, not {expected}"
            )


def paid_by(schedule: Schedule, record: StoredObject) -> str:
    """The payment that a charge, refund or dispute at the provider belongs to."""
    charge = record if record.kind == "charge" else schedule.provider.memory.get(record.body["charge"])
    payment_id: str = charge.body["metadata"]["surety_payment"]
    return payment_id


def check_refunds(schedule: Schedule) -> None:
    """Each refund at the provider is known here with the same state and amount, and none was made twice."""
    there = {refund.id: refund.body for refund in schedule.provider.memory.all_of_kind("refund")}
    active = [body for body in there.values() if body["status"] in ACTIVE_REFUND_STATUSES]
    demands = Counter(body["metadata"].get("surety_refund") for body in active)
    for demand, times in demands.items():
        if demand is not None and times > 1:
            schedule.report_violation("no refund is made twice", demand)
    rows = schedule.database.rows("select id, provider_id, state, amount_minor from surety.refunds order by id")
    for refund_id, provider_id, state, amount in rows:
        made = there.pop(provider_id, None)
        if made is None and state != "failed":
            schedule.report_violation("a refund stands as the provider has it", f"{refund_id}: {state}, never made")
        if made is not None and (made["status"], made["amount"]) != (state, amount):
            result = f"{refund_id}: {state} {amount}, there {made['status']} {made['amount']}"
            schedule.report_violation("a refund stands as the provider has it", result)
    if there:
        schedule.report_violation("every refund at the provider is known", ", ".join(there))


def check_disputes(schedule: Schedule) -> None:
    """Each dispute at the provider is known here with the same status and amount."""
    rows = schedule.database.rows("select provider_id, status, withdrawn_minor from surety.disputes order by id")
    found = {row[0]: row[1:] for row in rows}
    expected = {
        dispute.id: (
            dispute.body["status"],
            max(0, -dispute.net) if dispute.body["status"] in KEPT_DISPUTE_STATUSES | OPEN_DISPUTE_STATUSES else 0,
        )
        for dispute in schedule.provider.memory.all_of_kind("dispute")
    }
    if found != expected:
        schedule.report_violation("a dispute stands as the provider has it", f"{found}, there {expected}")


def check_fraud_warnings(schedule: Schedule) -> None:
    """Each warning of fraud at the provider is shown by its payment, and is closed here if it is closed there."""
    query = "select id, fraud_warning ->> 'actionable' from surety.payments where fraud_warning is not null"
    found = {payment_id: actionable == "true" for payment_id, actionable in schedule.database.rows(query)}
    expected = {
        paid_by(schedule, warning): warning.body["actionable"]
        for warning in schedule.provider.memory.all_of_kind("radar.early_fraud_warning")
    }
    if found != expected:
        schedule.report_violation("a warning of fraud stands as the provider has it", f"{found}, there {expected}")


def check_ledger(schedule: Schedule) -> None:
    """The ledger equals books kept independently, from nothing but the provider's balance lines and the agreed fees."""
    expected = books_of_balance_lines(schedule)
    found: Counter[str] = Counter()
    for kind, owner, currency, total in schedule.database.rows(
        "select a.kind, a.owner_id, a.currency, sum(case when l.is_credit then l.amount_minor"
        " else - l.amount_minor end) from (select credit_account as id, amount_minor, true as is_credit"
        " from ledger.transfers union all select debit_account, amount_minor, false from ledger.transfers) as l"
        " join ledger.accounts as a on a.id = l.id group by 1, 2, 3"
    ):
        is_merchants = kind in {"available", "pending", "disputed", "reserved_for_refunds", "reserved_for_payouts"}
        found[f"{kind} {owner} {currency}" if is_merchants else f"{kind} {currency}"] += int(total)
    both = {name: (expected[name], found[name]) for name in sorted(found.keys() | expected.keys())}
    if wrong := {name: totals for name, totals in both.items() if totals[0] != totals[1]}:
        schedule.report_violation("the ledger is what was agreed and what happened", f"expected and found: {wrong}")


def books_of_balance_lines(schedule: Schedule) -> Counter[str]:
    """Each account's balance after all has ended: what came in and went out is the merchant's, less the fees.

    No status counts, neither here nor there: nothing may stay reserved, withheld or due.
    """
    books: Counter[str] = Counter()
    charged: Counter[tuple[str, str]] = Counter()
    merchants = dict(schedule.database.rows("select id, merchant_id from surety.payments"))
    for line in schedule.provider.memory.all_of_kind("balance_transaction"):
        currency, amount, fee = line.currency, line.body["amount"], line.body["fee"]
        books[f"provider_balance {currency}"] -= line.body["net"]
        books[f"provider_cost {currency}"] -= fee
        source = schedule.provider.memory.get(line.body["source"])
        payment_id = paid_by(schedule, source)
        available = f"available {merchants[payment_id]} {currency}"
        books[available] += amount
        if source.kind == "charge":
            charged[payment_id, currency] += amount
        elif source.kind == "dispute":
            # The network's fee is passed on.
            books[available] -= fee
            books[f"fee_revenue {currency}"] += fee
    for (payment_id, currency), amount in charged.items():
        fee = round(Fraction(amount * 340, 10000)) + 35
        books[f"available {merchants[payment_id]} {currency}"] -= fee
        books[f"fee_revenue {currency}"] += fee
    return books


def check_expectations(schedule: Schedule) -> None:
    """Every confirmed payment is expected to settle, and every wrong amount is a discrepancy."""
    rows = schedule.database.rows(
        "select s.payment_id from surety.steps as s left join surety.expectations as x on x.payment_id = s.payment_id"
        " where s.to_state = 'confirmed' and x.payment_id is null"
    )
    if rows:
        schedule.report_violation("every confirmed payment is expected to settle", rows[0][0])
    rows = schedule.database.rows(
        "select x.payment_id from surety.expectations as x where not exists (select from surety.steps as s"
        " where s.payment_id = x.payment_id and s.to_state = 'settled' and s.at <= x.met_at)"
        " and (x.met_at is null or not exists (select from ledger.postings as g"
        " where g.cause = x.payment_id || ':settled'))"
    )
    if rows:
        schedule.report_violation("a settlement is expected until it happens", rows[0][0])
    rows = schedule.database.rows(
        "select s.payment_id from surety.steps as s join surety.steps as n on n.payment_id = s.payment_id"
        " and n.version = s.version + 1 where s.from_state = 'reversed' and s.to_state = 'settled'"
        " and n.to_state = 'reversed'"
    )
    if rows:
        schedule.report_violation("a payment with a loss does not settle", rows[0][0])
    rows = schedule.database.rows(
        "select p.id from audit.entries as e join surety.payments as p on p.id = e.payment_id where e.kind = 'answer'"
        " and (e.snapshot ->> 'amount')::bigint <> p.amount_minor and e.snapshot ->> 'object' = 'payment_intent'"
        " and not exists (select from surety.discrepancies as d where d.payment_id = p.id and d.kind = 'amount')"
    )
    if rows:
        schedule.report_violation("another amount than asked for is a discrepancy", rows[0][0])


# Statements that the database refuses even to its owner. $1 is a payment.
ILLEGAL_WRITES: dict[str, str] = {
    "an illegal step": (
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select id, version + 1, state, 'initiated', 'illegal', now(), 'test' from surety.payments where id = $1"
    ),
    "a step that starts where the last did not end": (
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " select id, version + 1, case state when 'refunded' then 'disputed' else 'refunded' end, 'settled', 'illegal',"
        " now(), 'test' from surety.payments where id = $1"
    ),
    "a state without its step": (
        "update surety.payments set state = case state when 'reversed' then 'refunded' else 'reversed' end"
        " where id = $1"
    ),
    "a payment of the other mode": "update surety.payments set livemode = true where id = $1",
    "another past": "update surety.steps set at = now() where payment_id = $1",
    "another trail": "delete from audit.entries where payment_id = $1",
    "another fact": "update surety.facts set amount_minor = 1 where payment_id = $1",
    "another transfer": "update ledger.transfers set amount_minor = 1",
    "another event": "delete from outbox.events where aggregate_id = $1",
    "more captured than asked for": "update surety.payments set captured_minor = amount_minor + 1 where id = $1",
}


def check_illegal_writes(schedule: Schedule) -> None:
    """The database refuses every illegal write."""
    [(payment_id,)] = schedule.database.rows("select max(id) from surety.payments")
    if payment_id is None:
        return
    query = "select w.name, simulation.attempt_write(w.text, %s) from unnest(%s::text[], %s::text[]) as w (name, text)"
    for name, code in schedule.database.rows(query, payment_id, list(ILLEGAL_WRITES), list(ILLEGAL_WRITES.values())):
        if code is None:
            schedule.report_violation("no illegal write is accepted", name)
        elif not code.startswith(("23", "SU003")):
            raise ValueError(f"{name} is refused for another reason: {code}")


def record_final_states(schedule: Schedule) -> None:
    """Add the final states to the digest."""
    rows = schedule.database.rows(
        "select p.amount_minor, p.state, p.version, (select string_agg(s.to_state, ' ' order by s.version)"
        " from surety.steps as s where s.payment_id = p.id) from surety.payments as p order by p.id"
    )
    for row in rows:
        schedule.note("ended", *map(str, row))
