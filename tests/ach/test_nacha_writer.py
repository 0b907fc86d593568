from __future__ import annotations

import io
from datetime import date
from typing import Any

import pytest

from db.formats.nacha import fields, totals
from db.formats.nacha.problems import NachaError
from db.formats.nacha.reader import NachaReader, read_file
from db.formats.nacha.records import encode_record
from db.formats.nacha.writer import MODIFIERS, BatchTerms, FileTerms, NachaFileFull, NachaWriter
from tests.ach.files import BATCH, FILE, broken, entry_terms, rules, write

RETURNS: dict[str, Any] = {
    "entry_class": "WEB", "effective_date": None, "is_return": True, "settlement_day": "336", "service_class": "200",
}  # fmt: skip
RETURN = {"type_code": "99", "code": "R01", "original_trace_number": "021000020000001", "original_rdfi": "01140153"}
CREDITS: dict[str, Any] = {"service_class": "220", "entry_class": "PPD", "purpose": "other", "description": "REFUND"}


def test_a_file_has_the_characters_of_the_rulebook() -> None:
    data = write(({}, [{}, {"transaction_code": "37", "amount_minor": 75_000_00, "name": "GRACE HOPPER"}]))
    assert data.decode().splitlines() == [
        "101 02100002112345678902612010900A094101FIRST BANK             SURETY                         ",
        "5225ADAS BOOKS                          1234567890WEBPURCHASE        261202   1021000020000001",
        "627011401533987654321012     0000001250pay000000000001ADA LOVELACE          S 0021000020000001",
        "637011401533987654321012     0007500000pay000000000001GRACE HOPPER          S 0021000020000002",
        "82250000020002280306000007501250000000000000" + "1234567890" + " " * 25 + "021000020000001",
        "9000001000001000000020002280306000007501250000000000000" + " " * 39,
        *["9" * 94] * 4,
    ]


def test_a_written_file_has_no_problem_and_is_written_again_with_the_same_bytes() -> None:
    remittance = {"type_code": "05", "information": "ORDER 17"}
    data = write(
        ({}, [{}, {"addenda": [remittance]}]),
        (CREDITS, [{"transaction_code": "22"}, {"transaction_code": "33", "amount_minor": 0}]),
        ({"entry_class": "CCD", "service_class": "200", "purpose": "other"}, [{}, {"transaction_code": "22"}]),
        line_end=b"\r\n",
    )
    assert broken(data) == []
    reader = NachaReader(io.BytesIO(data), "strict")
    again = [encode_record(record.layout, record.values()) + "\r\n" for record in reader.records()]
    assert "".join(again).encode() == data
    assert len(data.splitlines()) % 10 == 0


def test_totals_are_those_of_entries_and_addenda() -> None:
    data = write(({"service_class": "200", "purpose": "other"}, [{}, {"transaction_code": "22", "amount_minor": 7}]))
    reader, [debit, credit] = read_file(io.BytesIO(data), "strict")
    assert (debit.amount_minor, debit.is_credit, credit.amount_minor, credit.is_credit) == (1250, False, 7, True)
    assert reader.totals.controls() == {
        "entry_count": 2, "entry_hash": 2 * 1140153, "debit_total": 1250, "credit_total": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("addenda", "code"),
    [
        (RETURN, "26"),
        (
            {
                **RETURN, "code": "R68",
                "return_trace_number": "011401530000009", "return_settlement_day": "336", "return_code": "01",
            },
            "26",
        ),
        (
            {
                **RETURN, "code": "R74",
                "return_trace_number": "011401530000009", "return_settlement_day": "336", "return_code": "01",
                "dishonored_trace_number": "021000020000044", "dishonored_settlement_day": "338",
                "dishonored_code": "69", "original_settlement_day": "330", "returned_date": "261202",
            },
            "36",
        ),
    ],
)  # fmt: skip
def test_returns_dishonored_and_contested_returns_are_written_and_read(addenda: dict[str, str], code: str) -> None:
    data = write((RETURNS, [{"transaction_code": code, "addenda": [addenda]}]))
    reader, [entry] = read_file(io.BytesIO(data), "strict")
    assert reader.problems == []
    assert entry.return_addenda is not None
    found = entry.return_addenda.values()
    assert {name: found[name] for name in addenda if name != "type_code"} | {"type_code": "99"} == addenda


@pytest.mark.parametrize(("code", "more"), [("C01", {}), ("C61", {"change_code": "C01", "trace_sequence": "0000017"})])
def test_notifications_of_change_are_written_and_read(code: str, more: dict[str, str]) -> None:
    addenda = {
        "type_code": "98", "code": code, "original_trace_number": "021000020000001", "original_rdfi": "01140153",
        "corrected_data": "1918171614", **more,
    }  # fmt: skip
    terms = RETURNS | {"entry_class": "COR"}
    data = write((terms, [{"transaction_code": "26", "amount_minor": 0, "addenda": [addenda]}]))
    reader, [entry] = read_file(io.BytesIO(data), "strict")
    assert reader.problems == []
    assert entry.return_addenda is not None
    assert entry.return_addenda["corrected_data"] == "1918171614"


