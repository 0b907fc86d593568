"""Entry classes, transaction codes, service classes and codes of addenda."""

from __future__ import annotations

from dataclasses import dataclass

CREDITS_ONLY, DEBITS_ONLY, MIXED, ADVICES = "220", "225", "200", "280"
SERVICE_CLASSES = frozenset({CREDITS_ONLY, DEBITS_ONLY, MIXED, ADVICES})


@dataclass(frozen=True, slots=True)
class EntryClass:
    """A Standard Entry Class code: how many addenda an entry has, of which type, and whether we write it."""

    code: str
    addenda_min: int
    addenda_max: int
    addenda_type: str = "05"
    written: bool = False


ENTRY_CLASSES = {
    each.code: each
    for each in (
        EntryClass("PPD", 0, 1, written=True), EntryClass("CCD", 0, 1, written=True),
        EntryClass("WEB", 0, 1, written=True),
        EntryClass("ACK", 0, 1), EntryClass("ADV", 0, 1), EntryClass("ARC", 0, 0), EntryClass("ATX", 0, 9999),
        EntryClass("BOC", 0, 0), EntryClass("CIE", 0, 1), EntryClass("COR", 1, 1, "98"), EntryClass("CTX", 0, 9999),
        EntryClass("DNE", 1, 1), EntryClass("ENR", 1, 9999), EntryClass("IAT", 7, 12, ""),
        EntryClass("MTE", 1, 1, "02"),
        EntryClass("POP", 0, 0), EntryClass("POS", 1, 1, "02"), EntryClass("RCK", 0, 0), EntryClass("SHR", 1, 1, "02"),
        EntryClass("TEL", 0, 0), EntryClass("TRC", 0, 0), EntryClass("TRX", 0, 9999), EntryClass("XCK", 0, 0),
    )
}  # fmt: skip
"""By code."""
COUNTED_CLASSES = frozenset({"CTX", "TRX", "ENR", "ATX"})
"""Their entries state the number of their addenda."""

# The second digit: 1 return or NOC of a credit, 2 credit, 3 prenote credit, 4 zero-dollar credit with remittance data,
# 6 return or NOC of a debit, 7 debit, 8 prenote debit, 9 zero-dollar debit with remittance data.
ACCOUNT_KINDS = {"2": "checking", "3": "savings", "4": "general_ledger", "5": "loan"}
PRENOTE_DIGITS = frozenset("38")
ZERO_DIGITS = frozenset("3489")
RETURN_DIGITS = frozenset("16")
CREDIT_DIGITS = frozenset("1234")
TRANSACTION_CODES = frozenset(
    {first + second for first in "234" for second in "12346789"}
    | {"51", "52", "53", "54", "55", "56"}
    | {f"8{digit}" for digit in range(1, 9)}
)
"""All that the rules assign. 55 is the debit that reverses a credit to a loan; 81 to 88 are advices (ADV)."""


def is_credit(transaction_code: str) -> bool:
    """Whether an entry counts as a credit in the control totals."""
    if transaction_code[:1] == "8":
        return transaction_code[1:] in {"1", "3", "5", "7"}
    return transaction_code[1:] in CREDIT_DIGITS


RETURN_CODES = frozenset(
    f"R{number:02}" for number in (*range(1, 48), *range(50, 54), 61, 62, 67, 68, 69, *range(70, 78), *range(80, 86))
)
"""Assigned ones. Others are read as well, with a warning."""
DISHONORED_CODES = frozenset({"R61", "R62", "R67", "R68", "R69", "R70"})
CONTESTED_CODES = frozenset(f"R{number}" for number in range(71, 78))
CHANGE_CODES = frozenset({*(f"C{number:02}" for number in range(1, 10)), "C13", "C14"})
REFUSED_CHANGE_CODES = frozenset(f"C{number}" for number in range(61, 70))


def check_digit(routing: str) -> int:
    """The ninth digit of a routing number, from its first eight."""
    one, two, three, four, five, six, seven, eight = map(int, routing[:8])
    return -(3 * (one + four + seven) + 7 * (two + five + eight) + three + six) % 10


def is_routing_number(text: str) -> bool:
    """Whether a text is nine ASCII digits, not all zero, of which the last is the check digit."""
    return (
        len(text) == 9 and text.isascii() and text.isdigit() and text != "0" * 9 and check_digit(text) == int(text[8])
    )
