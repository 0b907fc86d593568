"""Money limits, velocity rules and holds on the command line; every change is audited."""

from __future__ import annotations

import json

import pytest

from app.status_findings import find_problems
from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection, add_merchant, create, pay, request, state_of

HELD = ("--subject", "email", "--per", "1h", "--count", "0", "--action", "hold")


@pytest.fixture
def merchant(conn: Connection) -> tuple[str, bytes]:
    return add_merchant(conn)


def audited(conn: Connection, outcome: str) -> list[tuple[str, str | None]]:
    """Who did it, and why."""
    query = "select actor, reason from audit.entries where kind = 'operator' and outcome = %s order by at"
    return conn.execute(query, (outcome,)).fetchall()


def test_a_money_limit_is_set_shown_and_removed(run: Run, conn: Connection, merchant: tuple[str, bytes]) -> None:
    merchant_id, key = merchant
    pay(conn, key, 2, amount=700)
    limit = ("merchants", "money-limits", merchant_id)
    assert said(run(*limit)) == "no limits"
    usd = (*limit, "--currency", "USD", "--count", "2", "--amount", "5000")
    assert said(run(*usd)) == f"{merchant_id} usd: at most 2 payments and 5000 minor units a day"
    assert said(run(*usd)).endswith("already")
    [row] = create(conn, [request(key)])
    assert row["problem"] == "limit-exceeded"
    [listed] = json.loads(said(run(*limit, "--json")))
    assert (listed["count"], listed["amount"], listed["count_today"], listed["amount_today"]) == (2, 5000, 2, 1400)
    assert merchant_id in said(run("merchants", "money-limits"))
    assert said(run(*limit, "--currency", "usd", "--none")) == f"{merchant_id} usd: no limit"
    assert audited(conn, "money limit set") == [("operator:tester", None)]
    assert audited(conn, "money limit removed") == [("operator:tester", None)]


def test_a_part_of_a_money_limit_that_is_not_named_stays(run: Run, conn: Connection) -> None:
    merchant_id, _ = add_merchant(conn)
    usd = ("merchants", "money-limits", merchant_id, "--currency", "usd")
    said(run(*usd, "--amount", "5000"))
    assert said(run(*usd, "--count", "9")) == f"{merchant_id} usd: at most 9 payments and 5000 minor units a day"
    assert said(run(*usd, "--count", "9")).endswith("a day already")
    [changed] = json.loads(said(run(*usd, "--amount", "0", "--json")))
    assert (changed["merchant"], changed["count"], changed["amount"]) == (merchant_id, 9, 0)
    assert json.loads(said(run(*usd, "--none", "--json"))) == []


def test_a_mistaken_money_limit_is_refused_with_the_option(run: Run, merchant: tuple[str, bytes]) -> None:
    merchant_id, _ = merchant
    limit = ("merchants", "money-limits", merchant_id)
    assert refused(run(*limit, "--count", "2")).startswith("--currency:")
    assert refused(run(*limit, "--currency", "usd")) == "give --count, --amount or both, or --none"
    assert refused(run(*limit, "--currency", "usd", "--count", "1", "--none")).startswith("give --count")
    assert refused(run(*limit, "--currency", "xyz", "--count", "1")).startswith(
        "--currency: xyz is not accepted; accepted are aud, cad, "
    )
    nowhere = ("merchants", "money-limits", "mer_none", "--currency", "usd", "--count", "1")
    assert refused(run(*nowhere)) == "there is no merchant mer_none"


def test_a_velocity_rule_is_added_listed_and_removed(run: Run, conn: Connection, merchant: tuple[str, bytes]) -> None:
    merchant_id, _ = merchant
    rule = said(run("velocity", "add", "--merchant", merchant_id, *HELD))
    [listed] = json.loads(said(run("velocity", "list", "--json")))
    assert (listed["id"], listed["merchant"], listed["period_seconds"], listed["action"]) == (
        rule,
        merchant_id,
        3600,
        "hold",
    )
    assert rule in said(run("velocity", "list"))
    assert said(run("velocity", "remove", rule)) == f"{rule} is removed"
    assert said(run("velocity", "remove", rule)) == f"{rule} is removed already"
    assert said(run("velocity", "list")) == "no rules"
    assert rule in said(run("velocity", "list", "--removed"))
    assert [actor for actor, _ in audited(conn, "velocity rule added")] == ["operator:tester"]
    assert [actor for actor, _ in audited(conn, "velocity rule removed")] == ["operator:tester"]


