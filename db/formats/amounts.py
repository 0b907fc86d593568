"""Amounts in major units, as files have them, as integers of minor units."""

from __future__ import annotations

import re
from typing import Literal

ZERO_DECIMALS = frozenset(
    {*("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga"), *("pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf")}
)
THREE_DECIMALS = frozenset({"bhd", "iqd", "jod", "kwd", "lyd", "omr", "tnd"})
CURRENCY = re.compile(r"[a-z]{3}")
AMOUNT = re.compile(
    r"([+\-\N{MINUS SIGN}]?)((?:\d+|\d{1,3}(?:([.,' \N{NO-BREAK SPACE}\u202f])\d{3})+))(?:([.,])(\d+))?"
)
MINOR_MAX = 2**63 - 1

DecimalSeparator = Literal[".", ","]


class Unreadable(ValueError):
    """A value breaks a rule; the message is the rule."""


def exponent_of(currency: str) -> int:
    """The decimals of a currency's minor unit, as at Stripe. Raises Unreadable for a text that is no code."""
    if not CURRENCY.fullmatch(currency):
        raise Unreadable("a currency has three letters")
    return 0 if currency in ZERO_DECIMALS else 3 if currency in THREE_DECIMALS else 2


def minor_units(text: str, currency: str, decimal: DecimalSeparator | None = None) -> int:
    """An amount of a currency in minor units: `1,234.50` and `1234,5` of usd are 123450.

    `decimal` is the decimal separator; None accepts both where only one reading is possible. Raises Unreadable.
    """
    exponent = exponent_of(currency)
    text = text.strip()
    found = AMOUNT.fullmatch(text)
    if found is None:
        raise Unreadable("an amount has digits, a sign before them and one decimal separator")
    sign: str = found[1]
    whole: str = found[2]
    thousands: str | None = found[3]
    separator: str | None = found[4]
    fraction: str | None = found[5]
    if separator is None and thousands in {".", ","} and (decimal is None or thousands == decimal):
        # A lone separator with three digits behind it: decimals of a currency that has three, else ambiguous.
        if whole.count(thousands) == 1 and (exponent == 3 or decimal == thousands):
            whole, _, fraction = whole.partition(thousands)
            thousands = None
        elif whole.count(thousands) == 1 or decimal == thousands:
            raise Unreadable(f"an amount of {currency} has at most {exponent} decimals, and {text!r} may be thousands")
    elif separator is not None and (separator == thousands or decimal not in {None, separator}):
        raise Unreadable(f"the decimal separator is {decimal!r}" if decimal else "an amount has one decimal separator")
    digits = (fraction or "").rstrip("0")
    if len(digits) > exponent:
        raise Unreadable(f"an amount of {currency} has at most {exponent} decimals")
    if thousands:
        whole = whole.replace(thousands, "")
    minor = int(whole + digits.ljust(exponent, "0"))
    if minor > MINOR_MAX:
        raise Unreadable("an amount has at most 19 digits")
    return -minor if sign in {"-", "\N{MINUS SIGN}"} else minor
