"""Each invariant catches its violation, and a sound database has none.

Violations are made with every trigger and foreign key off, as only the server's owner can.
"""

from __future__ import annotations

import psycopg
import pytest

from db.connect import ProcessKind
from tests.conftest import Connect
from tests.db.test_partitions import move_clock
from tests.support.payments import (
    Connection,
    Fact,
    add_merchant,
    as_bank_fact,
    fact,
    money,
    pay,
    record,
    violations,
)

OTHER_KINDS: tuple[ProcessKind, ...] = ("api", "webhook", "worker", "analyst")

REFUND = (
    "insert into surety.refunds (id, payment_id, merchant_id, amount_minor, currency, provider, provider_account,"
    " is_ours, created_at, updated_at, state)"
    " select 'ref_' || repeat('0', 24), id, merchant_id, 100, currency, provider, provider_account, true, now(), now(),"
)

HOLD = (
    "insert into surety.payment_holds (payment_id, rule_id, detail, opened_at, expires_at)"
    " values (%(p)s, 'vel_none', '{}', now(), now())"
)

LONG_AGO = "now() - interval '8 days'"

# Its cursor has passed all events.
ENDPOINT = (
    "insert into outbox.webhook_endpoints"
    " (id, merchant_id, url, event_types, payload, api_version, created_at, updated_at, generation, seen)"
    " select 'we_' || repeat('0', 24), merchant_id, 'https://shop.example/', '{*}', 'full', '2026-11-30', now(), now(),"
    " 1, pg_current_snapshot() from surety.payments where id = %(p)s"
)

