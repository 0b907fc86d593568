"""What readers of bank statements yield, whatever the format: a statement's head, its lines, refused entries.

A reader yields the head of each statement before its lines. Amounts are signed minor units: money that arrives is
positive. Refused entries are yielded, never raised; a file that is damaged as a whole raises FileRefused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import date

from msgspec import Struct, field

from db.errors import SuretyError

TEXT_MAX = 500
REFERENCES_MAX = 30
# Words of a free text that may be references: of six characters with a digit, or of twelve.
WORDS = (
    re.compile(r"(?=[A-Za-z\-_/]*\d)[A-Za-z0-9][A-Za-z0-9\-_/]{4,62}[A-Za-z0-9]"),
    re.compile(r"[A-Za-z][A-Za-z\-_]{10,62}[A-Za-z]"),
)


class FileRefused(SuretyError):
    """A file can't be read as a whole, so nothing of it is stored."""


class StatementHead(Struct, kw_only=True):
    """A statement of one account in one currency."""

    account: str
    bank: str = ""
    """Where the account's number is unique within a bank only."""
    currency: str
    reference: str
    page: int | None = None
    """Of a statement that comes in several pages, which share the reference."""
    sequence: int | None = None
    from_on: date | None = None
    to_on: date | None = None
    opening_minor: int | None = None
    closing_minor: int | None = None


class StatementLine(Struct, kw_only=True):
    """An amount that was booked. `place` is the number of its entry or record in the file."""

    place: int
    part: int = 0
    """The number of a part of a batch entry; 0 for a whole entry."""
    booked_on: date
    value_on: date | None = None
    amount_minor: int
    currency: str
    bank_reference: str = ""
    references: list[str] = field(default_factory=list)
    text: str = ""
    code: str = ""
    is_reversal: bool = False


class RefusedEntry(Struct):
    """An entry that is not stored as a line: the field, its value and the rule that it breaks."""

    place: int
    field: str
    value: str
    rule: str
    subject: str = ""
    """The id of what the entry is about, where that can be read."""


class SkippedEntry(Struct):
    """An entry that is not booked, such as a pending one: it is counted, and comes again when it is booked."""

    place: int


StatementPart = StatementHead | StatementLine | RefusedEntry | SkippedEntry


def one_line(texts: Iterable[str | None]) -> str:
    """Texts as one line of bounded length, without characters that control terminals."""
    joined = " ".join(" ".join(text.split()) for text in texts if text)
    return "".join(one if one.isprintable() else " " for one in joined)[:TEXT_MAX]


def references_among(named: Iterable[str | None], text: str) -> list[str]:
    """References, and the words of a text that may be some, each once, bounded."""

    def all_of_them() -> Iterator[str]:
        for one in named:
            if one and one.strip() and one.strip().upper() not in {"NOTPROVIDED", "NONREF"}:
                yield one_line([one])[:64]
        for words in WORDS:
            yield from words.findall(text)

    found: dict[str, None] = {}
    for one in all_of_them():
        found[one] = None
        if len(found) == REFERENCES_MAX:
            break
    return list(found)
