from __future__ import annotations

import io
from typing import Any

import pytest

from db.formats.nacha.lines import PIECE_BYTES
from db.formats.nacha.problems import PROBLEMS_MAX, NachaError
from db.formats.nacha.reader import NachaBatch, NachaReader, read_file
from tests.ach.files import broken, replace, write

VALID = write(({}, [{}, {"addenda": [{"type_code": "05", "information": "ORDER 17"}]}]))
# Lines: 1 file header, 2 batch header, 3 entry, 4 entry, 5 addenda, 6 batch control, 7 file control, 8-10 filler.


@pytest.mark.parametrize(
    ("line", "first", "text", "expected"),
    [
        (1, 2, "02", ("priority_code", "is_constant", "02")),
        (1, 4, "021000021 ", ("immediate_destination", "is_right_justified", "021000021 ")),
        (1, 24, "261301", ("creation_date", "is_a_date_yymmdd", "261301")),
        (1, 30, "2460", ("creation_time", "is_a_time_hhmm_or_blank", "2460")),
        (1, 34, "a", ("file_id_modifier", "is_from_A_to_Z_or_0_to_9", "a")),
        (1, 35, "096", ("record_size", "is_constant", "096")),
        (2, 2, "230", ("service_class", "is_assigned", "230")),
        (2, 51, "QQQ", ("entry_class", "is_assigned", "QQQ")),
        (2, 88, "0000000", ("batch_number", "ascends", "0")),
        (3, 2, "25", ("transaction_code", "is_assigned", "25")),
        (3, 12, "4", ("check_digit", "follows_from_the_routing_number", "011401534")),
        (3, 13, " " * 17, ("account_number", "is_not_blank", "…")),
        (3, 30, "00000A1250", ("amount", "is_filled_with_digits", "00000A1250")),
        (3, 30, "0000000000", ("amount", "is_above_zero", "0")),
        (3, 79, "1", ("addenda_indicator", "agrees_with_the_addenda", "1")),
        (3, 80, "03100003", ("trace_number", "begins_with_the_odfi_of_its_batch", "031000030000001")),
        (4, 80, "021000020000001", ("trace_number", "ascends", "021000020000001")),
        (5, 2, "02", ("type_code", "is_that_of_its_entry_class", "02")),
        (5, 84, "0002", ("addenda_sequence", "ascends_from_1", "0002")),
        (5, 88, "0000009", ("entry_sequence", "is_that_of_its_entry", "0000009")),
        (6, 5, "000004", ("entry_count", "agrees_with_the_entries", "4")),
        (6, 11, "0000000001", ("entry_hash", "agrees_with_the_entries", "1")),
        (6, 21, "000000000001", ("debit_total", "agrees_with_the_entries", "1")),
        (6, 33, "000000000001", ("credit_total", "agrees_with_the_entries", "1")),
        (6, 2, "200", ("service_class", "is_that_of_the_batch_header", "200")),
        (6, 45, "1234567891", ("company_id", "is_that_of_the_batch_header", "1234567891")),
        (6, 74, "ABCDEF", ("reserved", "is_blank", "ABCDEF")),
        (7, 2, "000002", ("batch_count", "agrees_with_the_entries", "2")),
        (7, 8, "000002", ("block_count", "agrees_with_the_entries", "2")),
        (7, 22, "0000000001", ("entry_hash", "agrees_with_the_entries", "1")),
        (8, 1, "X", ("record", "begins_with_a_known_type", "X")),
    ],
)
def test_a_broken_rule_is_found_with_line_field_and_value(
    line: int, first: int, text: str, expected: tuple[str, str, str]
) -> None:
    found = broken(replace(VALID, line, first, text))
    assert (line, *expected) in found
    strict, _ = read_file(io.BytesIO(replace(VALID, line, first, text)), "strict")
    assert strict.errors == len(found) > 0 == strict.warnings
    with pytest.raises(NachaError, match=expected[0]):
        strict.raise_for_errors()


def test_every_error_of_a_file_is_found_at_once() -> None:
    data = replace(replace(replace(VALID, 1, 34, "a"), 3, 12, "4"), 7, 2, "000009")
    assert {(line, field) for line, field, _, _ in broken(data)} == {
        *{(1, "file_id_modifier"), (3, "check_digit"), (7, "batch_count")},
    }


def test_a_patient_reading_warns_and_the_entry_is_usable() -> None:
    data = replace(replace(VALID, 3, 12, "4"), 6, 21, "000000000001")
    reader, entries = read_file(io.BytesIO(data), "patient")
    assert (reader.errors, reader.warnings) == (0, 2)
    assert [(entry.is_usable, entry.amount_minor) for entry in entries] == [(True, 1250), (True, 1250)]
    reader.raise_for_errors()