@pytest.mark.parametrize(
    ("terms", "entry", "expected"),
    [
        ({"entry_class": "TEL", "purpose": "other"}, {}, ("entry_class", "is_one_that_is_written")),
        ({"entry_class": "XYZ", "purpose": "other"}, {}, ("entry_class", "is_assigned")),
        ({"company_name": ""}, {}, ("company_name", "is_not_blank")),
        ({"company_name": "A NAME OF TOO MANY"}, {}, ("company_name", "has_at_most_16_characters")),
        ({"company_name": "KÄRNTEN"}, {}, ("company_name", "is_printable_ascii")),
        ({"effective_date": None}, {}, ("effective_date", "is_present")),
        ({"service_class": "999"}, {}, ("service_class", "is_assigned")),
        ({}, {"routing": "011401534"}, ("check_digit", "follows_from_the_routing_number")),
        ({}, {"routing": "000000000"}, ("rdfi", "is_a_routing_number")),
        ({}, {"routing": "01140153"}, ("check_digit", "is_filled_with_digits")),
        ({}, {"transaction_code": "22"}, ("transaction_code", "fits_the_service_class_of_its_batch")),
        ({}, {"transaction_code": "25"}, ("transaction_code", "is_assigned")),
        ({}, {"transaction_code": "26"}, ("transaction_code", "is_that_of_a_return_only_with_addenda_98_or_99")),
        ({}, {"amount_minor": 0}, ("amount", "is_above_zero")),
        ({}, {"amount_minor": -5}, ("amount", "is_filled_with_digits")),
        ({}, {"amount_minor": 10**10}, ("amount", "has_at_most_10_characters")),
        ({}, {"transaction_code": "28"}, ("amount", "is_zero_in_a_prenote_or_zero_dollar_entry")),
        ({}, {"account_number": "1" * 18}, ("account_number", "has_at_most_17_characters")),
        ({}, {"account_number": ""}, ("account_number", "is_not_blank")),
        ({}, {"trace_sequence": 10**7}, ("trace_number", "has_at_most_15_characters")),
        (
            {},
            {"addenda": [{"type_code": "05", "information": "A"}, {"type_code": "05", "information": "B"}]},
            ("addenda", "are_as_many_as_WEB_allows"),
        ),
    ],
)
def test_what_breaks_a_rule_is_refused_before_it_is_written(
    terms: dict[str, Any], entry: dict[str, Any], expected: tuple[str, str]
) -> None:
    with pytest.raises(NachaError) as refused:
        write((terms, [entry]))
    assert expected in rules(refused.value.problems)
    assert "987654321012" not in str(refused.value)


def test_all_errors_of_an_entry_are_named_at_once_and_no_account_number() -> None:
    with pytest.raises(NachaError) as refused:
        write(({}, [{"account_number": "12345678901234567890", "amount_minor": 10**10, "name": "X" * 30}]))
    assert [each.field for each in refused.value.problems] == ["account_number", "amount", "name"]
    assert "12345678901234567890" not in str(refused.value)
    assert "…7890" in str(refused.value)


def test_trace_numbers_of_a_batch_ascend() -> None:
    with pytest.raises(NachaError, match="trace_number: broken rule: ascends"):
        write(({}, [{"trace_sequence": 2}, {"trace_sequence": 2}]))


def test_there_are_36_file_id_modifiers() -> None:
    assert len(MODIFIERS) == 36
    assert all(broken(write(({}, [{}]), modifier=modifier)) == [] for modifier in MODIFIERS)
    for modifier in ("a", "", "-", "AB", "٣"):
        with pytest.raises(NachaError, match="file_id_modifier"):
            write(({}, [{}]), modifier=modifier)


def test_a_batch_without_entries_is_refused() -> None:
    with pytest.raises(NachaError, match="has an entry"):
        write(({}, []))


def test_amounts_beyond_twelve_digits_belong_into_another_file() -> None:
    writer = NachaWriter(io.BytesIO(), FileTerms(**FILE))
    writer.begin_batch(BatchTerms(**BATCH))
    largest = {"amount_minor": 10**10 - 1}
    for sequence in range(1, 101):
        writer.add_entry(entry_terms(largest | {"trace_sequence": sequence}))
    assert totals.TOTAL_MAX - 100 * (10**10 - 1) == 99
    with pytest.raises(NachaFileFull, match="fits into the file control"):
        writer.add_entry(entry_terms({"amount_minor": 100, "trace_sequence": 101}))
    writer.add_entry(entry_terms({"amount_minor": 99, "trace_sequence": 101}))
    assert writer.end_batch().debits_minor == totals.TOTAL_MAX
    writer.close()


def test_a_batch_whose_entries_fill_six_digits_is_continued_in_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.formats.nacha.writer.BATCH_ENTRIES_MAX", 3)
    data = write(({}, [{}] * 7))
    reader = NachaReader(io.BytesIO(data), "strict")
    assert [entry.batch.number for entry in reader.entries()] == [1, 1, 1, 2, 2, 2, 3]
    assert reader.problems == []


def test_the_date_of_a_file_is_that_of_new_york() -> None:
    [first, *_] = write(({"effective_date": date(2026, 12, 1)}, [{}])).decode().splitlines()
    assert first[23:33] == "2612010900"


def test_every_layout_covers_94_characters_without_a_gap() -> None:
    for layout in fields.LAYOUTS:
        position = 1
        for each in layout.fields:
            assert each.first == position, (layout.name, each.name)
            position = each.last + 1
        assert position == 95, layout.name
        assert len(layout.by_name) == len(layout.fields), layout.name
