"""Shapes of files that other programs and banks publish as samples, with other names and numbers.

Where a sample contradicts the rulebook, the patient reading warns, and the entry is usable. Each such contradiction is
named beside its sample.
"""

from __future__ import annotations

import io

import pytest

from db.formats.nacha.reader import read_file
from db.formats.nacha.records import encode_record

HEADER = "101 021000021 0114015332612011016A094101FIRST BANK             SECOND BANK                    "
NINES = "9" * 94


def sample(*lines: str, padded: bool = True) -> bytes:
    """Lines of a file, each filled to 94 characters unless the sample had short ones."""
    return "\n".join(line.ljust(94) if padded else line for line in lines).encode()


# Returns, not blocked. The company id of the controls is moved by one position; a code is that of a forward entry.
RETURNS = sample(
    HEADER,
    "5200ADAS BOOKS                          987654321 WEBPURCHASE        000101   1011401530000001",
    "626011401533111122223        0000012354pay000000000017GRACE HOPPER          S 1011401530000042",
    "799R01021000020000001      01140153                                            011401530000042",
    "82000000020001140153000000012354000000000000 987654321                         011401530000001",
    "5200ADAS BOOKS                          987654321 WEBPURCHASE        000101   1021000020000002",
    "627021000021444455556        0000004565pay000000000018ADA LOVELACE          S 1021000020000043",
    "799R03011401530000003      02100002                                            021000020000043",
    "82000000020002100002000000004565000000000000 987654321                         021000020000002",
    "9000002000001000000040003240155000000016919000000000000",
)
# No headers of the file, no controls.
BARE_RETURN = sample(
    "5200ADAS BOOKS                          987654321 WEBPURCHASE        000101   1011401530000001",
    "626011401533111122223        0000012354pay000000000017GRACE HOPPER          S 1011401530000042",
    "799R01021000020000001      01140153                                            011401530000042",
)
# A dishonored return in a forward batch, and control totals that count an entry twice.
DISHONORED = sample(
    HEADER,
    "5225GRACE HOPPER                        021000021 POSBOOKS           000000   1021000020000001",
    "627011401533111-2222-33      000002500045689033       ADA LOVELACE          011021000020000001",
    "799R68011401530000301      02100002   01140153000000133501UNTIMELY             011401530000001",
    "82250000040002280306000000050000000000000000021000021                          021000020000001",
)
CONTESTED = sample(
    HEADER,
    "5225ADAS BOOKS                          987654321 PPDPAYROLL         000000   1011401530000001",
    "626011401533111122223        0100000000REF            ADA LOVELACE            1011401530000001",
    "799R71011401530000301261130021000023300210000200000013340100000000000001533668 011401530000001",
    "82250000020001140153000100000000000000000000987654321                          011401530000001",
)
CHANGE = sample(
    HEADER,
    "5220ADAS BOOKS                          987654321 CORPURCHASE        000000   1011401530000001",
    "621021000021111-2222-33      0000000000pay000000000019ADA LOVELACE            1011401530000001",
    "798C01021000020000007      02100002191817161400                                011401530000001",
    "82200000020002100002000000000000000000000000987654321                          011401530000001",
    "9000001000001000000020002100002000000000000000000000000",
    *[NINES] * 4,
)
FOREIGN = sample(
    HEADER,
    "5220                FF3               US987654321 IATTRADEPAYMTCADUSD261202   1011401530000001",
    "6220210000210007             0000100000111122223333                           1011401530000001",
    "710ANN000000000000100000928383-23938          GRACE HOPPER                             0000001",
    "711SECOND BANK                        15 WEST STREET                                   0000001",
    "712BOSTON*MA\\                         US02110\\                                         0000001",
    "713SECOND BANK                        01011401533                         US           0000001",
    "714FIRST BANK                         01021000021                         US           0000001",
    "7151112222333344421 FRONT STREET                                                       0000001",
    "716TORONTO*ON\\                        CA*M5H1\\                                         0000001",
    "82200000080002100002000000000000000000100000987654321                          011401530000001",
    "9000001000002000000080002100002000000000000000000100000",
    *[NINES] * 8,
)
REMITTANCES = sample(
    HEADER,
    "5225ADAS BOOKS                          987654321 CTXINVOICES        261202   1011401530000001",
    "62702100002111112222         010000000045689033       0002GRACE HOPPER      011011401530000001",
    "705ISA*00*FIRST                                                                    00010000001",
    "705ISA*00*SECOND                                                                   00020000001",
    "82250000030002100002000100000000000000000000987654321                          011401530000001",
    "9000001000001000000030002100002000100000000000000000000",
    *[NINES] * 3,
)
ADVICES = sample(
    HEADER,
    "5280ADAS BOOKS                          987654321 ADVACCOUNTING      261202   0011401530000001",
    "681021000021111-2222-33    000000050000011401533111 1 ADA LOVELACE            0011000013360001",
    "682021000021111-2222-33    000000250000011401533111 9 ADA LOVELACE            0011000013360002",
    "828000000200042000040000000000000025000000000000000000050000ADAS BOOKS         011401530000001",
    f"9000001000001000000020004200004{250000:020}{50000:020}",
    *[NINES] * 4,
)
# Of a day without returns: nothing but controls, short lines, no file id modifier.
EMPTY = sample(
    "101 021000021 0114015332612011016 094101PIMRET                 SECOND",
    "9000000000001000000000000000000000000000000000000000000",
    *[NINES] * 8,
    padded=False,
)