# A change that violates the invariant; %(p)s is the newest settled payment.
VIOLATIONS: dict[str, str] = {
    "every payment is in the state of its last step": "update surety.payments set state = 'confirmed' where id = %(p)s",
    "every step starts where the last ended": (
        "update surety.steps set from_state = 'processing' where payment_id = %(p)s and to_state = 'confirmed'"
    ),
    "every step is legal": (
        "update surety.steps set from_state = 'settled' where payment_id = %(p)s and to_state = 'submitting'"
    ),
    "every state and amount is what its facts say": "delete from surety.facts where payment_id = %(p)s",
    "every payment shows its newest warning of fraud": (
        "update surety.payments set fraud_warning = '{\"actionable\": true}' where id = %(p)s"
    ),
    "every saved payment method was proved by a payment of its customer": (
        "insert into surety.payment_methods (id, customer_id, merchant_id, type, provider_id, usage, mandate,"
        " payment_id, created_at) select 'spm_' || repeat('0', 24), 'cus_none', merchant_id, 'card', 'pm_1',"
        " 'off_session', '{}', id, now() from surety.payments where id = %(p)s"
    ),
    "every payment by a saved payment method charges that one": (
        "update surety.payments set customer_id = 'cus_none', saved_method_id = 'spm_none' where id = %(p)s"
    ),
    "every step has one audit entry": "delete from audit.entries where payment_id = %(p)s and version = 2",
    "every step has one event": "delete from outbox.events where aggregate_id = %(p)s and version = 2",
    "debits equal credits, per currency": (
        "update ledger.transfers set debit_account = 'provider_receivable:unknown:usd'"
        " where debit_account like 'provider_receivable:%%'"
    ),
    "every balance is the sum of its transfers": "delete from ledger.balances where account_id like 'available:%%'",
    "every amount reserved for payouts is the sum of the payouts to be sent": (
        "insert into ledger.balances values ('reserved_for_payouts:mer_none:usd', 1)"
    ),
    "every payout to a merchant has posted each of its states": (
        "insert into surety.merchant_payouts (id, merchant_id, currency, amount_minor, schedule, period_begins, state,"
        " created_at, created_by, ended_at, reason) select 'mpo_' || repeat('0', 24), merchant_id, currency, 1,"
        " 'daily', '2020-01-01', 'canceled', now(), 'ann', now(), 'why' from surety.payments where id = %(p)s"
    ),
    "every balance of a day is the sum of the transfers until its end": (
        "insert into ledger.daily_balances select id, '2020-01-01', 1 from ledger.accounts limit 1"
    ),
    "every event of a webhook endpoint is sent, waits or was skipped by choice": (
        f"with made as ({ENDPOINT} returning id) insert into outbox.webhook_ranges"
        " (endpoint_id, number, is_skipped, event_types, starts, chosen_at, chosen_by)"
        " select id, 1, false, '{*}', row(1, '1:1:'::pg_snapshot, null, '0'::xid8, '')::outbox.log_position, now(),"
        " 'ann' from made"
    ),
    "every webhook endpoint has one range that it is sent": ENDPOINT,
    "the balances of a closed month stay as they were": (
        "with closed as (insert into ledger.closed_months values ('2020-01-01', now(), 'ann', '{}') returning month)"
        " insert into ledger.closed_balances select month, id, 1 from closed, ledger.accounts limit 1"
    ),
    "every cause posted what its rule says": (
        "update ledger.transfers set credit_account = replace(credit_account, 'pending:', 'available:')"
        " where debit_account like 'provider_receivable:%%'"
    ),
    "every capture is owed to the merchant": (
        "delete from ledger.postings where payment_id = %(p)s and rule = 'captured'"
    ),
    "every settlement is available to the merchant": (
        "delete from ledger.postings where payment_id = %(p)s and rule = 'settled'"
    ),
    "every fact is known by its key": "delete from surety.fact_keys where kind = 'captured'",
    "every reference in use belongs to a live payment": (
        "insert into surety.payment_references (merchant_id, reference, payment_id)"
        " select merchant_id, 'order-1', 'pay_that_never_was' from surety.payments where id = %(p)s"
    ),
    "a customer is found by its e-mail address": (
        "insert into surety.customers (id, merchant_id, livemode, email, folded_email, provider, provider_account,"
        " created_at, updated_at) select 'cus_' || substr(id, 5), merchant_id, livemode, 'ZO\u00cb@shop.example',"
        " 'zo\u00cb@shop.example', 'stripe', '', now(), now() from surety.payments where id = %(p)s"
    ),
    "a payment is found by its metadata and e-mail address": (
        "insert into surety.payment_labels (merchant_id, name, value, payment_id)"
        " select merchant_id, 'metadata.cart', '9', id from surety.payments where id = %(p)s"
    ),
    "every refund is in the state of its last step": f"{REFUND} 'succeeded' from surety.payments where id = %(p)s",
    "every refund step starts where the last ended": (
        f"with made as ({REFUND} 'pending' from surety.payments where id = %(p)s returning id)"
        " insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)"
        " select id, 2, 'succeeded', 'failed', 'test', now(), 'test' from made"
    ),
    "every refunded amount is the sum of its refunds": (f"{REFUND} 'succeeded' from surety.payments where id = %(p)s"),
    "every reserved balance is the sum of its live refunds": (
        f"{REFUND} 'pending' from surety.payments where id = %(p)s"
    ),
    "every refund that has ended has moved the money of its state": (
        f"{REFUND.replace('now()', LONG_AGO)} 'succeeded' from surety.payments where id = %(p)s"
    ),
    "every dispute's withdrawn amount is the sum of its balance transactions": (
        f"update surety.disputes set updated_at = {LONG_AGO}"
    ),
    "every dispute is as last fetched": "update surety.disputes set status = 'won'",
    "every dispute has posted what was last fetched": "delete from ledger.postings where rule = 'dispute_opened'",
    "every disputed balance is the sum of its open disputes": (
        "delete from ledger.balances where account_id like 'disputed:%%'"
    ),
    "every return is taken from the merchant": "delete from ledger.postings where rule = 'return_ach'",
    "no payment has two charges at the provider": (
        "with another as (insert into surety.provider_objects values ('stripe', '', 'ch_two', %(p)s))"
        " insert into surety.facts (id, payment_id, provider, account, livemode, object_id, kind, source, recorded_at)"
        " values ('fct_two', %(p)s, 'stripe', '', false, 'ch_two', 'captured', 'poll', now())"
    ),
    "every lease is renewed or taken over": (
        "insert into outbox.batches (handler, event_ids, first_id, last_id, fence, leased_by, leased_until, claimed_at)"
        " values ('expect_settlement', array[%(p)s], '', '', 0, 'w', now() - interval '11 minutes', now())"
    ),
    "every event is in at most one place per handler": (
        "with held as (insert into outbox.batches"
        " (handler, event_ids, first_id, last_id, fence, leased_by, leased_until, claimed_at)"
        " values ('expect_settlement', array['evt_1'], '', '', 0, 'w', now(), now()))"
        " insert into outbox.retries (handler, event_id, due_at) values ('expect_settlement', 'evt_1', now())"
    ),
    "no payment is forgotten": "update outbox.handlers set seen = pg_current_snapshot() where handler <> %(p)s",
    "every met expectation belongs to a settled payment": (
        "insert into surety.expectations (payment_id, kind, opened_at, due_at, met_at)"
        " select id, 'settlement', now(), now(), now() from surety.payments where state = 'disputed' and id <> %(p)s"
    ),
    "the counters of money limits are what was accepted": (
        "insert into surety.accepted_money (merchant_id, currency, day, payments, amount_minor)"
        " select merchant_id, 'usd', '2020-01-01', 1, 1 from surety.payments where id = %(p)s"
    ),
    "no payment on hold was sent to the provider": HOLD,
    "merchants see every hold as it is": HOLD,
    "every overdue settlement is a discrepancy": (
        "insert into surety.expectations (payment_id, kind, opened_at, due_at)"
        " values (%(p)s, 'settlement', now() - interval '1 day', now() - interval '11 minutes')"
    ),
    "no cause opens a second discrepancy": (
        "insert into surety.discrepancies (id, kind, subject, occurrence, severity, detail, fields, opened_at,"
        " closed_at, closed_as, closed_by, closed_because)"
        " select 'dis_' || n, 'fee', %(p)s, n, 'warning', 'x', '[1]', now(), now(), 'explained', 'x', 'x'"
        " from generate_series(1, 2) as n"
    ),
}


