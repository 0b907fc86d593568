"""Payouts on the command line."""

from __future__ import annotations

import json

from psycopg.types.json import Jsonb

from tests.cash.test_payouts import payout_fact
from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection


def test_a_payout_is_listed_and_shown_with_its_balance_transactions(run: Run, conn: Connection) -> None:
    conn.execute("select surety.record_facts(%s, 'test')", (Jsonb([payout_fact("paid", "021000")]),))
    lines = [
        {"id": "txn_1", "category": "charge", "net": 150, "currency": "usd"},
        {"id": "txn_2", "category": "fee", "net": -50, "currency": "usd"},
        {"id": "txn_3", "category": "payout", "net": -100, "currency": "usd"},
    ]
    conn.execute("select surety.record_payout_lines('', 'po_1', %s)", (Jsonb(lines),))
    assert "not read" in said(run("payouts", "list"))
    conn.execute("select surety.end_payout_lines('', 'po_1')")
    [listed] = json.loads(said(run("payouts", "list", "--status", "paid", "--json")))
    assert (listed["id"], listed["amount_minor"], listed["trace_id"], listed["lines_minor"]) == (
        *("po_1", 100, "021000"),
        100,
    )
    assert said(run("payouts", "list", "--status", "failed")) == "no payouts"
    shown = json.loads(said(run("payouts", "show", "po_1", "--json")))
    assert [(line["category"], line["unrecognized"], line["net_minor"]) for line in shown["lines"]] == [
        ("charge", 1, 150),
        ("fee", 0, -50),
        ("payout", 0, -100),
    ]
    assert "2, they add up" in said(run("payouts", "show", "po_1"))
    assert "ID: there is no payout po_2" in refused(run("payouts", "show", "po_2"))


def test_a_payout_that_failed_after_it_was_paid_says_so(run: Run, conn: Connection) -> None:
    for status in ("paid", "failed"):
        conn.execute("select surety.record_facts(%s, 'test')", (Jsonb([payout_fact(status)]),))
    assert "failed after it was paid" in said(run("payouts", "list"))
