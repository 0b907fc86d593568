"""BAI2 files: records 01, 02, 03, 16, 49, 98, 99, each continued by 88.

A record ends with a slash, except where its last field is a text. Amounts have the currency's decimals implied and no
sign: the type code of a transaction says whether it is a credit (1xx to 3xx) or a debit (4xx to 6xx). Totals of amounts
and numbers of records protect the file; one that breaks them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import IO

from msgspec import Struct, field

from db.formats.bank_statements import (
    FileRefused,
    RefusedEntry,
    SkippedEntry,
    StatementHead,
    StatementLine,
    StatementPart,
    one_line,
    references_among,
)

RECORD_CODES = frozenset({"01", "02", "03", "16", "49", "88", "98", "99"})
OPENING_LEDGER, CLOSING_LEDGER = "010", "015"
NO_MONEY = "890"
GROUPS_REFUSED = {"2": "a group that deletes an earlier one is not supported", "4": "this group is a test"}
LINE_LENGTH_MAX = 100_000


class Record(Struct):
    """A record with its continuations: their first fields, the rest of each line, and where it begins."""

    place: int
    code: str
    fields: list[str]
    texts: list[str] = field(default_factory=list)
    lines: int = 1
    """Physical records, continuations included."""


class Totals(Struct):
    """What an account, a group or the file adds up to."""

    amount: int = 0
    records: int = 0
    parts: int = 0


class GroupHead(Struct):
    """The fields of a group header that apply to its accounts."""

    bank: str
    currency: str
    as_of: date
    reference: str


def read_bai2(file: IO[bytes], *, check_totals: bool = True) -> Iterator[StatementPart]:
    """The accounts of a BAI2 file as statements. Raises FileRefused for a damaged file, and for wrong totals."""
    reader = Reader(check_totals=check_totals)
    for record in read_records(file):
        yield from reader.take(record)
    if reader.place_of_end is None:
        raise FileRefused("the file is cut off: it has no trailer (record 99)")


def read_records(file: IO[bytes]) -> Iterator[Record]:
    """The records with their continuations. Raises FileRefused for a line that is no record."""
    record: Record | None = None
    for place, raw in enumerate(iter(lambda: file.readline(LINE_LENGTH_MAX), b""), start=1):
        line = raw.decode("utf-8", "replace").strip("\r\n\x1a \t")
        if not line:
            continue
        code, _, rest = line.partition(",")
        # Some banks write a colon in place of the comma after 88.
        if code not in RECORD_CODES and code[:2] == "88":
            code, rest = "88", line[3:]
        if code not in RECORD_CODES or (record is None and code != "01"):
            raise FileRefused(f"line {place}: a record begins with one of {', '.join(sorted(RECORD_CODES))}")
        if code == "88":
            assert record is not None
            record.lines += 1
            if record.code == "16":
                record.texts.append(rest.removesuffix("/"))
            else:
                record.fields += rest.removesuffix("/").split(",")
            continue
        if record is not None:
            yield record
        # The text of a transaction may have commas and slashes.
        record = Record(place, code, rest.split(",") if code == "16" else rest.split("/")[0].split(","))
    if record is not None:
        yield record


class Reader:
    """Makes statements of records, and checks their order and totals."""

    def __init__(self, *, check_totals: bool) -> None:
        self.check_totals = check_totals
        self.file, self.group, self.account = Totals(), Totals(), Totals()
        self.group_head: GroupHead | None = None
        self.head: StatementHead | None = None
        self.place_of_end: int | None = None

    def take(self, record: Record) -> Iterator[StatementPart]:
        """The parts of statements that a record makes. Raises FileRefused."""
        for totals in (self.file, self.group, self.account):
            totals.records += record.lines
        if self.place_of_end is not None or (record.code == "01" and self.file.records != record.lines):
            raise FileRefused(f"line {record.place}: a second file begins; import each file by itself")
        match record.code:
            case "02":
                self.group, self.group_head = Totals(records=record.lines), read_group(record)
            case "03":
                yield self.open_account(record)
            case "16":
                yield self.read_transaction(record)
            case "49":
                self.close(record, self.account, "account", within=self.group)
                self.head = None
            case "98":
                self.close(record, self.group, "group", within=self.file)
                self.group_head = None
            case "99":
                self.close(record, self.file, "file")
                self.place_of_end = record.place

    def open_account(self, record: Record) -> StatementHead:
        """The head of an account's statement. Raises FileRefused."""
        group = self.group_head
        if group is None or self.head is not None:
            raise FileRefused(f"line {record.place}: an account (03) stands in a group and ends before the next")
        number, currency, *summary = record.fields
        self.account = Totals(records=record.lines)
        balances: dict[str, int] = {}
        at = 0
        while at + 1 < len(summary):
            code, text = summary[at], summary[at + 1]
            if text.strip():
                amount = read_amount(text, record.place)
                self.account.amount += amount
                balances[code] = amount
            at += 3 + length_of_funds(summary, at + 3) if len(summary) > at + 3 else 4
        head = self.head = StatementHead(
            account=number.strip().upper(),
            bank=group.bank,
            currency=(currency.strip() or group.currency).lower(),
            reference=group.reference,
            from_on=group.as_of,
            to_on=group.as_of,
            opening_minor=balances.get(OPENING_LEDGER),
            closing_minor=balances.get(CLOSING_LEDGER),
        )
        if not head.account:
            raise FileRefused(f"line {record.place}: an account has a number")
        return head

    def read_transaction(self, record: Record) -> StatementPart:
        """A transaction as a line, or why there is none. Raises FileRefused."""
        head, group = self.head, self.group_head
        if head is None or group is None:
            raise FileRefused(f"line {record.place}: a transaction (16) stands in an account")
        fields = [*record.fields, "", "", ""]
        code, amount_text = fields[0].strip(), fields[1]
        amount = read_amount(amount_text, record.place) if amount_text.strip("/ ") else 0
        self.account.amount += amount
        funds = length_of_funds(fields, 2)
        bank_reference, reference, *texts = (one.removesuffix("/") for one in fields[2 + funds :])
        if code == NO_MONEY:
            return SkippedEntry(record.place)
        kind = int(code) if code.isdecimal() and len(code) == 3 else 0
        if not (100 <= kind <= 699 or 920 <= kind <= 999):
            return RefusedEntry(record.place, "type code", code, "a type code is a credit's or a debit's")
        if amount < 0:
            return RefusedEntry(record.place, "amount", amount_text, "an amount has no sign; its type code has")
        text = one_line([",".join(texts).strip(" ,"), *record.texts])
        return StatementLine(
            place=record.place,
            booked_on=group.as_of,
            value_on=value_date(fields),
            amount_minor=amount if kind < 400 or 920 <= kind < 960 else -amount,
            currency=head.currency,
            bank_reference=one_line([bank_reference])[:64],
            references=references_among([bank_reference, reference], text),
            text=text,
            code=code,
        )

    def close(self, record: Record, totals: Totals, name: str, within: Totals | None = None) -> None:
        """Check the totals of an account, a group or the file. Raises FileRefused for wrong ones."""
        if self.head is not None and name != "account":
            raise FileRefused(f"line {record.place}: the account before has no trailer (49)")
        amount = read_amount(record.fields[0], record.place)
        count = record.fields[-1].strip().strip("/")
        if within is not None:
            within.amount += totals.amount
            within.parts += 1
        expected = [("amounts", amount, totals.amount), ("records", int(count or 0), totals.records)]
        for what, stated, found in expected if self.check_totals else []:
            if stated != found:
                raise FileRefused(
                    f"line {record.place}: the {name}'s trailer says that its {what} add up to {stated}, they add up to"
                    f" {found}: the file is incomplete or was changed (--accept-totals imports it all the same)"
                )


