"""What must hold of a header, of an entry with its addenda, and of a control record: beyond the form of their fields.

Each function yields (line, field, rule, value, expected).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from db.formats.nacha import codes
from db.formats.nacha.codes import ENTRY_CLASSES
from db.formats.nacha.fields import ADDENDA_05
from db.formats.nacha.records import NachaRecord

Broken = tuple[int, str, str, str, str]
RETURN_LAYOUTS = frozenset(
    {
        "addenda_99",
        "addenda_99_dishonored",
        "addenda_99_contested",
        "addenda_99_iat",
        "addenda_98",
        "addenda_98_refused",
    }
)
CODES_OF_LAYOUT = {
    "addenda_99": codes.RETURN_CODES, "addenda_99_iat": codes.RETURN_CODES,
    "addenda_99_dishonored": codes.DISHONORED_CODES, "addenda_99_contested": codes.CONTESTED_CODES,
    "addenda_98": codes.CHANGE_CODES, "addenda_98_refused": codes.REFUSED_CHANGE_CODES,
}  # fmt: skip


def check_file_header(record: NachaRecord) -> Iterator[Broken]:
    """The file id modifier, one of 36 a day."""
    modifier = record["file_id_modifier"]
    if not (modifier.isascii() and (modifier.isdigit() or (modifier.isalpha() and modifier.isupper()))):
        yield record.line, "file_id_modifier", "is_from_A_to_Z_or_0_to_9", modifier, ""


def check_batch_header(record: NachaRecord) -> Iterator[Broken]:
    """Service class and entry class."""
    if record["service_class"] not in codes.SERVICE_CLASSES:
        yield record.line, "service_class", "is_assigned", record["service_class"], ""
    if record["entry_class"] not in ENTRY_CLASSES:
        yield record.line, "entry_class", "is_assigned", record["entry_class"], ""


def check_entry(entry: NachaRecord, addenda: Sequence[NachaRecord], header: NachaRecord | None) -> Iterator[Broken]:
    """An entry with its addenda."""
    is_return = any(each.layout.name in RETURN_LAYOUTS for each in addenda)
    entry_class = header["entry_class"] if header else ""
    yield from check_routing(entry.line, entry.text[3:12])
    yield from check_transaction_code(entry, header, entry_class, is_return=is_return)
    yield from check_amount(entry, entry_class, is_return=is_return)
    if header and "trace_number" in entry and entry.text[79:87] != header["odfi"]:
        yield entry.line, "trace_number", "begins_with_the_odfi_of_its_batch", entry["trace_number"], header["odfi"]
    yield from check_addenda(entry, addenda, entry_class, is_return=is_return)


def check_routing(line: int, routing: str) -> Iterator[Broken]:
    """A routing number's check digit. One that is not digits breaks the rule of its field."""
    if routing.isascii() and routing.isdigit() and not codes.is_routing_number(routing):
        if codes.check_digit(routing) != int(routing[8]):
            yield line, "check_digit", "follows_from_the_routing_number", routing, str(codes.check_digit(routing))
        else:
            yield line, "rdfi", "is_a_routing_number", routing, ""


def check_transaction_code(
    entry: NachaRecord, header: NachaRecord | None, entry_class: str, *, is_return: bool
) -> Iterator[Broken]:
    """A transaction code: assigned, and right in its batch."""
    line, code = entry.line, entry.text[1:3]
    if code not in codes.TRANSACTION_CODES:
        yield line, "transaction_code", "is_assigned", code, ""
        return
    service_class = header["service_class"] if header else ""
    if service_class == (codes.DEBITS_ONLY if codes.is_credit(code) else codes.CREDITS_ONLY):
        yield line, "transaction_code", "fits_the_service_class_of_its_batch", code, service_class
    if (entry_class == "ADV") != (code[0] == "8"):
        yield line, "transaction_code", "fits_the_entry_class_of_its_batch", code, entry_class
    elif is_return != (code[1] in codes.RETURN_DIGITS) and entry_class != "ADV":
        yield line, "transaction_code", "is_that_of_a_return_only_with_addenda_98_or_99", code, ""


