"""Discrepancies by the operators' API: as documented, by role, each change once and audited."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from app.api.schemas.discrepancies import Discrepancy, DiscrepancyList, DiscrepancyOutcomeList
from tests.support.http_client import (
    CONTEXT,
    Connection,
    ServerProcess,
    assert_matches,
    broken_rules,
    problem,
    unique_name,
)
from tests.support.operators import add_operator
from tests.support.payments import add_merchant, fact, pay, record

PATH = "/v1/operator/discrepancies"


def client_of(api: ServerProcess, rights: Connection, role: str) -> httpx.Client:
    key = add_operator(rights, unique_name(role), role)
    return httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {key}"}, verify=CONTEXT, timeout=30)


@pytest.fixture(scope="module")
def ada(api: ServerProcess, rights: Connection) -> Iterator[httpx.Client]:
    with client_of(api, rights, "finance") as client:
        yield client


def excesses(rights: Connection, *captured: int) -> tuple[str, list[str]]:
    """A merchant, and the discrepancies of its payments of 10000, which were captured with other amounts."""
    merchant, key_hash = add_merchant(rights)
    for payment_id, amount in zip(pay(rights, key_hash, len(captured)), captured, strict=True):
        record(rights, [fact(payment_id, "captured", "ch", amount)])
    query = "select id from surety.discrepancies where merchant_id = %s order by id"
    return merchant, [row[0] for row in rights.execute(query, (merchant,))]


def audited(rights: Connection, answer: httpx.Response) -> list[tuple[Any, ...]]:
    query = "select outcome, reason, snapshot ->> 'discrepancy' from audit.entries where request_id = %s"
    return sorted(rights.execute(query, (answer.headers["request-id"],)).fetchall())


def test_a_discrepancy_is_shown_with_both_values_and_sources(ada: httpx.Client, rights: Connection) -> None:
    merchant, [found] = excesses(rights, 11000)
    listed = ada.get(PATH, params={"merchant": merchant}).json()
    assert_matches(listed, DiscrepancyList)
    shown = ada.get(f"{PATH}/{found}").json()
    assert_matches(shown, Discrepancy)
    assert listed["data"] == [shown]
    assert shown["fields"] == [{"field": "captured", "here": 10000, "there": 11000, "delta_minor": 1000}]
    assert shown["sources"]["here"] == shown["payment"] and shown["sources"]["there"].startswith("fct_")
    problem(ada.get(f"{PATH}/dis_17"), 404, "not-found")


def test_pages_and_filters_select_each_discrepancy_once(ada: httpx.Client, rights: Connection) -> None:
    merchant, made = excesses(rights, 10001, 10002, 10003)
    seen: list[str] = []
    query: dict[str, Any] = {"merchant": merchant, "limit": 2, "kind": "amount", "severity": "critical"}
    while True:
        page = ada.get(PATH, params=query).json()
        seen += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        query["starting_after"] = seen[-1]
    assert seen == made
    small = ada.get(PATH, params={"merchant": merchant, "max_delta": 2}).json()["data"]
    assert [each["id"] for each in small] == made[:2]
    before = {"merchant": merchant, "opened_before": "2020-01-01T00:00:00Z"}
    assert ada.get(PATH, params=before).json()["data"] == []


def test_each_change_is_made_once_and_audited(ada: httpx.Client, rights: Connection) -> None:
    _, [found] = excesses(rights, 11000)
    add_operator(rights, "bob", "support")
    until = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    for action, body, outcome in (
        ("assign", {"assignee": "bob", "note": "yours"}, "assigned"),
        ("snooze", {"until": until, "note": "asked"}, "snoozed"),
        ("resolve", {"reason": "a tip", "resolution": "explained"}, "resolved"),
    ):
        answer = ada.post(f"{PATH}/{found}/{action}", json=body)
        assert (answer.status_code, answer.json()["outcome"]) == (200, outcome)
        assert audited(rights, answer) == [(f"discrepancy {outcome}", body.get("note", body.get("reason")), found)]
    again = ada.post(f"{PATH}/{found}/resolve", json={"reason": "other"})
    assert again.json()["outcome"] == "unchanged" and audited(rights, again) == []
    shown = ada.get(f"{PATH}/{found}").json()
    assert (shown["status"], shown["assignee"], shown["closed"]["because"]) == ("closed", "bob", "a tip")
    problem(ada.post(f"{PATH}/{found}/assign", json={"assignee": None}), 409, "wrong-state")
    _, [other] = excesses(rights, 11000)
    problem(ada.post(f"{PATH}/{other}/assign", json={"assignee": "carol"}), 409, "wrong-state")
    late = {"until": "2099-01-01T00:00:00Z", "note": "later"}
    assert "90 days" in problem(ada.post(f"{PATH}/{other}/snooze", json=late), 409, "wrong-state")["detail"]


def test_several_are_resolved_only_if_as_many_match_as_expected(ada: httpx.Client, rights: Connection) -> None:
    merchant, made = excesses(rights, 10001, 10002, 10003)
    body = {"merchant": merchant, "max_delta": 2, "reason": "tolerated"}
    refused = problem(ada.post(f"{PATH}/resolve", json=body | {"expect": 3}), 409, "wrong-state")
    assert refused["detail"] == "2 match, not 3: none is resolved"
    dry = ada.post(f"{PATH}/resolve", json=body | {"expect": 2, "dry_run": True})
    assert [each["outcome"] for each in dry.json()["data"]] == ["would_resolve"] * 2 and audited(rights, dry) == []
    done = ada.post(f"{PATH}/resolve", json=body | {"expect": 2})
    assert_matches(done.json(), DiscrepancyOutcomeList)
    assert audited(rights, done) == [("discrepancy resolved", "tolerated", each) for each in sorted(made[:2])]
    rules = broken_rules(ada.post(f"{PATH}/resolve", json={"expect": 1, "reason": "all"}))
    assert rules == {("/kind", "required")}


def test_support_assigns_and_only_finance_resolves(api: ServerProcess, rights: Connection) -> None:
    _, [found] = excesses(rights, 11000)
    with client_of(api, rights, "support") as sam, client_of(api, rights, "viewer") as vic:
        assert sam.post(f"{PATH}/{found}/assign", json={"assignee": None, "note": "x"}).status_code == 200
        problem(sam.post(f"{PATH}/{found}/resolve", json={"reason": "x"}), 403, "scope-missing")
        problem(vic.post(f"{PATH}/{found}/assign", json={"assignee": None}), 403, "scope-missing")
        assert vic.get(f"{PATH}/{found}").status_code == 200
