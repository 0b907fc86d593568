from __future__ import annotations

from datetime import date

import pytest

from db.banking_days import add_banking_days, bank_holidays, banking_days_between, is_banking_day

# As the Federal Reserve Banks publish them, weekdays only: month and day.
PUBLISHED = {
    2025: "1-1 1-20 2-17 5-26 6-19 7-4 9-1 10-13 11-11 11-27 12-25",
    2026: "1-1 1-19 2-16 5-25 6-19 9-7 10-12 11-11 11-26 12-25",
    2027: "1-1 1-18 2-15 5-31 7-5 9-6 10-11 11-11 11-25",
    2028: "1-17 2-21 5-29 6-19 7-4 9-4 10-9 11-23 12-25",
    2029: "1-1 1-15 2-19 5-28 6-19 7-4 9-3 10-8 11-12 11-22 12-25",
}


@pytest.mark.parametrize("year", PUBLISHED)
def test_holidays_are_those_that_the_federal_reserve_publishes(year: int) -> None:
    found = " ".join(f"{day.month}-{day.day}" for day in sorted(bank_holidays(year)))
    assert found == PUBLISHED[year]


def test_a_holiday_on_a_saturday_leaves_friday_open_and_one_on_a_sunday_closes_monday() -> None:
    assert is_banking_day(date(2026, 7, 3))
    assert not is_banking_day(date(2027, 7, 5))
    assert not is_banking_day(date(2023, 1, 2))


def test_juneteenth_is_a_holiday_from_2021_on() -> None:
    assert is_banking_day(date(2020, 6, 19))
    assert not is_banking_day(date(2023, 6, 19))


@pytest.mark.parametrize(
    ("start", "count", "end"),
    [
        (date(2026, 11, 25), 1, date(2026, 11, 27)),  # over Thanksgiving
        (date(2026, 11, 27), 2, date(2026, 12, 1)),  # over a weekend
        (date(2026, 11, 28), 0, date(2026, 11, 30)),
        (date(2026, 11, 25), 0, date(2026, 11, 25)),
        (date(2026, 11, 30), -2, date(2026, 11, 25)),
        (date(2027, 12, 31), 1, date(2028, 1, 3)),  # New Year's Day 2028 is a Saturday
    ],
)
def test_banking_days_are_added_over_weekends_and_holidays(start: date, count: int, end: date) -> None:
    assert add_banking_days(start, count) == end


def test_banking_days_between_exclude_the_first_day() -> None:
    assert banking_days_between(date(2026, 11, 25), date(2026, 12, 1)) == 3
    assert banking_days_between(date(2026, 12, 1), date(2026, 11, 25)) == -3
    assert banking_days_between(date(2026, 12, 1), date(2026, 12, 1)) == 0
