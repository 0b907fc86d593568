"""Entries to a NACHA file, one at a time: PPD, CCD and WEB, returns and notifications of change.

    writer = NachaWriter(stream, FileTerms(...))
    writer.begin_batch(BatchTerms(...))
    writer.add_entry(EntryTerms(...))
    writer.end_batch()
    writer.close()

What would break a rule is refused before a byte of it is written. A batch whose records fill six digits is continued
in another one by itself. Amounts have twelve digits in the batch's control and in the file's: an entry beyond them
raises NachaFileFull, and belongs into another file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import BinaryIO

from db.banking_days import EASTERN, is_banking_day
from db.formats.nacha import checks, codes, dated_rules, fields
from db.formats.nacha.checks import Broken
from db.formats.nacha.dated_rules import Purpose
from db.formats.nacha.fields import Layout
from db.formats.nacha.problems import NachaError, NachaProblem, show_value
from db.formats.nacha.records import NachaRecord, encode_record, layout_of_addenda
from db.formats.nacha.totals import BATCH_ENTRIES_MAX, BATCHES_MAX, FILE_ENTRIES_MAX, TOTAL_MAX, NachaTotals

MODIFIERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""File id modifiers in the order of a day's files."""


class NachaFileFull(NachaError):
    """The file has no room for the entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTerms:
    """A file's header. `destination` and `origin` have nine digits or ten characters, as the bank says."""

    destination: str
    origin: str
    destination_name: str
    origin_name: str
    created_at: datetime
    modifier: str = "A"
    reference: str = ""
    line_end: bytes = b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTerms:
    """A batch's header. `purpose` decides about the entry description; an effective date is a banking day.

    `is_return` is for batches of returns and notifications, whose dates the receiving bank repeats.
    """

    service_class: str
    company_name: str
    company_id: str
    entry_class: str
    description: str
    odfi: str
    effective_date: date | None
    purpose: Purpose = "other"
    company_data: str = ""
    descriptive_date: str = ""
    settlement_day: str = ""
    is_return: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryTerms:
    """An entry; `routing` has nine digits. `trace_sequence` is our number within the ODFI, seven digits at most."""

    transaction_code: str
    routing: str
    account_number: str
    amount_minor: int
    trace_sequence: int
    individual_id: str = ""
    name: str = ""
    discretionary_data: str = ""
    addenda: Sequence[dict[str, str]] = ()


@dataclass(frozen=True, slots=True)
class WrittenEntry:
    """Where an entry stands in its file."""

    batch_number: int
    trace_number: str


