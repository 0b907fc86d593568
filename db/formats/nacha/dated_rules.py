"""Rules with a first day: same-day windows and limits, company entry descriptions, how far ahead entries are sent.

Each row names its source. A rule holds for a file by the day of its creation in America/New_York, from that day's
start.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Literal, get_args

from db.banking_days import EASTERN, add_banking_days, is_banking_day

Purpose = Literal[
    "purchase", "wages", "reinitiation", "reversal", "return_fee", "account_verification", "prenote", "other"
]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
"""Why a batch is originated; some purposes have a company entry description of their own."""


@dataclass(frozen=True, slots=True)
class SameDayWindow:
    """An operator's deadline for entries that settle on the same day, in Eastern Time. Banks' own are earlier."""

    deadline: time
    since: date
    source: str


@dataclass(frozen=True, slots=True)
class SameDayLimit:
    """The largest amount of a same-day entry, in cents."""

    amount_minor: int
    since: date
    source: str


@dataclass(frozen=True, slots=True)
class EntryDescription:
    """The company entry description that a purpose requires. An empty class or direction means any."""

    purpose: Purpose
    entry_class: str
    direction: Literal["debit", "credit", ""]
    description: str
    since: date
    source: str


SAME_DAY_CREDITS_SINCE = date(2016, 9, 23)
SAME_DAY_DEBITS_SINCE = date(2017, 9, 15)
"""Nacha Operating Rules, "Same Day ACH: Moving Payments Faster", phases 1 and 2."""

SAME_DAY_WINDOWS = (
    SameDayWindow(time(10, 30), SAME_DAY_CREDITS_SINCE, 'Nacha, "Same Day ACH: Moving Payments Faster", phase 1'),
    SameDayWindow(time(14, 45), SAME_DAY_CREDITS_SINCE, 'Nacha, "Same Day ACH: Moving Payments Faster", phase 1'),
    SameDayWindow(time(16, 45), date(2021, 3, 19), 'Nacha, "Expanding Same Day ACH"; Federal Reserve, FedACH schedule'),
)
SAME_DAY_LIMITS = (
    SameDayLimit(25_000_00, SAME_DAY_CREDITS_SINCE, 'Nacha, "Same Day ACH: Moving Payments Faster"'),
    SameDayLimit(100_000_00, date(2020, 3, 20), 'Nacha, "Same Day ACH Dollar Limit Increase" of 2020'),
    SameDayLimit(1_000_000_00, date(2022, 3, 18), 'Nacha, "Increasing the Same Day ACH Dollar Limit" of 2022'),
)
ENTRY_DESCRIPTIONS = (
    EntryDescription("reversal", "", "", "REVERSAL", date(2013, 1, 1), "Nacha Operating Rules 2013, reversing entries"),
    EntryDescription(
        *("return_fee", "PPD", "debit", "RETURN FEE"),
        *(date(2013, 1, 1), "Nacha Operating Rules 2013, return fee entries"),
    ),
    EntryDescription(
        *("reinitiation", "", "debit", "RETRY PYMT"),
        *(date(2015, 9, 18), 'Nacha, "ACH Network Risk and Enforcement Topics": reinitiation'),
    ),
    EntryDescription(
        *("account_verification", "", "", "ACCTVERIFY"),
        *(date(2022, 9, 16), 'Nacha, "Micro-Entries", phase 1'),
    ),
    EntryDescription(
        *("purchase", "WEB", "debit", "PURCHASE"),
        *(date(2026, 3, 20), 'Nacha, "Company Entry Descriptions: PURCHASE"'),
    ),
    EntryDescription(
        *("wages", "PPD", "credit", "PAYROLL"),
        *(date(2026, 3, 20), 'Nacha, "Company Entry Descriptions: PAYROLL"'),
    ),
)
DEBIT_DAYS_AHEAD_MAX, CREDIT_DAYS_AHEAD_MAX = 1, 2
"""Banking days. Nacha Operating Rules, the operator's processing of effective entry dates."""
PRENOTE_DAYS = 3
"""Banking days after a prenote's settlement, from which entries may follow. Since 2014-09-19."""


def required_description(purpose: Purpose, entry_class: str, *, is_credit: bool, on: date) -> str | None:
    """The company entry description that the rules require of a batch on a day, or None."""
    for rule in ENTRY_DESCRIPTIONS:
        if (
            rule.purpose == purpose
            and rule.entry_class in {"", entry_class}
            and rule.direction in {"", "credit" if is_credit else "debit"}
            and rule.since <= on
        ):
            return rule.description
    return None


def same_day_limit(on: date) -> int:
    """The largest amount of a same-day entry on a day, in cents; 0 before there were any."""
    return max((limit.amount_minor for limit in SAME_DAY_LIMITS if limit.since <= on), default=0)


def same_day_deadlines(on: date) -> tuple[time, ...]:
    """The operators' same-day deadlines on a banking day, in Eastern Time; none on other days."""
    return tuple(window.deadline for window in SAME_DAY_WINDOWS if window.since <= on) if is_banking_day(on) else ()


def next_same_day_deadline(at: datetime) -> datetime | None:
    """The first same-day deadline of that day at or after a time; None after the last one."""
    local = at.astimezone(EASTERN)
    later = [
        deadline for deadline in same_day_deadlines(local.date()) if local.timetz().replace(tzinfo=None) <= deadline
    ]
    return datetime.combine(local.date(), later[0], EASTERN) if later else None


def same_day_obstacle(at: datetime, amount_minor: int, *, is_credit: bool, entry_class: str) -> str | None:
    """The rule that forbids that an entry settles on the day of its file; None if it may."""
    on = at.astimezone(EASTERN).date()
    if on < (SAME_DAY_CREDITS_SINCE if is_credit else SAME_DAY_DEBITS_SINCE) or entry_class == "IAT":
        return "is_eligible_for_same_day"
    if next_same_day_deadline(at) is None:
        return "precedes_the_last_same_day_deadline"
    return "is_within_the_same_day_limit" if amount_minor > same_day_limit(on) else None


def earliest_effective_date(at: datetime, amount_minor: int, *, is_credit: bool, entry_class: str) -> date:
    """The first effective entry date of an entry in a file of that time."""
    on = at.astimezone(EASTERN).date()
    same_day = same_day_obstacle(at, amount_minor, is_credit=is_credit, entry_class=entry_class) is None
    return on if same_day else add_banking_days(on, 1)


def latest_effective_date(at: datetime, *, is_credit: bool) -> date:
    """The last effective entry date that a file of that time may have."""
    return add_banking_days(at.astimezone(EASTERN).date(), CREDIT_DAYS_AHEAD_MAX if is_credit else DEBIT_DAYS_AHEAD_MAX)
