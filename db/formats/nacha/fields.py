"""The table of fields: each kind of record, each of its 94 positions, in the rulebook's order and words.

Positions count from 1 and include the last one, as in the rulebook. A form says what a field holds and what fills it:

constant  the text beside it
digits    zero-filled digits
optional  digits, or blank
date      YYMMDD; `optional_date` may be blank or zero
time      HHMM, or blank
text      left-justified, space-filled
required  text that is not blank
right     right-justified, space-filled, not blank
blank     reserved
raw       anything: records that are only read through
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

RECORD_CHARACTERS = 94
RECORDS_PER_BLOCK = 10
PADDING = "9" * RECORD_CHARACTERS

Form = Literal[
    "constant", "digits", "optional", "date", "optional_date", "time", "text", "required", "right", "blank", "raw"
]
CHARACTER = "[ -~]"
PATTERNS: dict[str, str] = {
    "digits": "[0-9]{{{0}}}",
    "optional": "(?:[0-9]{{{0}}}| {{{0}}})",
    "date": r"[0-9]{{2}}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])",
    "optional_date": r"(?:[0-9]{{2}}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])| {{6}}|0{{6}})",
    "time": "(?:(?:[01][0-9]|2[0-3])[0-5][0-9]| {{4}})",
    "text": CHARACTER + "{{{0}}}",
    "required": "(?! {{{0}}})" + CHARACTER + "{{{0}}}",
    "right": CHARACTER + "{{{1}}}[!-~]",
    "blank": " {{{0}}}",
    "raw": ".{{{0}}}",
}
WORDS: dict[Form, str] = {
    "digits": "is_filled_with_digits",
    "optional": "is_digits_or_blank",
    "date": "is_a_date_yymmdd",
    "optional_date": "is_a_date_yymmdd_or_blank",
    "time": "is_a_time_hhmm_or_blank",
    "text": "is_printable_ascii",
    "required": "is_not_blank",
    "right": "is_right_justified",
    "blank": "is_blank",
    "constant": "is_constant",
    "raw": "is_present",
}
"""The rule that a wrong field breaks, by its form."""


@dataclass(frozen=True, slots=True)
class NachaField:
    """A field: its name, its first and last position, its form. Values of `secret` fields appear in no error."""

    name: str
    first: int
    last: int
    form: Form
    constant: str = ""
    secret: bool = False
    place: slice = field(init=False, repr=False)
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        width = self.last - self.first + 1
        text = re.escape(self.constant) if self.form == "constant" else PATTERNS[self.form].format(width, width - 1)
        object.__setattr__(self, "place", slice(self.first - 1, self.last))
        object.__setattr__(self, "pattern", re.compile(text, re.DOTALL))

    @property
    def width(self) -> int:
        """The number of its characters."""
        return self.last - self.first + 1

    def value_of(self, text: str) -> str:
        """Its value in a record, without what fills it. Leading spaces of left-justified text are kept."""
        value = text[self.place]
        if self.form == "right":
            return value.lstrip(" ")
        return value.rstrip(" ") if self.form != "raw" else value

    def fill(self, value: str | int) -> str:
        """A value as it stands in a record. It may be too long; `broken_rule` and the record's length show that."""
        text = str(value)
        match self.form:
            case "constant":
                return self.constant
            case "digits" | "optional" | "date" | "optional_date" | "time":
                return text.rjust(self.width, "0") if text else " " * self.width
            case "right":
                return text.rjust(self.width)
            case "text" | "required" | "blank" | "raw":
                return text.ljust(self.width)

    def broken_rule(self, filled: str) -> str | None:
        """The rule that its characters break, or None."""
        if len(filled) != self.width:
            return f"has_at_most_{self.width}_characters"
        if self.pattern.fullmatch(filled):
            return None
        return WORDS["text" if self.form == "required" and filled.strip() else self.form]


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of record: its name, and its fields from position 1 to 94."""

    name: str
    fields: tuple[NachaField, ...]
    by_name: dict[str, NachaField] = field(init=False, repr=False)
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        joined = "".join(each.pattern.pattern for each in self.fields)
        object.__setattr__(self, "by_name", {each.name: each for each in self.fields})
        object.__setattr__(self, "pattern", re.compile(joined, re.DOTALL))


def layout(name: str, record_type: str, *rows: tuple[str, int, int, Form] | NachaField) -> Layout:
    """A layout from rows of its table; the record type stands in position 1."""
    fields = [NachaField("record_type", 1, 1, "constant", record_type)]
    fields += [row if isinstance(row, NachaField) else NachaField(*row) for row in rows]
    return Layout(name, tuple(fields))


def constant(name: str, first: int, last: int, text: str) -> NachaField:
    """A field that always holds the same text."""
    return NachaField(name, first, last, "constant", text)


def secret(name: str, first: int, last: int, form: Form) -> NachaField:
    """A field whose value appears in no error: an account number, or a person's name."""
    return NachaField(name, first, last, form, secret=True)


