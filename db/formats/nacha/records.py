"""Records: 94 characters with the layout by which they are read."""

from __future__ import annotations

from collections.abc import Mapping

from db.formats.nacha import codes, fields
from db.formats.nacha.fields import Layout
from db.formats.nacha.problems import NachaError, NachaProblem, show_value


class NachaRecord:
    """A record of a file: `record["amount"]` is a field's text without what fills it.

    `raw` has the bytes as they were read, with their line end.
    """

    __slots__ = ("layout", "line", "raw", "text")

    def __init__(self, layout: Layout, text: str, line: int, raw: bytes) -> None:
        self.layout = layout
        self.text = text
        self.line = line
        self.raw = raw

    def __getitem__(self, name: str) -> str:
        return self.layout.by_name[name].value_of(self.text)

    def __contains__(self, name: str) -> bool:
        return name in self.layout.by_name

    def __repr__(self) -> str:
        return f"NachaRecord({self.layout.name}, line {self.line})"

    def number(self, name: str) -> int:
        """A field's number; 0 if it has other characters than digits."""
        value = self[name]
        return int(value) if value.isascii() and value.isdigit() else 0

    def values(self) -> dict[str, str]:
        """All fields that are not constant. An account number is among them."""
        return {each.name: self[each.name] for each in self.layout.fields if each.form != "constant"}

    def problems(self) -> list[NachaProblem]:
        """The fields that break the rule of their form."""
        if self.layout.pattern.fullmatch(self.text):
            return []
        return [
            NachaProblem(
                self.line,
                each.name,
                rule,
                show_value(self.text[each.place], secret=each.secret),
                expected=each.constant,
            )
            for each in self.layout.fields
            if (rule := each.broken_rule(self.text[each.place]))
        ]


def layout_of(text: str, entry_class: str) -> Layout:
    """The layout of a record's text, in a batch of an entry class (empty outside a batch)."""
    match text[:1]:
        case "6" if entry_class == "IAT":
            return fields.ENTRY_IAT
        case "6" if entry_class == "ADV":
            return fields.ENTRY_ADV
        case "6":
            return fields.ENTRY_COUNTED if entry_class in codes.COUNTED_CLASSES else fields.ENTRY
        case "7":
            return layout_of_addenda(text, entry_class)
        case "5":
            return fields.IAT_BATCH_HEADER if is_iat_header(text) else fields.BATCH_HEADER
        case "8":
            return fields.BATCH_CONTROL_ADV if entry_class == "ADV" else fields.BATCH_CONTROL
        case "9" if text == fields.PADDING:
            return fields.FILLER
        case "9":
            return fields.FILE_CONTROL
        case "1":
            return fields.FILE_HEADER
    return fields.UNREADABLE


def layout_of_addenda(text: str, entry_class: str) -> Layout:
    """The layout of an addenda record, by its type and its code."""
    code = text[3:6]
    match text[1:3]:
        case "05":
            return fields.ADDENDA_05
        case "98" if code in codes.REFUSED_CHANGE_CODES:
            return fields.ADDENDA_98_REFUSED
        case "98":
            return fields.ADDENDA_98
        case "99" if code in codes.DISHONORED_CODES:
            return fields.ADDENDA_99_DISHONORED
        case "99" if code in codes.CONTESTED_CODES:
            return fields.ADDENDA_99_CONTESTED
        case "99":
            return fields.ADDENDA_99_IAT if entry_class == "IAT" else fields.ADDENDA_99
    return fields.ADDENDA_OTHER


def is_iat_header(text: str) -> bool:
    """Whether a batch header is one of international entries, also of their notifications of change."""
    return text[50:53] == "IAT" or (text[50:53] == "COR" and text[4:20].strip() == "IATCOR")


def encode_record(layout: Layout, values: Mapping[str, str | int], line: int = 0) -> str:
    """A record of 94 characters. Raises NachaError with every value that does not fit its field."""
    parts, problems = [], []
    for each in layout.fields:
        value = values.get(each.name, "")
        filled = each.fill(value)
        if rule := each.broken_rule(filled):
            problems.append(NachaProblem(line, each.name, rule, show_value(value, secret=each.secret)))
        parts.append(filled)
    if unknown := values.keys() - layout.by_name.keys():
        raise AssertionError(f"{layout.name} has no fields {sorted(unknown)}")
    if problems:
        raise NachaError(problems)
    return "".join(parts)
