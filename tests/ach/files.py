"""NACHA files for tests."""

from __future__ import annotations

import io
from datetime import date, datetime
from typing import Any

from db.banking_days import EASTERN
from db.formats.nacha.problems import NachaProblem
from db.formats.nacha.reader import read_file
from db.formats.nacha.writer import BatchTerms, EntryTerms, FileTerms, NachaWriter

MORNING = datetime(2026, 12, 1, 9, 0, tzinfo=EASTERN)
FILE: dict[str, Any] = {
    "destination": "021000021", "origin": "1234567890", "destination_name": "FIRST BANK", "origin_name": "SURETY",
    "created_at": MORNING,
}  # fmt: skip
BATCH: dict[str, Any] = {
    "service_class": "225", "company_name": "ADAS BOOKS", "company_id": "1234567890", "entry_class": "WEB",
    "description": "PURCHASE", "odfi": "02100002", "effective_date": date(2026, 12, 2), "purpose": "purchase",
}  # fmt: skip
ENTRY: dict[str, Any] = {
    "transaction_code": "27", "routing": "011401533", "account_number": "987654321012", "amount_minor": 1250,
    "trace_sequence": 1, "individual_id": "pay000000000001", "name": "ADA LOVELACE", "discretionary_data": "S",
}  # fmt: skip


def write(*batches: tuple[dict[str, Any], list[dict[str, Any]]], **file: Any) -> bytes:
    """A file of batches, each with what differs of its terms and of each entry's terms."""
    stream = io.BytesIO()
    writer = NachaWriter(stream, FileTerms(**FILE | file))
    for terms, entries in batches:
        writer.begin_batch(BatchTerms(**BATCH | terms))
        for sequence, entry in enumerate(entries, start=1):
            writer.add_entry(entry_terms({"trace_sequence": sequence} | entry))
        writer.end_batch()
    writer.close()
    return stream.getvalue()


def entry_terms(changes: dict[str, Any]) -> EntryTerms:
    """An entry's terms, with what differs."""
    values: dict[str, Any] = {**ENTRY, **changes}
    return EntryTerms(**values)


def broken(data: bytes, mode: Any = "strict") -> list[tuple[int, str, str, str]]:
    """The problems of a file, without what was expected."""
    reader, _ = read_file(io.BytesIO(data), mode)
    return [(each.line, each.field, each.rule, each.value) for each in reader.problems]


def rules(problems: list[NachaProblem]) -> list[tuple[str, str]]:
    """The fields and rules of problems."""
    return [(each.field, each.rule) for each in problems]


def replace(data: bytes, line: int, first: int, text: str) -> bytes:
    """A file with other characters in a line, from a position on; both count from 1."""
    lines = data.split(b"\n")
    whole = lines[line - 1]
    lines[line - 1] = whole[: first - 1] + text.encode("latin-1") + whole[first - 1 + len(text) :]
    return b"\n".join(lines)