FILE_HEADER = layout(
    "file_header", "1",
    constant("priority_code", 2, 3, "01"),
    ("immediate_destination", 4, 13, "right"), ("immediate_origin", 14, 23, "right"),
    ("creation_date", 24, 29, "date"), ("creation_time", 30, 33, "time"), ("file_id_modifier", 34, 34, "required"),
    constant("record_size", 35, 37, "094"), constant("blocking_factor", 38, 39, "10"),
    constant("format_code", 40, 40, "1"),
    ("immediate_destination_name", 41, 63, "text"), ("immediate_origin_name", 64, 86, "text"),
    ("reference_code", 87, 94, "text"),
)  # fmt: skip
BATCH_HEADER = layout(
    "batch_header", "5",
    ("service_class", 2, 4, "digits"), ("company_name", 5, 20, "required"), ("company_data", 21, 40, "text"),
    ("company_id", 41, 50, "required"), ("entry_class", 51, 53, "required"),
    ("entry_description", 54, 63, "required"), ("descriptive_date", 64, 69, "text"),
    ("effective_date", 70, 75, "optional_date"), ("settlement_day", 76, 78, "optional"),
    ("originator_status", 79, 79, "digits"), ("odfi", 80, 87, "digits"), ("batch_number", 88, 94, "digits"),
)  # fmt: skip
IAT_BATCH_HEADER = layout(
    "iat_batch_header", "5",
    ("service_class", 2, 4, "digits"), ("iat_indicator", 5, 20, "text"), ("exchange_indicator", 21, 22, "required"),
    ("exchange_reference_indicator", 23, 23, "optional"), ("exchange_reference", 24, 38, "text"),
    ("destination_country", 39, 40, "required"), ("company_id", 41, 50, "required"),
    ("entry_class", 51, 53, "required"), ("entry_description", 54, 63, "required"),
    ("origin_currency", 64, 66, "required"), ("destination_currency", 67, 69, "required"),
    ("effective_date", 70, 75, "optional_date"), ("settlement_day", 76, 78, "optional"),
    ("originator_status", 79, 79, "digits"), ("odfi", 80, 87, "digits"), ("batch_number", 88, 94, "digits"),
)  # fmt: skip
ENTRY = layout(
    "entry", "6",
    ("transaction_code", 2, 3, "digits"), ("rdfi", 4, 11, "digits"), ("check_digit", 12, 12, "digits"),
    secret("account_number", 13, 29, "required"), ("amount", 30, 39, "digits"),
    ("individual_id", 40, 54, "text"), secret("name", 55, 76, "text"), ("discretionary_data", 77, 78, "text"),
    ("addenda_indicator", 79, 79, "digits"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ENTRY_COUNTED = layout(
    "entry_counted", "6",
    ("transaction_code", 2, 3, "digits"), ("rdfi", 4, 11, "digits"), ("check_digit", 12, 12, "digits"),
    secret("account_number", 13, 29, "required"), ("amount", 30, 39, "digits"),
    ("individual_id", 40, 54, "text"), ("addenda_count", 55, 58, "digits"), secret("name", 59, 74, "text"),
    ("reserved", 75, 76, "blank"), ("discretionary_data", 77, 78, "text"),
    ("addenda_indicator", 79, 79, "digits"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ENTRY_IAT = layout(
    "entry_iat", "6",
    ("transaction_code", 2, 3, "digits"), ("rdfi", 4, 11, "digits"), ("check_digit", 12, 12, "digits"),
    ("addenda_count", 13, 16, "optional"), ("reserved", 17, 29, "blank"), ("amount", 30, 39, "digits"),
    secret("account_number", 40, 74, "required"), ("reserved_2", 75, 76, "blank"),
    ("gateway_screening", 77, 77, "text"), ("second_screening", 78, 78, "text"),
    ("addenda_indicator", 79, 79, "digits"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ENTRY_ADV = layout(
    "entry_adv", "6",
    ("transaction_code", 2, 3, "digits"), ("rdfi", 4, 11, "digits"), ("check_digit", 12, 12, "digits"),
    secret("account_number", 13, 27, "required"), ("amount", 28, 39, "digits"),
    ("advice_routing_number", 40, 48, "raw"), ("file_identification", 49, 53, "raw"), ("operator_data", 54, 54, "raw"),
    secret("name", 55, 76, "text"), ("discretionary_data", 77, 78, "text"), ("addenda_indicator", 79, 79, "digits"),
    ("operator", 80, 87, "digits"), ("settlement_day", 88, 90, "digits"), ("sequence", 91, 94, "digits"),
)  # fmt: skip
ADDENDA_05 = layout(
    "addenda_05", "7",
    constant("type_code", 2, 3, "05"), ("information", 4, 83, "text"),
    ("addenda_sequence", 84, 87, "digits"), ("entry_sequence", 88, 94, "digits"),
)  # fmt: skip
ADDENDA_98 = layout(
    "addenda_98", "7",
    constant("type_code", 2, 3, "98"), ("code", 4, 6, "required"), ("original_trace_number", 7, 21, "digits"),
    ("reserved", 22, 27, "blank"), ("original_rdfi", 28, 35, "digits"), secret("corrected_data", 36, 64, "required"),
    ("reserved_2", 65, 79, "blank"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ADDENDA_98_REFUSED = layout(
    "addenda_98_refused", "7",
    constant("type_code", 2, 3, "98"), ("code", 4, 6, "required"), ("original_trace_number", 7, 21, "digits"),
    ("reserved", 22, 27, "blank"), ("original_rdfi", 28, 35, "digits"), secret("corrected_data", 36, 64, "required"),
    ("change_code", 65, 67, "required"), ("trace_sequence", 68, 74, "digits"),
    ("reserved_2", 75, 79, "blank"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ADDENDA_99 = layout(
    "addenda_99", "7",
    constant("type_code", 2, 3, "99"), ("code", 4, 6, "required"), ("original_trace_number", 7, 21, "digits"),
    ("date_of_death", 22, 27, "optional_date"), ("original_rdfi", 28, 35, "digits"),
    ("information", 36, 79, "text"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ADDENDA_99_DISHONORED = layout(
    "addenda_99_dishonored", "7",
    constant("type_code", 2, 3, "99"), ("code", 4, 6, "required"), ("original_trace_number", 7, 21, "digits"),
    ("reserved", 22, 27, "blank"), ("original_rdfi", 28, 35, "digits"), ("reserved_2", 36, 38, "blank"),
    ("return_trace_number", 39, 53, "digits"), ("return_settlement_day", 54, 56, "digits"),
    ("return_code", 57, 58, "digits"), ("information", 59, 79, "text"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ADDENDA_99_CONTESTED = layout(
    "addenda_99_contested", "7",
    constant("type_code", 2, 3, "99"), ("code", 4, 6, "required"), ("original_trace_number", 7, 21, "digits"),
    ("returned_date", 22, 27, "optional_date"), ("original_rdfi", 28, 35, "digits"),
    ("original_settlement_day", 36, 38, "optional"), ("return_trace_number", 39, 53, "digits"),
    ("return_settlement_day", 54, 56, "digits"), ("return_code", 57, 58, "digits"),
    ("dishonored_trace_number", 59, 73, "digits"), ("dishonored_settlement_day", 74, 76, "digits"),
    ("dishonored_code", 77, 78, "digits"), ("reserved", 79, 79, "blank"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ADDENDA_99_IAT = layout(
    "addenda_99_iat", "7",
    constant("type_code", 2, 3, "99"), ("code", 4, 6, "required"), ("original_trace_number", 7, 21, "digits"),
    ("date_of_death", 22, 27, "optional_date"), ("original_rdfi", 28, 35, "digits"),
    ("original_amount", 36, 45, "optional"), ("information", 46, 79, "text"), ("trace_number", 80, 94, "digits"),
)  # fmt: skip
ADDENDA_OTHER = layout("addenda_other", "7", ("type_code", 2, 3, "digits"), secret("information", 4, 94, "text"))
BATCH_CONTROL = layout(
    "batch_control", "8",
    ("service_class", 2, 4, "digits"), ("entry_count", 5, 10, "digits"), ("entry_hash", 11, 20, "digits"),
    ("debit_total", 21, 32, "digits"), ("credit_total", 33, 44, "digits"), ("company_id", 45, 54, "required"),
    ("authentication_code", 55, 73, "text"), ("reserved", 74, 79, "blank"),
    ("odfi", 80, 87, "digits"), ("batch_number", 88, 94, "digits"),
)  # fmt: skip
BATCH_CONTROL_ADV = layout(
    "batch_control_adv", "8",
    ("service_class", 2, 4, "digits"), ("entry_count", 5, 10, "digits"), ("entry_hash", 11, 20, "digits"),
    ("debit_total", 21, 40, "digits"), ("credit_total", 41, 60, "digits"), ("operator_data", 61, 79, "text"),
    ("odfi", 80, 87, "digits"), ("batch_number", 88, 94, "digits"),
)  # fmt: skip
FILE_CONTROL = layout(
    "file_control", "9",
    ("batch_count", 2, 7, "digits"), ("block_count", 8, 13, "digits"), ("entry_count", 14, 21, "digits"),
    ("entry_hash", 22, 31, "digits"), ("debit_total", 32, 43, "digits"), ("credit_total", 44, 55, "digits"),
    ("reserved", 56, 94, "blank"),
)  # fmt: skip
FILE_CONTROL_ADV = layout(
    "file_control_adv", "9",
    ("batch_count", 2, 7, "digits"), ("block_count", 8, 13, "digits"), ("entry_count", 14, 21, "digits"),
    ("entry_hash", 22, 31, "digits"), ("debit_total", 32, 51, "digits"), ("credit_total", 52, 71, "digits"),
    ("reserved", 72, 94, "blank"),
)  # fmt: skip
FILLER = Layout("padding", (NachaField("filler", 1, 94, "constant", PADDING),))
UNREADABLE = Layout("unreadable", (NachaField("content", 1, 94, "raw", secret=True),))

LAYOUTS = (
    *(FILE_HEADER, BATCH_HEADER, IAT_BATCH_HEADER, ENTRY, ENTRY_COUNTED, ENTRY_IAT, ENTRY_ADV),
    *(ADDENDA_05, ADDENDA_98, ADDENDA_98_REFUSED, ADDENDA_99, ADDENDA_99_DISHONORED, ADDENDA_99_CONTESTED),
    *(ADDENDA_99_IAT, ADDENDA_OTHER, BATCH_CONTROL, BATCH_CONTROL_ADV, FILE_CONTROL, FILE_CONTROL_ADV),
    *(FILLER, UNREADABLE),
)
