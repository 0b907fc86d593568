"""Each dated rule by the writer itself: on the eve and on the morning of its first day."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import pytest

from db.banking_days import EASTERN, add_banking_days
from db.formats.nacha import dated_rules
from db.formats.nacha.problems import NachaError
from tests.ach.files import rules, write

DAY = timedelta(days=1)
DIRECTIONS = {"debit": ("225", "27"), "credit": ("220", "22"), "": ("225", "27")}


def refusal(terms: dict[str, Any], entry: dict[str, Any], at: datetime) -> list[tuple[str, str]]:
    """What the writer refuses of a file that is created at a time, with the next banking day as its default date."""
    following = add_banking_days(at.astimezone(EASTERN).date(), 1)
    try:
        write(({"effective_date": following} | terms, [entry]), created_at=at)
    except NachaError as refused:
        return rules(refused.problems)
    return []


def at_nine(day: date) -> datetime:
    return datetime.combine(day, time(9), EASTERN)


@pytest.mark.parametrize("rule", dated_rules.ENTRY_DESCRIPTIONS, ids=lambda rule: rule.purpose)
def test_a_company_entry_description_is_required_from_its_first_day_on(rule: Any) -> None:
    service_class, code = DIRECTIONS[rule.direction]
    terms = {
        "purpose": rule.purpose, "entry_class": rule.entry_class or "PPD", "service_class": service_class,
        "description": "BOOKS",
    }  # fmt: skip
    entry = {"transaction_code": code}
    assert refusal(terms, entry, at_nine(rule.since - DAY)) == []
    assert refusal(terms, entry, at_nine(rule.since)) == [("entry_description", f"is_that_of_{rule.purpose}")]
    assert refusal(terms | {"description": rule.description}, entry, at_nine(rule.since)) == []
    # The last minute of the eve in America/New_York is already the next day in UTC.
    eve = datetime.combine(rule.since - DAY, time(23, 59), EASTERN)
    assert refusal(terms, entry, eve.astimezone(UTC)) == []


def test_a_description_is_required_of_its_own_entry_class_and_direction_alone() -> None:
    on = date(2026, 3, 20)
    assert dated_rules.required_description("purchase", "WEB", is_credit=False, on=on) == "PURCHASE"
    assert dated_rules.required_description("purchase", "CCD", is_credit=False, on=on) is None
    assert dated_rules.required_description("purchase", "WEB", is_credit=True, on=on) is None
    assert dated_rules.required_description("wages", "PPD", is_credit=True, on=on) == "PAYROLL"
    assert dated_rules.required_description("other", "PPD", is_credit=True, on=on) is None


@pytest.mark.parametrize("limit", dated_rules.SAME_DAY_LIMITS, ids=lambda limit: str(limit.since))
def test_a_same_day_limit_holds_from_its_first_day_on(limit: Any) -> None:
    terms = {"service_class": "220", "entry_class": "PPD", "purpose": "other", "description": "REFUND"}

    def refused(day: date, amount_minor: int) -> list[tuple[str, str]]:
        entry = {"transaction_code": "22", "amount_minor": amount_minor}
        return refusal(terms | {"effective_date": day}, entry, at_nine(day))

    assert refused(limit.since, limit.amount_minor) == []
    assert refused(limit.since, limit.amount_minor + 1) == [("amount", "is_within_the_same_day_limit")]
    eve = add_banking_days(limit.since, -1)
    assert [rule for _, rule in refused(eve, limit.amount_minor)] in (
        ["is_within_the_same_day_limit"],
        ["is_eligible_for_same_day"],
    )


def test_debits_settle_on_the_same_day_from_september_2017_on() -> None:
    first = dated_rules.SAME_DAY_DEBITS_SINCE
    assert refusal({"effective_date": first}, {}, at_nine(first)) == []
    eve = add_banking_days(first, -1)
    assert refusal({"effective_date": eve}, {}, at_nine(eve)) == [("effective_date", "is_eligible_for_same_day")]


@pytest.mark.parametrize("window", dated_rules.SAME_DAY_WINDOWS[1:], ids=lambda window: str(window.deadline))
def test_a_same_day_window_is_open_from_its_first_day_on(window: Any) -> None:
    terms = {"service_class": "220", "entry_class": "PPD", "purpose": "other", "description": "REFUND"}

    def refused(day: date) -> list[tuple[str, str]]:
        at = datetime.combine(day, window.deadline, EASTERN)
        return refusal(terms | {"effective_date": day}, {"transaction_code": "22"}, at)

    assert refused(window.since) == []
    assert len(refused(add_banking_days(window.since, -1))) == 1


def test_a_file_after_the_last_window_has_no_same_day_entries() -> None:
    day = date(2026, 12, 1)
    at = datetime.combine(day, time(16, 45, 1), EASTERN)
    assert refusal({"effective_date": day}, {}, at) == [("effective_date", "precedes_the_last_same_day_deadline")]
    assert dated_rules.earliest_effective_date(at, 100, is_credit=False, entry_class="WEB") == date(2026, 12, 2)
    assert dated_rules.earliest_effective_date(at_nine(day), 100, is_credit=False, entry_class="WEB") == day
    assert dated_rules.next_same_day_deadline(at) is None
    assert dated_rules.next_same_day_deadline(at_nine(day)) == datetime(2026, 12, 1, 10, 30, tzinfo=EASTERN)
    assert dated_rules.same_day_deadlines(date(2026, 11, 26)) == ()


@pytest.mark.parametrize(
    ("service_class", "code", "effective", "rule"),
    [
        ("225", "27", date(2026, 12, 2), None),
        ("225", "27", date(2026, 12, 3), "is_within_the_days_ahead"),
        ("220", "22", date(2026, 12, 3), None),
        ("220", "22", date(2026, 12, 4), "is_within_the_days_ahead"),
        ("225", "27", date(2026, 11, 30), "is_not_past"),
        ("225", "27", date(2026, 12, 5), "is_a_banking_day"),
        ("225", "27", date(2026, 12, 25), "is_a_banking_day"),
    ],
)
def test_effective_dates_are_banking_days_that_are_near(
    service_class: str, code: str, effective: date, rule: str | None
) -> None:
    terms = {"service_class": service_class, "effective_date": effective, "entry_class": "PPD", "purpose": "other"}
    found = refusal(terms, {"transaction_code": code}, at_nine(date(2026, 12, 1)))
    assert found == ([("effective_date", rule)] if rule else [])


def test_every_dated_rule_names_its_source() -> None:
    dated = (*dated_rules.SAME_DAY_WINDOWS, *dated_rules.SAME_DAY_LIMITS, *dated_rules.ENTRY_DESCRIPTIONS)
    assert all("Nacha" in rule.source for rule in dated)
    assert {rule.purpose for rule in dated_rules.ENTRY_DESCRIPTIONS} <= set(dated_rules.PURPOSES)