def read_group(record: Record) -> GroupHead:
    """The header of a group. Raises FileRefused for a wrong date."""
    fields = [*record.fields, *[""] * 7]
    if (status := fields[2].strip()) in GROUPS_REFUSED:
        raise FileRefused(f"line {record.place}: {GROUPS_REFUSED[status]} (status {status})")
    as_of, time = read_day(fields[3], record.place), one_line([fields[4]])[:4]
    return GroupHead(
        bank=fields[1].strip().upper(),
        currency=fields[5].strip() or "USD",
        as_of=as_of,
        reference=f"{as_of:%Y-%m-%d} {time}".strip(),
    )


def read_day(text: str, place: int) -> date:
    """A date YYMMDD. Raises FileRefused."""
    text = text.strip()
    try:
        return date(2000 + int(text[:2]), int(text[2:4]), int(text[4:6]))
    except ValueError:
        raise FileRefused(f"line {place}: a date is YYMMDD, not {text!r}") from None


def read_amount(text: str, place: int) -> int:
    """An amount in minor units with an optional sign. Raises FileRefused."""
    digits = text.strip().strip("/")
    if not digits.lstrip("+-").isdecimal() or len(digits) > 19:
        raise FileRefused(f"line {place}: an amount has digits only, not {text[:40]!r}")
    return int(digits)


def length_of_funds(fields: list[str], at: int) -> int:
    """The number of fields that say when funds are available, from the funds type on."""
    kind = fields[at].strip().strip("/") if at < len(fields) else ""
    match kind:
        case "S":
            return 4
        case "V":
            return 3
        case "D":
            count = fields[at + 1].strip() if at + 1 < len(fields) else ""
            return 2 + 2 * int(count) if count.isdecimal() and len(count) <= 3 else 2
    return 1


def value_date(fields: list[str]) -> date | None:
    """The value date of a transaction whose funds type says one: V, or the number of days 0 to 2."""
    if fields[2].strip() == "V" and len(fields) > 3 and fields[3].strip():
        try:
            return read_day(fields[3], 0)
        except FileRefused:
            return None
    return None
