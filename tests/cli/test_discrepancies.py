"""Discrepancies on the command line: operators list, show, assign, snooze and resolve them, each change audited."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import Run, refused, said
from tests.support.operators import add_operator
from tests.support.payments import Connection, add_merchant, fact, pay, record


@pytest.fixture
def discrepancy(conn: Connection) -> tuple[str, str]:
    """A critical discrepancy's id, and the merchant of its payment."""
    merchant, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    conn.execute("select outbox.claim_batch('submit', 'worker-1')")
    record(conn, [fact(payment_id, "captured", "ch", 10000, currency="eur")])
    [(found,)] = conn.execute("select id from report.discrepancies where severity = 'critical'").fetchall()
    return found, merchant


def listed(run: Run, *words: str) -> list[Any]:
    return [each["id"] for each in json.loads(said(run("discrepancies", "list", *words, "--json")))]


def audited(conn: Connection) -> list[tuple[Any, ...]]:
    """Actor, outcome, reason, merchant and discrepancy of each change."""
    return conn.execute(
        "select actor, outcome, reason, merchant_id, snapshot ->> 'discrepancy' from audit.entries"
        " where kind = 'operator' and outcome like 'discrepancy%' order by id"
    ).fetchall()


def excesses(conn: Connection, *captured: int) -> list[str]:
    """The ids of discrepancies of payments of 10000 that were captured with other amounts."""
    _, key_hash = add_merchant(conn)
    for payment_id, amount in zip(pay(conn, key_hash, len(captured)), captured, strict=True):
        record(conn, [fact(payment_id, "captured", "ch", amount)])
    return [row[0] for row in conn.execute("select id from surety.discrepancies order by id")]


def test_resolving_a_discrepancy_records_operator_and_reason(
    run: Run, conn: Connection, discrepancy: tuple[str, str]
) -> None:
    found, merchant = discrepancy
    [one] = json.loads(said(run("discrepancies", "list", "--json")))
    assert (one["id"], one["severity"], one["closed"]) == (found, "critical", None)
    assert one["fields"] == [{"field": "currency", "here": "usd", "there": "eur", "delta_minor": None}]
    assert one["sources"]["here"] == one["payment"] and one["sources"]["there"].startswith("fct_")
    assert f"{found} critical" in said(run("discrepancies", "show", found))
    assert "currency: usd here, eur there" in said(run("discrepancies", "show", found))
    assert "currency: usd here, eur there" in said(run("discrepancies", "list"))
    resolve = ("discrepancies", "resolve", found, "--reason")
    assert "it would be closed as explained" in said(run(*resolve, "a refund by hand", "--dry-run"))
    assert said(run(*resolve, "a refund by hand")) == f"{found}: it is closed as explained"
    assert "a refund by hand" in said(run(*resolve, "another"))
    assert listed(run) == []
    assert said(run("discrepancies", "list")) == "no open discrepancies"
    shown = json.loads(said(run("discrepancies", "show", found, "--json")))
    assert shown in json.loads(said(run("discrepancies", "list", "--closed", "--json")))
    assert (shown["closed"]["how"], shown["closed"]["because"]) == ("explained", "a refund by hand")
    assert "a refund by hand" in said(run("discrepancies", "show", found))
    assert audited(conn) == [("operator:tester", "discrepancy resolved", "a refund by hand", merchant, found)]


def test_unknown_discrepancy_or_blank_reason_is_refused(run: Run, discrepancy: tuple[str, str]) -> None:
    found, _ = discrepancy
    for words in (
        *(("show", "dis_17"), ("resolve", "dis_17", "--reason", "none"), ("assign", "dis_17")),
        ("snooze", "dis_17", "--for", "1d", "--note", "why"),
    ):
        assert "ID: there is no discrepancy dis_17" in refused(run("discrepancies", *words))
    assert refused(run("discrepancies", "resolve", found, "--reason", " ")) == "--reason must say why"


def test_assigned_and_snoozed_discrepancies_are_filtered_and_audited(
    run: Run, conn: Connection, discrepancy: tuple[str, str]
) -> None:
    found, _ = discrepancy
    add_operator(conn, "bob", "finance")
    assert "no active operator eve" in refused(run("discrepancies", "assign", found, "--to", "eve"))
    assert "assigned to bob" in said(run("discrepancies", "assign", found, "--to", "bob", "--note", "yours"))
    assert "already" in said(run("discrepancies", "assign", found, "--to", "bob"))
    assert (listed(run, "--assignee", "bob"), listed(run, "--assignee", "tester")) == ([found], [])
    assert refused(run("discrepancies", "snooze", found, "--for", "91d", "--note", "x")).startswith("--for:")
    assert "snoozed until" in said(run("discrepancies", "snooze", found, "--for", "3d", "--note", "asked the bank"))
    assert (listed(run), listed(run, "--snoozed")) == ([], [found])
    shown = said(run("discrepancies", "show", found))
    assert "assignee  bob" in shown and "asked the bank" in shown and f"{found} snoozed" in shown
    said(run("discrepancies", "resolve", found, "--reason", "done"))
    assert "it is closed" in refused(run("discrepancies", "assign", found))
    assert [(entry[1], entry[2]) for entry in audited(conn)] == [
        ("discrepancy assigned", "yours"),
        ("discrepancy snoozed", "asked the bank"),
        ("discrepancy resolved", "done"),
    ]


def test_filters_select_by_kind_merchant_severity_age_and_amount(
    run: Run, conn: Connection, discrepancy: tuple[str, str]
) -> None:
    currency, merchant = discrepancy
    small, great = excesses(conn, 10002, 11000)[1:]
    assert listed(run, "--kind", "amount") == [small, great]
    assert listed(run, "--merchant", merchant) == [currency]
    assert listed(run, "--severity", "critical") == [currency, small, great]
    assert listed(run, "--severity", "notice") == listed(run, "--older-than", "1d") == []
    assert listed(run, "--max-delta", "2") == [small], "a currency has no small difference"


def test_several_are_resolved_only_if_as_many_match_as_expected(run: Run, conn: Connection) -> None:
    first, second, great = excesses(conn, 10001, 10002, 10003)
    resolve = ("discrepancies", "resolve", "--kind", "amount", "--max-delta", "2", "--reason", "tolerated")
    assert "--expect: say how many" in refused(run(*resolve))
    assert refused(run(*resolve, "--expect", "3")) == "--expect: 2 match, not 3: none is resolved"
    assert said(run(*resolve, "--dry-run")).endswith("2 discrepancies would be resolved")
    assert listed(run) == [first, second, great] and audited(conn) == []
    assert said(run(*resolve, "--expect", "2", "--resolution", "written_off")).endswith("2 discrepancies resolved")
    assert listed(run) == [great]
    assert sorted(entry[4] for entry in audited(conn)) == sorted([first, second])
    assert "ID: give either" in refused(run("discrepancies", "resolve", "--expect", "0", "--reason", "all"))
    assert "ID: give either" in refused(run("discrepancies", "resolve", great, "--kind", "fee", "--reason", "x"))