@pytest.mark.parametrize(
    ("per", "shown"),
    [("90s", "90 s"), ("60m", "1 h"), ("15m", "15 m"), ("24h", "24 h"), ("1d", "24 h"), ("7d", "7 d"), ("25h", "25 h")],
)
def test_period_of_a_rule_is_shown_in_a_unit_of_its_option(run: Run, per: str, shown: str) -> None:
    said(run("velocity", "add", "--subject", "email", "--per", per, "--count", "1", "--action", "hold"))
    assert f" {shown} " in said(run("velocity", "list"))


def test_a_mistaken_velocity_rule_is_refused_with_the_option(run: Run) -> None:
    start = ("velocity", "add", "--subject", "email", "--action", "hold")
    assert refused(run(*start, "--per", "1 week", "--count", "1")).startswith("--per:")
    assert refused(run(*start, "--per", "91d", "--count", "1")).startswith("--per:")
    assert refused(run(*start, "--per", "1d")) == "give --count, --amount or both"
    assert refused(run(*start, "--per", "1d", "--amount", "1")).startswith("--currency:")
    report = refused(run(*start, "--per", "1d", "--count", "1", "--currency", "xyz"))
    assert report.startswith("--currency: xyz is not accepted; accepted are ")
    assert refused(run(*start, "--per", "1d", "--count", "1", "--merchant", "mer_none")).startswith("--merchant:")
    assert refused(run("velocity", "remove", "vel_none")).startswith("ID: there is no rule vel_none")


def test_payments_on_hold_are_found_released_and_refused(
    run: Run, conn: Connection, merchant: tuple[str, bytes]
) -> None:
    merchant_id, key = merchant
    assert said(run("holds", "list")) == "no payment is on hold"
    said(run("velocity", "add", *HELD))
    first, second = sorted(pay(conn, key, 2, customer={"email": "ada@example.com"}))
    row = conn.execute("select surety.read_status()").fetchone()
    assert row is not None
    [finding] = [finding for finding in find_problems(row[0]) if finding.id == "held-payments"]
    assert (finding.urgency, finding.what[:20], finding.next) == (
        1,
        "2 payments on hold, ",
        f"surety holds show {first}",
    )
    listed = json.loads(said(run("holds", "list", "--merchant", merchant_id, "--json")))
    assert {(each["id"], each["status"]) for each in listed} == {(first, "open"), (second, "open")}
    assert first in said(run("holds", "list"))
    open_hold = said(run("holds", "show", first))
    assert "more than 0 payments of one email within 1 h" in open_hold
    assert "without a decision" in open_hold
    assert said(run("holds", "release", first, "--reason", "known")) == f"{first}: it is sent to the provider"
    ended = said(run("holds", "show", first))
    assert "by operator:tester: known" in ended and "without a decision" not in ended
    assert "already" in said(run("holds", "release", first, "--reason", "known"))
    assert "released by operator:tester" in refused(run("holds", "refuse", first, "--reason", "fraud"))
    assert "failed" in said(run("holds", "refuse", second, "--reason", "fraud"))
    assert state_of(conn, second) == "failed"
    shown = json.loads(said(run("holds", "show", second, "--json")))
    assert (shown["status"], shown["closed"]["by"], shown["closed"]["because"]) == (
        "refused",
        "operator:tester",
        "fraud",
    )
    assert json.loads(said(run("holds", "list", "--json"))) == []
    assert len(json.loads(said(run("holds", "list", "--closed", "--json")))) == 2
    assert audited(conn, "payment released") == [("operator:tester", "known")]
    assert audited(conn, "payment refused") == [("operator:tester", "fraud")]
    assert "no payment on hold has the id pay_none" in refused(run("holds", "show", "pay_none"))
    assert "pay_none" in refused(run("holds", "release", "pay_none", "--reason", "known"))
    assert "on hold" in said(run("trace", first)) or "payment held" in said(run("trace", first))