def check_amount(entry: NachaRecord, entry_class: str, *, is_return: bool) -> Iterator[Broken]:
    """An amount: zero where it must be, else above zero."""
    amount, kind = entry.number("amount"), entry.text[2]
    if entry_class == "COR":
        if amount:
            yield entry.line, "amount", "is_zero_in_a_notification_of_change", str(amount), "0"
    elif not is_return and entry_class != "ADV":
        if kind in codes.ZERO_DIGITS and amount:
            yield entry.line, "amount", "is_zero_in_a_prenote_or_zero_dollar_entry", str(amount), "0"
        elif kind not in codes.ZERO_DIGITS and not amount:
            yield entry.line, "amount", "is_above_zero", str(amount), ""


def check_addenda(
    entry: NachaRecord, addenda: Sequence[NachaRecord], entry_class: str, *, is_return: bool
) -> Iterator[Broken]:
    """The addenda of an entry: their number, types, sequence, codes."""
    if entry["addenda_indicator"] != ("1" if addenda else "0"):
        yield (
            entry.line,
            "addenda_indicator",
            "agrees_with_the_addenda",
            entry["addenda_indicator"],
            str(int(bool(addenda))),
        )
    known = ENTRY_CLASSES.get(entry_class)
    if known and not is_return and not known.addenda_min <= len(addenda) <= known.addenda_max:
        expected = f"{known.addenda_min} to {known.addenda_max}"
        yield entry.line, "addenda", f"are_as_many_as_{entry_class}_allows", str(len(addenda)), expected
    if is_return and len(addenda) > 1 and entry_class != "IAT":
        yield entry.line, "addenda", "are_one_in_a_return_or_notification", str(len(addenda)), "1"
    stated = entry.number("addenda_count") if "addenda_count" in entry else len(addenda)
    if stated != len(addenda) and not is_return:
        yield entry.line, "addenda_count", "agrees_with_the_addenda", str(stated), str(len(addenda))
    for number, each in enumerate(addenda, start=1):
        yield from check_one_addenda(entry, each, number, known.addenda_type if known and not is_return else "")


def check_one_addenda(entry: NachaRecord, each: NachaRecord, number: int, wanted: str) -> Iterator[Broken]:
    """An addenda record: its type, its place, its code."""
    if wanted and each.text[1:3] != wanted:
        yield each.line, "type_code", "is_that_of_its_entry_class", each.text[1:3], wanted
    if each.layout is ADDENDA_05:
        if each.number("addenda_sequence") != number:
            yield each.line, "addenda_sequence", "ascends_from_1", each["addenda_sequence"], f"{number:04}"
        if each["entry_sequence"] != entry.text[87:94]:
            yield each.line, "entry_sequence", "is_that_of_its_entry", each["entry_sequence"], entry.text[87:94]
    elif each.layout.name in CODES_OF_LAYOUT:
        if each["code"] not in CODES_OF_LAYOUT[each.layout.name]:
            yield each.line, "code", "is_assigned", each["code"], ""
        if "trace_number" in entry and each["trace_number"] != entry["trace_number"]:
            yield each.line, "trace_number", "is_that_of_its_entry", each["trace_number"], entry["trace_number"]


def check_control(control: NachaRecord, totals: Mapping[str, int], names: Sequence[str]) -> Iterator[Broken]:
    """The totals of a control record."""
    for name in names:
        stated = control.number(name)
        if stated != totals[name]:
            yield control.line, name, "agrees_with_the_entries", str(stated), str(totals[name])


def check_batch_control(control: NachaRecord, header: NachaRecord) -> Iterator[Broken]:
    """What a batch control repeats of its header."""
    for name in ("service_class", "company_id", "odfi", "batch_number"):
        if name in control and control[name] != header[name]:
            yield control.line, name, "is_that_of_the_batch_header", control[name], header[name]
