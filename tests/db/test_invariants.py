"""Each invariant catches its violation, and a sound database has none. Violations are made as the server's owner can,
with every trigger and foreign key off: nobody else could.
"""

from __future__ import annotations

import pytest

from tests.support.payments import Connection, add_merchant, as_bank_fact, fact, money, pay, record, violations

REFUND = (
    "insert into surety.refunds (id, payment_id, merchant_id, amount_minor, currency, provider, provider_account,"
    " is_ours, created_at, updated_at, state)"
    " select 'ref_' || repeat('0', 32), id, merchant_id, 100, currency, provider, provider_account, true, now(), now(),"
)

# What is done to the newest settled payment, by the promise that it breaks. %(p)s is the payment.
VIOLATIONS: dict[str, str] = {
    "every payment stands where its last step ended": "update surety.payments set state = 'confirmed' where id = %(p)s",
    "every step starts where the last ended": (
        "update surety.steps set from_state = 'processing' where payment_id = %(p)s and to_state = 'confirmed'"
    ),
    "every step is legal": (
        "update surety.steps set from_state = 'settled' where payment_id = %(p)s and to_state = 'submitting'"
    ),
    "every state is what its facts say": "delete from surety.facts where payment_id = %(p)s",
    "every amount is what its facts say": "update surety.payments set captured_minor = 9999 where id = %(p)s",
    "every step has one audit entry": "delete from audit.entries where payment_id = %(p)s and version = 2",
    "every step has one event": "delete from outbox.events where aggregate_id = %(p)s and version = 2",
    "debits equal credits, per currency": (
        "update ledger.transfers set debit_account = 'provider_receivable:nobody:usd'"
        " where debit_account like 'provider_receivable:%%'"
    ),
    "every balance is the sum of its transfers": "delete from ledger.balances where account_id like 'available:%%'",
    "every cause posted what its rule says": (
        "update ledger.transfers set credit_account = replace(credit_account, 'pending:', 'available:')"
        " where debit_account like 'provider_receivable:%%'"
    ),
    "what is captured is owed to the merchant": (
        "delete from ledger.postings where payment_id = %(p)s and rule = 'captured'"
    ),
    "what is settled is available to the merchant": (
        "delete from ledger.postings where payment_id = %(p)s and rule = 'settled'"
    ),
    "every fact is known by its key": "delete from surety.fact_keys where kind = 'captured'",
    "every reference in use is of a payment that lives": (
        "insert into surety.payment_references (merchant_id, reference, payment_id)"
        " select merchant_id, 'order-1', 'pay_that_never_was' from surety.payments where id = %(p)s"
    ),
    "every refund stands where its last step ended": f"{REFUND} 'succeeded' from surety.payments where id = %(p)s",
    "every refund step starts where the last ended": (
        f"with made as ({REFUND} 'pending' from surety.payments where id = %(p)s returning id)"
        " insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)"
        " select id, 2, 'succeeded', 'failed', 'test', now(), 'test' from made"
    ),
    "every payment has given back what its refunds say": (
        f"{REFUND} 'succeeded' from surety.payments where id = %(p)s"
    ),
    "what is reserved for refunds is on its way": f"{REFUND} 'pending' from surety.payments where id = %(p)s",
    "every dispute stands as its last fetch told": "update surety.disputes set status = 'won'",
    "every dispute has posted what its last fetch told": "delete from ledger.postings where rule = 'dispute_opened'",
    "what disputes hold back is held": "delete from ledger.balances where account_id like 'disputed:%%'",
    "what came back is taken from the merchant": "delete from ledger.postings where rule = 'return_ach'",
    "no payment has two live objects at the provider": (
        "with another as (insert into surety.provider_objects values ('stripe', '', 'ch_two', %(p)s))"
        " insert into surety.facts (id, payment_id, provider, account, livemode, object_id, kind, source, recorded_at)"
        " values ('fct_two', %(p)s, 'stripe', '', false, 'ch_two', 'captured', 'poll', now())"
    ),
    "no batch outlives its lease unnoticed": (
        "insert into outbox.batches (handler, event_ids, first_id, last_id, fence, leased_by, leased_until, claimed_at)"
        " values ('settle', array[%(p)s], '', '', 0, 'w', now() - interval '11 minutes', now())"
    ),
    "every event is in at most one place per handler": (
        "with held as (insert into outbox.batches"
        " (handler, event_ids, first_id, last_id, fence, leased_by, leased_until, claimed_at)"
        " values ('settle', array['evt_1'], '', '', 0, 'w', now(), now()))"
        " insert into outbox.retries (handler, event_id, due_at) values ('settle', 'evt_1', now())"
    ),
    "no payment is forgotten": "update outbox.handlers set seen = pg_current_snapshot() where handler <> %(p)s",
    "what is expected is met by what came": (
        "insert into surety.expectations (payment_id, kind, opened_at, due_at, met_at)"
        " select id, 'settlement', now(), now(), now() from surety.payments where state = 'disputed' and id <> %(p)s"
    ),
    "what is overdue is told": (
        "insert into surety.expectations (payment_id, kind, opened_at, due_at)"
        " values (%(p)s, 'settlement', now() - interval '1 day', now() - interval '11 minutes')"
    ),
}


@pytest.fixture
def payment_id(conn: Connection) -> str:
    """A payment that has settled, beside one that came back, one that failed, one that nobody has looked at yet and
    one that is disputed.
    """
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
    with conn.transaction():
        conn.execute("set local session_replication_role = replica")
        changed = conn.execute(VIOLATIONS[name].encode(), {"p": payment_id}).rowcount
    assert changed > 0
    assert name in violations(conn)
