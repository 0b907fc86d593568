"""The four classes: each record is in exactly one, and their sum is all records."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from typing import Any

from tests.cli.conftest import Run, said
from tests.support.payments import Connection, add_merchant, as_bank_fact, fact, money, pay, record

EXPECT = (
    "insert into surety.expectations (payment_id, kind, opened_at, due_at, met_at)"
    " values (%s, 'settlement', now(), now() + %s::interval, case when %s then now() end)"
)


def listed(run: Run, chosen: str) -> set[str]:
    found = json.loads(said(run("reconciliation", "--class", chosen, "--json")))
    assert all(each["class"] == chosen for each in found)
    return {each["id"] for each in found}


def counted(run: Run) -> dict[str, dict[str, Any]]:
    return {each["record"]: each for each in json.loads(said(run("reconciliation", "--json")))}


def test_each_record_of_a_random_population_is_in_one_class(run: Run, conn: Connection) -> None:
    chance = random.Random(18)
    _, key_hash = add_merchant(conn)
    expected: dict[str, set[str]] = {"pending": set(), "overdue": set(), "discrepant": set(), "explained": set()}
    for payment_id in pay(conn, key_hash, 24):
        is_met, is_late, is_excess = (chance.random() < 0.4 for _ in range(3))
        record(conn, [fact(payment_id, "captured", "ch", 11000 if is_excess else 10000)])
        conn.execute(EXPECT, (payment_id, "-1 hour" if is_late else "1 hour", is_met))
        place = "discrepant" if is_excess else "explained" if is_met else "overdue" if is_late else "pending"
        expected[place].add(payment_id)
    conn.execute("select surety.open_overdue_discrepancies()")
    assert all(expected.values()), "the population has records of each class"
    assert {place: listed(run, place) for place in expected} == expected
    payments = counted(run)["payment"]
    assert {place: payments[place] for place in expected} == {place: len(ids) for place, ids in expected.items()}
    assert payments["records"] == 24 == sum(len(ids) for ids in expected.values())


def test_refunds_disputes_and_unmatched_discrepancies_are_records(run: Run, conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    refunded, disputed, odd = pay(conn, key_hash, 3)
    for payment_id in (refunded, disputed, odd):
        record(conn, [fact(payment_id, "captured", "ch", 10000)])
    record(conn, [fact(refunded, "refund_pending", "re_1", 100), fact(refunded, "refund_succeeded", "re_2", 100)])
    data = {"status": "needs_response", "reason": "fraudulent", "evidence_due_at": "2020-01-01T00:00:00Z"}
    record(conn, [fact(disputed, "dispute_opened", "dp", 10000, data=data)])
    record(conn, [money(odd, "txn_odd", "unknown", 100)])
    found = counted(run)
    refunds, disputes, other = found["refund"], found["dispute"], found["other"]
    assert (refunds["pending"], refunds["explained"], refunds["records"]) == (1, 1, 2)
    assert (disputes["overdue"], disputes["records"]) == (1, 1)
    assert (other["discrepant"], other["records"]) == (1, 1)
    assert said(run("reconciliation", "--class", "overdue")) != "no record is overdue"
    [(discrepancy,)] = conn.execute("select id from surety.discrepancies").fetchall()
    assert listed(run, "discrepant") == {discrepancy}


def test_a_payout_is_explained_by_the_bank_where_a_bank_account_is_known(run: Run, conn: Connection) -> None:
    payout = as_bank_fact(fact(None, "payout", "po", 100)) | {
        "provider": "stripe", "data": {"status": "paid"}, "occurred_at": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    record(conn, [payout])
    assert "payout" not in counted(run)
    conn.execute(
        "insert into surety.bank_accounts (id, digest, hint, bank, currency, created_at)"
        " values ('bac_1', 'x', '1234', 'Bank', 'usd', now())"
    )
    assert (counted(run)["payout"]["pending"], counted(run)["payout"]["records"]) == (1, 1)
    conn.execute("update surety.payouts set created_at = now() - interval '30 days'")
    assert listed(run, "overdue") == {payout["object_id"]}
    conn.execute("update surety.payouts set matched_minor = expected_minor")
    assert listed(run, "explained") == {payout["object_id"]}