@pytest.fixture
def payment_id(conn: Connection) -> str:
    """A settled payment, beside one that was returned, one that failed, a new one and a disputed one."""
    _, key_hash = add_merchant(conn)
    [returned] = pay(conn, key_hash, rail="ach")
    record(conn, [as_bank_fact(fact(returned, kind, kind, 10000)) for kind in ("captured", "returned")])
    failed, _, disputed, settled = pay(conn, key_hash, 4)
    record(conn, [fact(disputed, "captured", "ch", 10000), fact(disputed, "dispute_opened", "dp", 10000)])
    record(conn, [fact(failed, "failed", "pi", data={"failure": {"code": "card_declined"}})])
    record(conn, [fact(settled, "captured", "ch", 10000), money(settled, "txn", "charge", 10000, 320)])
    record(conn, [fact(settled, "available", "txn", 10000)])
    return settled


def test_every_invariant_is_proved_to_catch_its_violation(conn: Connection) -> None:
    names = [row[0] for row in conn.execute("select name from surety.check_invariants()")]
    assert sorted(names) == sorted(VIOLATIONS)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_an_invariant_catches_its_violation(conn: Connection, payment_id: str, name: str) -> None:
    assert violations(conn) == {}
    violate(conn, VIOLATIONS[name], payment_id)
    assert name in violations(conn)


def test_a_wrong_amount_and_a_wrong_state_each_differ_from_the_facts(conn: Connection, payment_id: str) -> None:
    for change in ("captured_minor = captured_minor - 1", "refunded_minor = 1", "at_risk_minor = 1"):
        with conn.transaction(force_rollback=True):
            violate(conn, f"update surety.payments set {change} where id = %(p)s", payment_id)
            assert subjects(conn, "payments_match_facts") == [payment_id]
    violate(conn, "update surety.payments set state = 'confirmed' where id = %(p)s", payment_id)
    assert subjects(conn, "payments_match_facts") == [payment_id]


def test_money_that_came_back_without_its_news_is_found_after_a_week(conn: Connection) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])

    def moved(category: str, source: str, amount: int) -> Fact:
        origin = fact(payment_id, "money", source)["object_id"]
        return money(payment_id, f"txn_{category}", category, amount, data={"source": origin})

    record(conn, [fact(payment_id, "captured", "ch", 10000), fact(payment_id, "refund_succeeded", "re", 2500)])
    record(conn, [fact(payment_id, "dispute_lost", "dp", 4000)])
    record(conn, [moved("refund", "re", -2500), moved("dispute", "dp", -4000)])
    move_clock(conn, "8 days")
    assert not violations(conn)
    record(conn, [moved("refund_failure", "re", 2500), moved("dispute_reversal", "dp", 4000)])
    assert not violations(conn)
    move_clock(conn, "16 days")
    query = "select r.id, d.id from surety.refunds as r join surety.disputes as d using (payment_id)"
    [(refund_id, dispute_id)] = conn.execute(query).fetchall()
    assert subjects(conn, "refunds_match_balance_transactions") == [refund_id]
    assert subjects(conn, "disputes_match_balance_transactions") == [dispute_id]
    record(
        conn, [fact(payment_id, "refund_failed", "re", 2500), fact(payment_id, "dispute_won", "dp", 4000, revision=1)]
    )
    assert not violations(conn)


def test_the_views_of_the_schema_are_the_invariants(conn: Connection) -> None:
    assert conn.execute("select count(*) from surety.check_invariants() where name is null").fetchone() == (0,)
    merchant_id, _ = add_merchant(conn)
    with conn.transaction(force_rollback=True):
        conn.execute("set local role surety_owner")
        conn.execute("drop view invariant.debits_equal_credits")
        conn.execute("create view invariant.merchants_are_few as select id as subject from surety.merchants")
        conn.execute("comment on view invariant.merchants_are_few is 'merchants are few'")
        checked = {name: rest for name, *rest in conn.execute("select * from surety.check_invariants()").fetchall()}
    assert "debits equal credits, per currency" not in checked
    assert checked["merchants are few"] == [1, merchant_id, "invariant.merchants_are_few"]


def test_auditors_read_every_invariant_and_others_none(conn: Connection, connect: Connect, payment_id: str) -> None:
    views = [view for (view,) in conn.execute("select view_name from surety.check_invariants()").fetchall()]
    for view in views:
        assert connect("auditor").execute(f"select count(subject) from {view}".encode()).fetchall() == [(0,)]
    assert connect("auditor").execute("select sum(violations) from surety.check_invariants()").fetchall() == [(0,)]
    for kind in OTHER_KINDS:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connect(kind).execute(f"select from {views[0]}".encode())


def violate(conn: Connection, statement: str, payment_id: str) -> None:
    """Change rows as the server's owner can, with every trigger and foreign key off."""
    with conn.transaction():
        conn.execute("set local session_replication_role = replica")
        assert conn.execute(statement.encode(), {"p": payment_id}).rowcount > 0
        conn.execute("set local session_replication_role = origin")


def subjects(conn: Connection, view: str) -> list[str]:
    return [subject for (subject,) in conn.execute(f"select subject from invariant.{view}".encode()).fetchall()]