@pytest.mark.parametrize(
    ("data", "codes", "amounts", "warnings"),
    [
        (
            RETURNS, ["R01", "R03"], [12354, 4565],
            {"company_id is_that_of_the_batch_header",
             "transaction_code is_that_of_a_return_only_with_addenda_98_or_99"},
        ),
        (BARE_RETURN, ["R01"], [12354], {
            "file_header is_the_first_record", "batch_control ends_the_batch", "file_control ends_the_file",
            "file is_blocked_by_ten",
        }),
        (DISHONORED, ["R68"], [25000], {
            "transaction_code is_that_of_a_return_only_with_addenda_98_or_99", "trace_number is_that_of_its_entry",
            "entry_count agrees_with_the_entries", "entry_hash agrees_with_the_entries",
            "debit_total agrees_with_the_entries", "file_control ends_the_file", "file is_blocked_by_ten",
        }),
        (CONTESTED, ["R71"], [100000000], {"file_control ends_the_file", "file is_blocked_by_ten"}),
        (CHANGE, ["C01"], [0], set()),
        (FOREIGN, [], [100000], set()),
        (REMITTANCES, [], [100000000], set()),
        (ADVICES, [], [50000, 250000], set()),
        (EMPTY, [], [], {
            "line has_94_characters", "file_id_modifier is_not_blank", "file_id_modifier is_from_A_to_Z_or_0_to_9",
        }),
    ],
    ids=["returns", "bare", "dishonored", "contested", "change", "foreign", "remittances", "advices", "empty"],
)  # fmt: skip
def test_published_samples_are_usable(data: bytes, codes: list[str], amounts: list[int], warnings: set[str]) -> None:
    reader, entries = read_file(io.BytesIO(data), "patient")
    assert {f"{each.field} {each.rule}" for each in reader.problems} == warnings
    assert reader.errors == 0
    assert [entry.amount_minor for entry in entries] == amounts
    assert [entry.return_addenda["code"] for entry in entries if entry.return_addenda] == codes


@pytest.mark.parametrize("data", [CHANGE, FOREIGN, REMITTANCES, ADVICES])
def test_samples_within_the_rules_are_written_again_with_the_same_bytes(data: bytes) -> None:
    reader, entries = read_file(io.BytesIO(data), "strict")
    assert reader.problems == []
    for entry in entries:
        for record in (entry.record, *entry.addenda):
            assert encode_record(record.layout, record.values()) == record.text


def test_a_contested_return_states_both_earlier_returns() -> None:
    _, [entry] = read_file(io.BytesIO(CONTESTED), "patient")
    assert entry.return_addenda is not None
    found = entry.return_addenda.values()
    assert (found["return_code"], found["dishonored_code"]) == ("01", "68")
    assert (found["return_trace_number"], found["dishonored_trace_number"]) == ("021000020000001", "000000000000015")
    assert (found["return_settlement_day"], found["dishonored_settlement_day"]) == ("334", "336")