class NachaWriter:
    """Writes one file. `totals` and `batches` are those of the ended batches."""

    def __init__(self, stream: BinaryIO, terms: FileTerms) -> None:
        self.terms = terms
        self.totals = NachaTotals()
        self.batches = 0
        self._stream = stream
        self._records = 0
        self._batch: BatchTerms | None = None
        self._header: NachaRecord | None = None
        self._batch_totals = NachaTotals()
        self._last_trace = ""
        created = terms.created_at.astimezone(EASTERN)
        self._on = created.date()
        header = make_record(
            fields.FILE_HEADER,
            immediate_destination=terms.destination, immediate_origin=terms.origin,
            creation_date=f"{created:%y%m%d}", creation_time=f"{created:%H%M}", file_id_modifier=terms.modifier,
            immediate_destination_name=terms.destination_name, immediate_origin_name=terms.origin_name,
            reference_code=terms.reference,
        )  # fmt: skip
        refuse(checks.check_file_header(header))
        self._write(header.text)

    def begin_batch(self, terms: BatchTerms) -> int:
        """Begin a batch and return its number. Raises NachaError."""
        assert self._batch is None, "the last batch has not ended"
        if self.batches >= BATCHES_MAX:
            raise NachaFileFull([NachaProblem(0, "batch_count", "has_at_most_6_digits", str(self.batches + 1))])
        effective = f"{terms.effective_date:%y%m%d}" if terms.effective_date else ""
        header = make_record(
            fields.BATCH_HEADER,
            service_class=terms.service_class, company_name=terms.company_name, company_data=terms.company_data,
            company_id=terms.company_id, entry_class=terms.entry_class, entry_description=terms.description,
            descriptive_date=terms.descriptive_date, effective_date=effective, settlement_day=terms.settlement_day,
            originator_status="1", odfi=terms.odfi, batch_number=str(self.batches + 1),
        )  # fmt: skip
        refuse([*checks.check_batch_header(header), *self._check_batch(terms)])
        self._write(header.text)
        self.batches += 1
        self._batch, self._header = terms, header
        self._batch_totals = NachaTotals()
        self._last_trace = ""
        return self.batches

    def add_entry(self, terms: EntryTerms) -> WrittenEntry:
        """Write an entry with its addenda. Raises NachaError, of all its broken rules, or NachaFileFull."""
        assert self._batch is not None and self._header is not None, "no batch has begun"
        odfi = self._batch.odfi
        trace = f"{odfi}{terms.trace_sequence:07}"
        entry = make_record(
            fields.ENTRY,
            transaction_code=terms.transaction_code, rdfi=terms.routing[:8], check_digit=terms.routing[8:],
            account_number=terms.account_number, amount=terms.amount_minor, individual_id=terms.individual_id,
            name=terms.name, discretionary_data=terms.discretionary_data,
            addenda_indicator=str(int(bool(terms.addenda))), trace_number=trace,
        )  # fmt: skip
        addenda = [
            make_addenda(values, sequence, trace, self._batch.entry_class)
            for sequence, values in enumerate(terms.addenda, start=1)
        ]
        refuse([*checks.check_entry(entry, addenda, self._header), *self._check_entry(terms, trace)])
        self._make_room(terms, 1 + len(addenda))
        self._write(entry.text)
        for each in addenda:
            self._write(each.text)
        totals = self._batch_totals
        totals.add_entry(int(terms.routing[:8]), terms.amount_minor, is_credit=codes.is_credit(terms.transaction_code))
        totals.records += len(addenda)
        self._last_trace = trace
        return WrittenEntry(self.batches, trace)

    def end_batch(self) -> NachaTotals:
        """Write the batch's control and return its totals."""
        assert self._batch is not None, "no batch has begun"
        terms, totals, self._batch = self._batch, self._batch_totals, None
        if not totals.entries:
            raise NachaError([NachaProblem(0, "batch", "has_an_entry", str(self.batches))])
        self._write(
            encode_record(
                fields.BATCH_CONTROL,
                {
                    **totals.controls(),
                    "service_class": terms.service_class,
                    "company_id": terms.company_id,
                    "odfi": terms.odfi,
                    "batch_number": str(self.batches),
                },
            )
        )
        self.totals.add(totals)
        return totals

    def close(self) -> NachaTotals:
        """Write the file's control and fill its last block; return its totals. The stream stays open."""
        assert self._batch is None, "the last batch has not ended"
        blocks = -(-(self._records + 1) // fields.RECORDS_PER_BLOCK)
        controls = {**self.totals.controls(), "batch_count": self.batches, "block_count": blocks}
        self._write(encode_record(fields.FILE_CONTROL, controls))
        while self._records % fields.RECORDS_PER_BLOCK:
            self._write(fields.PADDING)
        return self.totals

    def _write(self, text: str) -> None:
        self._stream.write(text.encode("ascii") + self.terms.line_end)
        self._records += 1

    def _check_batch(self, terms: BatchTerms) -> list[Broken]:
        known = codes.ENTRY_CLASSES.get(terms.entry_class)
        broken: list[Broken] = []
        if known and not known.written and not (terms.is_return and terms.entry_class == "COR"):
            broken.append((0, "entry_class", "is_one_that_is_written", terms.entry_class, "PPD, CCD or WEB"))
        if terms.is_return:
            return broken
        for credit in {codes.CREDITS_ONLY: (True,), codes.DEBITS_ONLY: (False,)}.get(
            terms.service_class, (False, True)
        ):
            wanted = dated_rules.required_description(terms.purpose, terms.entry_class, is_credit=credit, on=self._on)
            if wanted and terms.description != wanted:
                broken.append((0, "entry_description", f"is_that_of_{terms.purpose}", terms.description, wanted))
        if terms.effective_date is None:
            broken.append((0, "effective_date", "is_present", "", ""))
        elif not is_banking_day(terms.effective_date):
            broken.append((0, "effective_date", "is_a_banking_day", str(terms.effective_date), ""))
        return broken

    def _check_entry(self, terms: EntryTerms, trace: str) -> list[Broken]:
        assert self._batch is not None
        broken: list[Broken] = []
        if trace <= self._last_trace:
            broken.append((0, "trace_number", "ascends", trace, f"above {self._last_trace}"))
        effective, at = self._batch.effective_date, self.terms.created_at
        if self._batch.is_return or effective is None:
            return broken
        credit = codes.is_credit(terms.transaction_code)
        latest = dated_rules.latest_effective_date(at, is_credit=credit)
        if effective < self._on:
            broken.append((0, "effective_date", "is_not_past", str(effective), f"from {self._on}"))
        elif effective > latest:
            broken.append((0, "effective_date", "is_within_the_days_ahead", str(effective), f"up to {latest}"))
        elif effective == self._on:
            obstacle = dated_rules.same_day_obstacle(
                at, terms.amount_minor, is_credit=credit, entry_class=self._batch.entry_class
            )
            if obstacle:
                limit = dated_rules.same_day_limit(self._on)
                name, value = ("amount", terms.amount_minor) if "limit" in obstacle else ("effective_date", effective)
                broken.append((0, name, obstacle, str(value), f"at most {limit}" if "limit" in obstacle else ""))
        return broken

    def _make_room(self, terms: EntryTerms, records: int) -> None:
        """Continue in another batch if this one has no room. Raises NachaFileFull if the file has none."""
        assert self._batch is not None
        batch, credit = self._batch_totals, codes.is_credit(terms.transaction_code)
        earlier = (
            batch.credits_minor + self.totals.credits_minor if credit else batch.debits_minor + self.totals.debits_minor
        )
        total, file_records = earlier + terms.amount_minor, self.totals.records + batch.records + records
        if total > TOTAL_MAX or file_records > FILE_ENTRIES_MAX:
            name, value = ("total", total) if total > TOTAL_MAX else ("entry_count", file_records)
            raise NachaFileFull([NachaProblem(0, name, "fits_into_the_file_control", str(value))])
        if batch.records + records > BATCH_ENTRIES_MAX:
            again = self._batch
            self.end_batch()
            self.begin_batch(again)


def make_record(layout: Layout, **values: str | int) -> NachaRecord:
    """A record to write. Raises NachaError."""
    return NachaRecord(layout, encode_record(layout, values), 0, b"")


def make_addenda(values: dict[str, str], sequence: int, trace: str, entry_class: str) -> NachaRecord:
    """An addenda record from its fields; `type_code` decides about the layout. Numbers of place are added."""
    start = f"7{values['type_code']}{values.get('code', '')}"
    layout = layout_of_addenda(start, entry_class)
    given: dict[str, str | int] = {name: value for name, value in values.items() if name != "type_code"}
    if layout is fields.ADDENDA_05:
        given |= {"addenda_sequence": sequence, "entry_sequence": trace[8:]}
    elif layout is fields.ADDENDA_OTHER:
        given["type_code"] = values["type_code"]
    else:
        given["trace_number"] = trace
    return make_record(layout, **given)


def refuse(broken: Iterable[Broken]) -> None:
    """Raises NachaError with all broken rules, if there are any."""
    problems = [
        NachaProblem(line, name, rule, show_value(value), expected=expected)
        for line, name, rule, value, expected in broken
    ]
    if problems:
        raise NachaError(problems)
