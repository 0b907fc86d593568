"""NACHA files, streamed: written, read, and written again from the entries that were read.

Rates are per second of CPU time. Memory is the growth of the process's peak from the first entry on.
"""

from __future__ import annotations

import hashlib
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

from db.banking_days import EASTERN
from db.formats.nacha.reader import NachaBatch, NachaEntry, NachaReader
from db.formats.nacha.writer import BatchTerms, EntryTerms, FileTerms, NachaWriter

BATCHES = 20
CREATED_AT = datetime(2026, 12, 1, 9, tzinfo=EASTERN)
EFFECTIVE = date(2026, 12, 2)
FILE = FileTerms(
    destination="021000021", origin="1234567890", destination_name="FIRST BANK", origin_name="SURETY",
    created_at=CREATED_AT,
)  # fmt: skip


def run(entries: int) -> dict[str, Any]:
    """The results of one file of so many entries, every tenth with an addenda record."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.ach", Path(folder) / "second.ach"
        before_mb = peak_mb()
        written = cpu_seconds(lambda: write_entries(first, entries))
        read = cpu_seconds(lambda: read_entries(first, entries))
        copied = cpu_seconds(lambda: copy_entries(first, second))
        return {
            "benchmark": "nacha",
            "entries": entries,
            "megabytes": round(first.stat().st_size / 1e6, 1),
            "written_per_second": round(entries / written),
            "read_per_second": round(entries / read),
            "copied_per_second": round(entries / copied),
            "peak_mb": round(peak_mb(), 1),
            "growth_mb": round(peak_mb() - before_mb, 1),
            "same_bytes": digest(first) == digest(second),
        }


def write_entries(path: Path, entries: int) -> None:
    """A file of entries in batches of equal size."""
    with path.open("wb") as stream:
        writer = NachaWriter(stream, FILE)
        for batch in range(BATCHES):
            numbers = range(batch * entries // BATCHES + 1, (batch + 1) * entries // BATCHES + 1)
            if numbers:
                writer.begin_batch(batch_terms(f"MERCHANT {batch}"))
                for number in numbers:
                    writer.add_entry(entry_terms(number))
                writer.end_batch()
        writer.close()


def batch_terms(company_name: str) -> BatchTerms:
    """A batch of web debits."""
    return BatchTerms(
        service_class="225", company_name=company_name, company_id="1234567890", entry_class="WEB",
        description="PURCHASE", odfi="02100002", effective_date=EFFECTIVE, purpose="purchase",
    )  # fmt: skip


def entry_terms(number: int) -> EntryTerms:
    """An entry by its number."""
    return EntryTerms(
        transaction_code="27" if number % 3 else "37", routing="011401533", account_number=f"{number:012}",
        amount_minor=number % 100_000 + 1, trace_sequence=number, individual_id=f"pay{number:012}",
        name=f"PAYER {number}", discretionary_data="S",
        addenda=[] if number % 10 else [{"type_code": "05", "information": f"ORDER {number}"}],
    )  # fmt: skip


def read_entries(path: Path, entries: int) -> None:
    """Read a file strictly; its entries and amounts are complete."""
    with path.open("rb") as stream:
        reader = NachaReader(stream, "strict")
        count = total = 0
        for entry in reader.entries():
            count += 1
            total += entry.amount_minor
    reader.raise_for_errors()
    assert (count, total) == (entries, sum(number % 100_000 + 1 for number in range(1, entries + 1)))


def copy_entries(source: Path, target: Path) -> None:
    """Write what was read, from its fields."""
    with source.open("rb") as stream, target.open("wb") as output:
        writer = NachaWriter(output, FILE)
        reader = NachaReader(stream, "strict")
        begun: NachaBatch | None = None
        for part in reader.parts():
            if isinstance(part, NachaBatch):
                writer.end_batch()
                continue
            if part.batch is not begun:
                assert part.batch.header is not None
                begun = part.batch
                writer.begin_batch(batch_terms(part.batch.header["company_name"]))
            writer.add_entry(terms_of(part))
        writer.close()


def terms_of(entry: NachaEntry) -> EntryTerms:
    """The terms of an entry that was read."""
    values = entry.record.values()
    return EntryTerms(
        transaction_code=values["transaction_code"], routing=values["rdfi"] + values["check_digit"],
        account_number=values["account_number"], amount_minor=entry.amount_minor,
        trace_sequence=int(values["trace_number"][8:]), individual_id=values["individual_id"], name=values["name"],
        discretionary_data=values["discretionary_data"],
        addenda=[{"type_code": "05", "information": each["information"]} for each in entry.addenda],
    )  # fmt: skip


def cpu_seconds(work: Callable[[], None]) -> float:
    """The CPU time of some work, of user and system."""
    before = time.process_time()
    work()
    return max(time.process_time() - before, 1e-6)


def peak_mb() -> float:
    """The largest memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
