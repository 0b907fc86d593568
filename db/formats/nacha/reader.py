"""A NACHA file to entries and batches, one at a time.

    reader = NachaReader(stream, "patient")
    for part in reader.parts():
        ...                          # NachaEntry, and after its entries each NachaBatch
    reader.problems                  # complete after the last part

`strict` is for files that we write: every broken rule is an error, and all errors of a file are found at once.
`patient` is for files of banks: a broken rule is a warning, and an error only where an entry can't be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from db.formats.nacha import checks, codes, fields
from db.formats.nacha.checks import Broken
from db.formats.nacha.lines import NachaLine, decode_line, nacha_lines
from db.formats.nacha.problems import PROBLEMS_MAX, NachaError, NachaProblem, show_value
from db.formats.nacha.records import NachaRecord, is_iat_header, layout_of
from db.formats.nacha.totals import NachaTotals

ADDENDA_MAX = 9999
FILLER_MAX = 10_000
"""Records of nines in a file. Nine fill a block; some banks send more."""
BLANKS = " \t\0\x1a"
"""Of a line without content; some banks end a file with 1A."""
UNUSABLE = frozenset(
    {
        ("amount", "is_filled_with_digits"), ("transaction_code", "is_filled_with_digits"),
        ("trace_number", "is_filled_with_digits"), ("original_trace_number", "is_filled_with_digits"),
        ("record", "begins_with_a_known_type"), ("line", "has_at_most_94_characters"),
        ("addenda", "follow_an_entry"), ("addenda", "are_at_most_9999"), ("file", "has_entries_or_a_header"),
    }
)  # fmt: skip
"""(field, rule) that are errors in a patient reading too."""
CONTROL_FIELDS = ("entry_count", "entry_hash", "debit_total", "credit_total")


@dataclass(slots=True, eq=False)
class NachaBatch:
    """A batch; its control and totals are complete when its last entry was read. Each record may be missing."""

    number: int
    header: NachaRecord | None
    control: NachaRecord | None = None
    totals: NachaTotals = field(default_factory=NachaTotals)
    last_trace: str = ""

    @property
    def entry_class(self) -> str:
        """Its Standard Entry Class code; empty without a header."""
        return self.header["entry_class"] if self.header else ""


@dataclass(slots=True, eq=False)
class NachaEntry:
    """An entry with its addenda. `is_usable` is False if amount, transaction code or trace number can't be read."""

    batch: NachaBatch
    record: NachaRecord
    addenda: list[NachaRecord]
    is_usable: bool = True

    @property
    def amount_minor(self) -> int:
        """In cents."""
        return self.record.number("amount")

    @property
    def is_credit(self) -> bool:
        """Whether it credits the receiver's account; of a return, whether the original did."""
        return codes.is_credit(self.record.text[1:3])

    @property
    def return_addenda(self) -> NachaRecord | None:
        """The addenda of a return, a dishonored or contested return, or a notification of change."""
        return next((each for each in self.addenda if each.layout.name in checks.RETURN_LAYOUTS), None)