@pytest.mark.parametrize(("first", "text", "field"), [(30, "  12.50   ", "amount"), (2, "2X", "transaction_code")])
def test_an_entry_whose_amount_or_code_cannot_be_read_is_an_error_in_a_patient_reading_too(
    first: int, text: str, field: str
) -> None:
    reader, entries = read_file(io.BytesIO(replace(VALID, 3, first, text)), "patient")
    assert [entry.is_usable for entry in entries] == [False, True]
    assert [each.field for each in reader.problems if each.severity == "error"] == [field]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda data: data.replace(b"\n", b"\r\n"), None),
        (lambda data: data.replace(b"\n", b"\r"), None),
        (lambda data: data.replace(b"\n", b""), None),
        (lambda data: b"\n".join(data.replace(b"\n", b"")[at : at + 940] for at in (0,)) + b"\n", None),
        (lambda data: data[:-1], None),
        (lambda data: data.replace(b"\n", b"\r\n", 1), "ends_like_the_others"),
        (lambda data: b"\n".join(line.rstrip() for line in data.split(b"\n")), "has_94_characters"),
        (lambda data: data.replace(b"\n", b"   \n"), "is_not_padded_beyond_94_characters"),
        (lambda data: b"\xef\xbb\xbf" + data, "has_no_byte_order_mark"),
        (lambda data: data + b"\x1a", "is_not_empty"),
        (lambda data: data + b"\n\n", "is_not_empty"),
        (lambda data: data[: 95 * 7], "is_blocked_by_ten"),
        (lambda data: data[95:], "is_the_first_record"),
        (lambda data: data[: 95 * 6], "ends_the_file"),
        (lambda data: data[: 95 * 5] + data[95 * 6 :], "ends_the_batch"),
        (lambda data: data[:95] + data[95 * 2 :], "follows_a_batch_header"),
        (lambda data: data.replace(b"ADA LOVELACE ", "ADÄ LOVELACE".encode(), 1), "is_printable_ascii"),
        (lambda data: data.replace(b"ADA LOVELACE", "ADÄ LOVELACE".encode("latin-1"), 1), "is_printable_ascii"),
        (lambda data: data + data, "stands_once"),
    ],
)
def test_what_banks_send_is_read(change: Any, rule: str | None) -> None:
    data = change(VALID)
    reader, entries = read_file(io.BytesIO(data), "patient")
    assert [(each.amount_minor, each.record["individual_id"]) for each in entries[:2]] == [
        (1250, "pay000000000001")
    ] * 2
    assert all(entry.is_usable for entry in entries) and reader.errors == 0
    assert (rule is None and reader.problems == []) or rule in {each.rule for each in reader.problems}
    again = b"".join(record.raw for record in NachaReader(io.BytesIO(data), "patient").records())
    assert again == data
    if rule:
        assert read_file(io.BytesIO(data), "strict")[0].errors > 0


def test_a_return_code_without_a_meaning_is_read() -> None:
    terms = {"entry_class": "WEB", "service_class": "225", "is_return": True, "effective_date": None}
    addenda = {"type_code": "99", "code": "R01", "original_trace_number": "1", "original_rdfi": "01140153"}
    data = write((terms, [{"transaction_code": "26", "addenda": [addenda]}])).replace(b"799R01", b"799R97")
    reader, [entry] = read_file(io.BytesIO(data), "patient")
    assert [(each.field, each.rule, each.value) for each in reader.problems] == [("code", "is_assigned", "R97")]
    assert entry.is_usable and entry.return_addenda is not None and entry.return_addenda["code"] == "R97"
    assert broken(data) == [(4, "code", "is_assigned", "R97")]


def test_addenda_without_an_entry_are_an_error() -> None:
    data = VALID[:190] + VALID[95 * 4 :]
    reader, entries = read_file(io.BytesIO(data), "patient")
    assert entries == []
    assert ("addenda", "follow_an_entry") in {
        (each.field, each.rule) for each in reader.problems if each.severity == "error"
    }


def test_a_batch_is_complete_after_its_entries() -> None:
    reader = NachaReader(io.BytesIO(write(({}, [{}]), ({}, [{}, {}]))), "strict")
    batches = [part for part in reader.parts() if isinstance(part, NachaBatch)]
    assert [(each.number, each.entry_class, each.totals.entries) for each in batches] == [(1, "WEB", 1), (2, "WEB", 2)]
    assert all(each.control is not None for each in batches)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"hello\n", b"9" * 94])
def test_what_is_no_nacha_file_is_an_error(data: bytes) -> None:
    for mode in ("strict", "patient"):
        assert read_file(io.BytesIO(data), mode)[0].errors > 0


class Endless(io.RawIOBase):
    """A stream without an end."""

    def __init__(self, byte: bytes) -> None:
        self.byte = byte
        self.read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        buffer[:] = self.byte * len(buffer)
        self.read_bytes += len(buffer)
        return len(buffer)


@pytest.mark.parametrize("byte", [b"\0", b"A", b" "])
def test_an_endless_line_is_refused_after_its_first_piece(byte: bytes) -> None:
    stream = Endless(byte)
    with pytest.raises(NachaError, match="ends within 94 characters"):
        read_file(io.BufferedReader(stream), "patient")
    assert stream.read_bytes < 2 * PIECE_BYTES


def test_endless_filler_is_refused() -> None:
    stream = Endless(b"9")
    with pytest.raises(NachaError, match="filler"):
        read_file(io.BufferedReader(stream), "patient")
    assert stream.read_bytes < 100 * PIECE_BYTES


def test_problems_beyond_a_thousand_are_counted_only() -> None:
    reader, _ = read_file(io.BytesIO(b"hello\n" * 5000), "patient")
    assert len(reader.problems) == PROBLEMS_MAX < reader.errors


def test_an_account_number_appears_in_no_problem() -> None:
    data = replace(
        replace(VALID, 3, 13, "98765\x0132101234567"), 4, 13, "987654321012€".encode("cp1252").decode("latin-1")
    )
    for mode in ("strict", "patient"):
        shown = " ".join(map(str, read_file(io.BytesIO(data), mode)[0].problems))
        assert "account_number" in shown
        assert "98765" not in shown and "LOVELACE" not in shown
