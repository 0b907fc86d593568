"""Any bytes, and valid files that were changed: no exception but ours, and an end in time that grows with the input."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from db.formats.nacha.problems import NachaError
from db.formats.nacha.reader import NachaReader
from db.formats.nacha.records import encode_record
from db.formats.nacha.writer import FileTerms, NachaWriter
from tests.ach.files import FILE, write
from tests.ach.test_nacha_samples import (
    ADVICES,
    BARE_RETURN,
    CHANGE,
    CONTESTED,
    DISHONORED,
    FOREIGN,
    REMITTANCES,
    RETURNS,
)

VALID = write(({}, [{}, {"addenda": [{"type_code": "05", "information": "ORDER 17"}]}]))
FILES = [VALID, RETURNS, BARE_RETURN, DISHONORED, CONTESTED, CHANGE, FOREIGN, REMITTANCES, ADVICES]
SHORT = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PIECES = [
    *(b"\n", b"\r", b"\r\n", b"\0", b"\x1a", b"\xff", b"\xc3\x84", b" ", b"9" * 94, b"5", b"6", b"7", b"8", b"9", b"1"),
    *(b"799R", b"798C", b"IAT", b"ADV", b"COR", "٣".encode()),
]


def read_whole(data: bytes) -> None:
    """Read a file in both modes; its raw bytes are the file's."""
    for mode in ("strict", "patient"):
        reader = NachaReader(io.BytesIO(data), mode)
        try:
            for part in reader.parts():
                str(part)
        except NachaError:
            continue
        assert reader.errors + reader.warnings >= len(reader.problems)
        assert all(str(problem).isprintable() for problem in reader.problems)
        records = list(NachaReader(io.BytesIO(data), mode).records())
        assert b"".join(record.raw for record in records) == data
        for record in records:
            if not record.problems():
                assert encode_record(record.layout, record.values()) == record.text


@SHORT
@given(st.binary(max_size=400))
@example(b"\xef\xbb\xbf" * 40)
@example(b"5" * 94 + b"\n" + b"6" * 94)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read_whole(data)


@SHORT
@given(
    st.sampled_from(FILES),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 100), st.one_of(st.sampled_from(PIECES), st.binary(max_size=5))),
        min_size=1,
        max_size=4,
    ),
)
def test_changed_files_are_read_or_refused(data: bytes, changes: list[tuple[float, int, bytes]]) -> None:
    for place, removed, inserted in changes:
        at = int(place * len(data))
        data = data[:at] + inserted + data[at + removed :]
    read_whole(data)


@SHORT
@given(st.sampled_from(FILES), st.data())
def test_lines_in_any_order_are_read_or_refused(data: bytes, choice: st.DataObject) -> None:
    lines = data.split(b"\n")
    read_whole(b"\n".join(choice.draw(st.lists(st.sampled_from(lines), max_size=30))))


TEXT = st.text(max_size=24)


@SHORT
@given(
    st.fixed_dictionaries(
        {
            "transaction_code": st.one_of(st.sampled_from(["22", "27", "37", "28"]), TEXT),
            "routing": st.one_of(st.sampled_from(["011401533", "021000021"]), TEXT),
            "account_number": st.one_of(st.from_regex("[0-9]{4,17}", fullmatch=True), TEXT),
            "amount_minor": st.integers(-5, 10**11),
            "trace_sequence": st.integers(-5, 10**8),
            "individual_id": TEXT,
            "name": TEXT,
            "discretionary_data": st.text(max_size=3),
        }
    )
)
def test_an_entry_of_any_values_is_written_validly_or_refused(values: dict[str, object]) -> None:
    try:
        data = write(({"service_class": "200", "purpose": "other"}, [values]))
    except NachaError:
        return
    reader = NachaReader(io.BytesIO(data), "strict")
    [entry] = reader.entries()
    assert reader.problems == []
    assert entry.amount_minor == values["amount_minor"]
    assert entry.record["account_number"] == str(values["account_number"]).rstrip(" ")


@SHORT
@given(st.fixed_dictionaries(dict.fromkeys(("destination", "origin", "destination_name", "modifier"), TEXT)))
def test_a_header_of_any_values_is_written_or_refused(values: dict[str, str]) -> None:
    whole: dict[str, Any] = {**FILE, **values}
    stream = io.BytesIO()
    with contextlib.suppress(NachaError):
        NachaWriter(stream, FileTerms(**whole))
    assert len(stream.getvalue()) in {0, 95}