class NachaReader:
    """Reads one file. `problems` has at most a thousand of its problems, `errors` and `warnings` count all of them."""

    def __init__(self, stream: BinaryIO, mode: Literal["strict", "patient"]) -> None:
        self.mode = mode
        self.problems: list[NachaProblem] = []
        self.errors = 0
        self.warnings = 0
        self.header: NachaRecord | None = None
        self.control: NachaRecord | None = None
        self.totals = NachaTotals()
        self.batches = 0
        self._stream = stream
        self._batch: NachaBatch | None = None
        self._entry: NachaEntry | None = None
        self._records = 0
        self._last_batch_number = 0
        self._filler = 0
        self._ends: set[bytes] = set()
        self._finished = False
        self._entry_class = ""

    def entries(self) -> Iterator[NachaEntry]:
        """The entries of all batches."""
        return (part for part in self.parts() if isinstance(part, NachaEntry))

    def parts(self) -> Iterator[NachaEntry | NachaBatch]:
        """Each entry, and each batch after its last entry. Raises NachaError if the stream has no lines."""
        for record in self.records():
            yield from self._place(record)
        yield from self._finish()

    def records(self) -> Iterator[NachaRecord]:
        """Every line as a record, without the checks between records. Their `raw` bytes are the file's."""
        for line in nacha_lines(self._stream):
            record = self._decode(line)
            if record is not None:
                yield record

    def raise_for_errors(self) -> None:
        """Raises NachaError if there was an error."""
        if self.errors:
            raise NachaError([problem for problem in self.problems if problem.severity == "error"])

    def _decode(self, line: NachaLine) -> NachaRecord | None:
        raw = line.content + line.end
        if line.end:
            self._ends.add(line.end)
            if len(self._ends) == 2:
                self._ends.add(b"seen")
                self._report(line.number, "line", "ends_like_the_others", show_value(line.end.decode("ascii")))
        text, broken = decode_line(line.content)
        if not text.strip(BLANKS):
            layout = fields.UNREADABLE
            self._report(line.number, "line", "is_not_empty", "")
            return NachaRecord(layout, text, line.number, raw)
        for rule, value in broken:
            self._report(line.number, "line", rule, value)
        if text[0] == "5":
            self._entry_class = "IAT" if is_iat_header(text) else text[50:53]
        layout = layout_of(text, self._entry_class)
        if layout is fields.FILE_CONTROL and self._entry_class == "ADV":
            layout = fields.FILE_CONTROL_ADV
        return NachaRecord(layout, text, line.number, raw)

    def _place(self, record: NachaRecord) -> Iterator[NachaEntry | NachaBatch]:
        kind = record.text[0]
        if record.layout is fields.UNREADABLE:
            if record.text.strip(BLANKS):
                self._report(record.line, "record", "begins_with_a_known_type", show_value(kind))
            return
        self._records += 1
        if record.layout is fields.FILLER:
            yield from self._end_batch(None)
            self._filler += 1
            if self._filler > FILLER_MAX:
                raise NachaError([NachaProblem(record.line, "filler", f"has_at_most_{FILLER_MAX}_records", "")])
            if self.control is None:
                self._report(record.line, "filler", "follows_the_file_control", "9…9")
            return
        if self._finished and kind in "5678":
            self._finished = False
            self._report(record.line, "record", "precedes_the_file_control", kind)
        problems = record.problems()
        for each in problems:
            self._report(each.line, each.field, each.rule, each.value, each.expected)
        if kind == "7":
            self._add_addenda(record)
        elif kind == "6":
            yield from self._end_entry()
            self._begin_entry(record, usable=not any((each.field, each.rule) in UNUSABLE for each in problems))
        else:
            yield from self._place_header_or_control(record, kind)

    def _place_header_or_control(self, record: NachaRecord, kind: str) -> Iterator[NachaEntry | NachaBatch]:
        if kind == "8" and self._batch is None:
            self._report(record.line, "batch_control", "follows_a_batch_header", record["batch_number"])
        yield from self._end_batch(record if kind == "8" else None)
        if kind == "5":
            self._begin_batch(record)
        elif kind == "1":
            self._begin_file(record)
        elif kind == "9":
            self._end_file(record)

    def _begin_file(self, record: NachaRecord) -> None:
        if self.header is not None or self._records > 1:
            rule = "stands_once" if self.header is not None else "is_the_first_record"
            self._report(record.line, "file_header", rule, "")
        if self.header is None:
            self.header = record
        self._check(checks.check_file_header(record))

    def _begin_batch(self, record: NachaRecord) -> None:
        if self.header is None and self.batches == 0:
            self._report(record.line, "file_header", "is_the_first_record", "")
        self.batches += 1
        self._batch = NachaBatch(self.batches, record)
        self._check(checks.check_batch_header(record))
        number = record.number("batch_number")
        if number <= self._last_batch_number:
            self._report(record.line, "batch_number", "ascends", str(number), f"above {self._last_batch_number}")
        self._last_batch_number = number

    def _begin_entry(self, record: NachaRecord, *, usable: bool) -> None:
        if self._batch is None:
            self._report(record.line, "entry", "follows_a_batch_header", "")
            self.batches += 1
            self._batch = NachaBatch(self.batches, None)
        batch = self._batch
        entry = self._entry = NachaEntry(batch, record, [], is_usable=usable)
        rdfi = record.text[3:11]
        rdfi_number = int(rdfi) if rdfi.isascii() and rdfi.isdigit() else 0
        batch.totals.add_entry(rdfi_number, entry.amount_minor, is_credit=entry.is_credit)
        if "trace_number" in record:
            trace = record.text[79:94]
            if trace <= batch.last_trace:
                self._report(record.line, "trace_number", "ascends", show_value(trace), f"above {batch.last_trace}")
            batch.last_trace = trace

    def _add_addenda(self, record: NachaRecord) -> None:
        entry = self._entry
        if entry is None:
            self._report(record.line, "addenda", "follow_an_entry", record.text[1:3])
            return
        entry.batch.totals.records += 1
        if len(entry.addenda) < ADDENDA_MAX:
            entry.addenda.append(record)
        else:
            entry.is_usable = False
            self._report(record.line, "addenda", "are_at_most_9999", "")

    def _end_entry(self) -> Iterator[NachaEntry]:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._check(checks.check_entry(entry.record, entry.addenda, entry.batch.header))
            yield entry

    def _end_batch(self, control: NachaRecord | None) -> Iterator[NachaEntry | NachaBatch]:
        yield from self._end_entry()
        batch, self._batch = self._batch, None
        if batch is None:
            return
        batch.control = control
        if control is None:
            self._report(0, "batch_control", "ends_the_batch", str(batch.number))
        else:
            if batch.header:
                self._check(checks.check_batch_control(control, batch.header))
            self._check(checks.check_control(control, batch.totals.controls(), CONTROL_FIELDS))
        self.totals.add(batch.totals)
        yield batch

    def _end_file(self, record: NachaRecord) -> None:
        if self.control is not None:
            self._report(record.line, "file_control", "stands_once", "")
            return
        self.control = record
        self._finished = True
        totals = self.totals.controls() | {
            "batch_count": self.batches,
            "block_count": -(-self._records // fields.RECORDS_PER_BLOCK),
        }
        self._check(checks.check_control(record, totals, (*CONTROL_FIELDS, "batch_count", "block_count")))

    def _finish(self) -> Iterator[NachaEntry | NachaBatch]:
        yield from self._end_batch(None)
        if not self.batches and self.header is None:
            self._report(0, "file", "has_entries_or_a_header", "")
        elif self.control is None:
            self._report(0, "file_control", "ends_the_file", "")
        if self._records % fields.RECORDS_PER_BLOCK:
            self._report(0, "file", "is_blocked_by_ten", f"{self._records} records")

    def _check(self, broken: Iterable[Broken]) -> None:
        for line, name, rule, value, expected in broken:
            self._report(line, name, rule, show_value(value), expected)

    def _report(self, line: int, name: str, rule: str, value: str, expected: str = "") -> None:
        severity: Literal["error", "warning"] = (
            "error" if self.mode == "strict" or (name, rule) in UNUSABLE else "warning"
        )
        if severity == "error":
            self.errors += 1
        else:
            self.warnings += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(NachaProblem(line, name, rule, value, severity, expected))


def read_file(stream: BinaryIO, mode: Literal["strict", "patient"]) -> tuple[NachaReader, list[NachaEntry]]:
    """A small file at once: its reader, with problems and totals, and its entries."""
    reader = NachaReader(stream, mode)
    return reader, list(reader.entries())
