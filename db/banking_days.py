"""Banking days: the days on which the Federal Reserve Banks are open, for any year from 1986 on.

A holiday on a Sunday is observed on Monday. One on a Saturday is not observed: the Friday before is a banking day.
Source: Federal Reserve Financial Services, "Federal Reserve Bank Holiday Schedules"; 5 U.S.C. 6103 for the days.
"""

from __future__ import annotations

from datetime import date, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

EASTERN = ZoneInfo("America/New_York")
"""The zone of the ACH operators' windows and of a banking day."""
DAY = timedelta(days=1)
MONDAY, THURSDAY, SATURDAY, SUNDAY = 0, 3, 5, 6

FIXED_DATES = ((1, 1, 1871), (6, 19, 2021), (7, 4, 1871), (11, 11, 1978), (12, 25, 1871))
"""(month, day, first year): New Year's Day, Juneteenth, Independence Day, Veterans Day, Christmas Day."""
WEEKDAYS_OF_MONTHS = (
    (1, MONDAY, 3, 1986), (2, MONDAY, 3, 1971), (5, MONDAY, -1, 1971),
    (9, MONDAY, 1, 1895), (10, MONDAY, 2, 1971), (11, THURSDAY, 4, 1942),
)  # fmt: skip
"""(month, weekday, which one, first year): Martin Luther King Jr., Presidents, Memorial, Labor, Columbus Day,
Thanksgiving.
"""


@lru_cache(maxsize=256)
def bank_holidays(year: int) -> frozenset[date]:
    """The weekdays of a year on which the Federal Reserve Banks are closed."""
    days = {date(year, month, day) for month, day, since in FIXED_DATES if year >= since}
    observed = {day + DAY if day.weekday() == SUNDAY else day for day in days if day.weekday() != SATURDAY}
    moving = {
        weekday_of_month(year, month, weekday, which)
        for month, weekday, which, since in WEEKDAYS_OF_MONTHS
        if year >= since
    }
    return frozenset(observed | moving)


def weekday_of_month(year: int, month: int, weekday: int, which: int) -> date:
    """The first, second … or, with -1, the last such weekday of a month."""
    if which < 0:
        last = (date(year, month, 28) + 4 * DAY).replace(day=1) - DAY
        return last - DAY * ((last.weekday() - weekday) % 7)
    first = date(year, month, 1)
    return first + DAY * ((weekday - first.weekday()) % 7 + 7 * (which - 1))


def is_banking_day(day: date) -> bool:
    """Whether the Federal Reserve Banks are open."""
    return day.weekday() < SATURDAY and day not in bank_holidays(day.year)


def add_banking_days(day: date, count: int) -> date:
    """The day that many banking days later, or earlier if negative. With 0: the day itself, or the next banking day."""
    if count == 0:
        return day if is_banking_day(day) else add_banking_days(day, 1)
    step = DAY if count > 0 else -DAY
    while count:
        day += step
        if is_banking_day(day):
            count += -1 if step == DAY else 1
    return day


def banking_days_between(start: date, end: date) -> int:
    """The banking days after `start` up to `end`; negative if `end` is earlier."""
    if end < start:
        return -banking_days_between(end, start)
    return sum(is_banking_day(start + DAY * number) for number in range(1, (end - start).days + 1))
