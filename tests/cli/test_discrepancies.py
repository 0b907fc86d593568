"""Discrepancies on the command line: an operator lists, shows and closes them, and the audit trail records it."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection, add_merchant, fact, pay, record


@pytest.fixture
def discrepancy(conn: Connection) -> tuple[str, str]:
    """A critical discrepancy's id, and the merchant of its payment."""
    merchant, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("select outbox.claim_batch('submit', 'worker-1')")
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency="eur")])
    [(found,)] = conn.execute("select id from report.discrepancies where is_critical").fetchall()
    return found, merchant


def test_closing_a_discrepancy_records_operator_and_reason(
    run: Run, conn: Connection, discrepancy: tuple[str, str]
) -> None:
    found, merchant = discrepancy
    [listed] = json.loads(said(run("discrepancies", "list", "--json")))
    assert (listed["id"], listed["is_critical"], listed["closed_at"]) == (found, True, None)
    assert f"{found} critical" in said(run("discrepancies", "show", found))
    assert found in said(run("discrepancies", "list"))
    assert said(run("discrepancies", "close", found, "--reason", "a refund by hand")) == f"{found} is closed"
    assert said(run("discrepancies", "close", found, "--reason", "another")) == f"{found} is closed already"
    assert json.loads(said(run("discrepancies", "list", "--json"))) == []
    assert said(run("discrepancies", "list")) == "no open discrepancies"
    shown = json.loads(said(run("discrepancies", "show", found, "--json")))
    assert shown in json.loads(said(run("discrepancies", "list", "--closed", "--json")))
    assert shown["closed_because"] == "a refund by hand"
    assert "a refund by hand" in said(run("discrepancies", "show", found))
    entries = conn.execute(
        "select actor, outcome, reason, merchant_id, snapshot ->> 'discrepancy' from audit.entries"
        " where kind = 'operator' and outcome like 'discrepancy%'"
    ).fetchall()
    assert entries == [("operator:tester", "discrepancy closed", "a refund by hand", merchant, found)]


def test_unknown_discrepancy_or_blank_reason_is_refused(run: Run, discrepancy: tuple[str, str]) -> None:
    found, _ = discrepancy
    for words in (("show", "dis_17"), ("close", "dis_17", "--reason", "none")):
        assert "ID: there is no discrepancy dis_17" in refused(run("discrepancies", *words))
    assert refused(run("discrepancies", "close", found, "--reason", " ")) == "--reason must say why"
