"""Control totals of a batch and of a file."""

from __future__ import annotations

from dataclasses import dataclass

HASH_MODULUS = 10**10
TOTAL_MAX = 10**12 - 1
BATCH_ENTRIES_MAX = 10**6 - 1
FILE_ENTRIES_MAX = 10**8 - 1
BATCHES_MAX = 10**6 - 1


@dataclass(slots=True)
class NachaTotals:
    """`records` counts entries and addenda; the hash is the sum of the RDFIs' first eight digits. Amounts in cents."""

    entries: int = 0
    records: int = 0
    hash: int = 0
    debits_minor: int = 0
    credits_minor: int = 0

    def add_entry(self, rdfi: int, amount_minor: int, *, is_credit: bool) -> None:
        """Count an entry; its addenda are counted one by one."""
        self.entries += 1
        self.records += 1
        self.hash += rdfi
        if is_credit:
            self.credits_minor += amount_minor
        else:
            self.debits_minor += amount_minor

    def add(self, other: NachaTotals) -> None:
        """Add a batch's totals to the file's."""
        self.entries += other.entries
        self.records += other.records
        self.hash += other.hash
        self.debits_minor += other.debits_minor
        self.credits_minor += other.credits_minor

    def controls(self) -> dict[str, int]:
        """The fields of a control record that state them."""
        return {
            "entry_count": self.records,
            "entry_hash": self.hash % HASH_MODULUS,
            "debit_total": self.debits_minor,
            "credit_total": self.credits_minor,
        }
