"""ISO 20022 camt.053 statements, read element by element. 001.02 and 001.08 differ in how a status is written.

CdtDbtInd is the direction of the money, also of a reversal: a reversed debit (RvslInd) is a credit.
A batch entry whose details have amounts that add up to it becomes one line for each detail, otherwise one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import IO
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from db.formats.amounts import Unreadable, minor_units
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

NAMESPACE = re.compile(r"\{urn:iso:std:iso:20022:tech:xsd:camt\.053\.001\.(\d\d)\}")
DETAILS_MAX = 10_000
"""Details of an entry that are split; an entry with more stays one line."""
REFERENCE_PATHS = (
    *("Refs/AcctSvcrRef", "Refs/EndToEndId", "Refs/TxId", "Refs/InstrId", "Refs/PmtInfId", "Refs/MsgId"),
    *("Refs/ClrSysRef", "Refs/ChqNb", "Refs/UETR", "Refs/Prtry/Ref", "RmtInf/Strd/CdtrRefInf/Ref"),
)


class Details:
    """The details of the entry that is being read: their elements are dropped as soon as they are read."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, str, list[str], str]] = []
        self.count = 0

    def add(self, detail: Element, direction: str) -> None:
        """Keep the amount, currency, references and text of a detail."""
        self.count += 1
        if self.count > DETAILS_MAX:
            self.parts.clear()
            return
        amount = detail.find("Amt")
        if amount is None:
            amount = detail.find("AmtDtls/TxAmt/Amt")
        signed = "-" if (detail.findtext("CdtDbtInd") or direction) == "DBIT" else ""
        text = one_line([*(one.text for one in detail.iterfind("RmtInf/Ustrd")), detail.findtext("AddtlTxInf")])
        named = [one.text for path in REFERENCE_PATHS for one in detail.iterfind(path)]
        money = ("", "") if amount is None else (signed + (amount.text or "").strip(), amount.get("Ccy", ""))
        self.parts.append((*money, references_among(named, text), text))


def read_camt053(file: IO[bytes]) -> Iterator[StatementPart]:
    """The statements of a camt.053 file. Raises FileRefused for a file that is damaged or another message."""
    try:
        yield from read_elements(file)
    except ParseError as error:
        raise FileRefused(f"the XML is damaged or cut off: {error}") from None
    except DefusedXmlException:
        raise FileRefused("the XML has a document type or entities, which a camt.053 file never has") from None


def read_elements(file: IO[bytes]) -> Iterator[StatementPart]:
    """The statements, while their elements are read. Raises ParseError, FileRefused."""
    reader: ElementReader | None = None
    for event, element in iterparse(file, events=("start", "end"), forbid_dtd=True):
        if reader is None:
            if NAMESPACE.match(element.tag) is None:
                raise FileRefused(f"this is no camt.053 file: its first element is {element.tag[:100]}")
            reader = ElementReader()
        element.tag = element.tag.rpartition("}")[2]
        if event == "start":
            reader.begin(element)
        else:
            yield from reader.end(element)
    if reader is None:
        raise FileRefused("the file is empty")


class ElementReader:
    """Makes parts of statements as elements end, and drops the elements, so that memory stays bounded."""

    def __init__(self) -> None:
        self.open: list[Element] = []
        self.statement: Element | None = None
        self.head: StatementHead | None = None
        self.details = Details()
        self.place = 0

    def begin(self, element: Element) -> None:
        """An element begins."""
        self.open.append(element)
        if element.tag == "Stmt":
            self.statement, self.head = element, None
        elif element.tag == "Ntry":
            self.place, self.details = self.place + 1, Details()

    def end(self, element: Element) -> Iterator[StatementPart]:
        """An element ends. Raises FileRefused."""
        self.open.pop()
        if self.statement is None:
            return
        match element.tag:
            case "TxDtls" if len(self.open) >= 2 and self.open[-2].tag == "Ntry":
                self.details.add(element, self.open[-2].findtext("CdtDbtInd") or "")
                self.open[-1].remove(element)
            case "Ntry" if self.open[-1] is self.statement:
                if self.head is None:
                    self.head = read_head(self.statement, element)
                    yield self.head
                yield from read_entry(element, self.details, self.head, self.place)
                self.statement.remove(element)
            case "Stmt":
                if self.head is None:
                    yield read_head(self.statement, None)
                self.open[-1].remove(element)
                self.statement = None


def read_head(statement: Element, entry: Element | None) -> StatementHead:
    """A statement's head, whose balances stand before its first entry. Raises FileRefused."""
    iban = statement.findtext("Acct/Id/IBAN")
    account = iban or statement.findtext("Acct/Id/Othr/Id")
    reference = statement.findtext("Id")
    if not account or not reference:
        raise FileRefused(f"a statement has no {'Id' if account else 'Acct/Id'}")
    balances = {
        balance.findtext("Tp/CdOrPrtry/Cd"): balance
        for balance in statement.iterfind("Bal")
        if balance.find("Amt") is not None
    }
    opening, closing = balances.get("OPBD", balances.get("PRCD")), balances.get("CLBD")
    currency = statement.findtext("Acct/Ccy")
    for source in (opening, closing, entry):
        if not currency and source is not None and (amount := source.find("Amt")) is not None:
            currency = amount.get("Ccy")
    if not currency:
        raise FileRefused(f"statement {reference} names no currency")
    currency = currency.lower()
    sequence = statement.findtext("LglSeqNb") or statement.findtext("ElctrncSeqNb") or ""
    bank = statement.findtext("Acct/Svcr/FinInstnId/BICFI") or statement.findtext("Acct/Svcr/FinInstnId/BIC") or ""
    from_on = day_of(statement.findtext("FrToDt/FrDtTm"))
    to_on = day_of(statement.findtext("FrToDt/ToDtTm"))
    return StatementHead(
        account=account.replace(" ", "").upper(),
        bank="" if iban else bank.upper(),
        currency=currency,
        reference=one_line([reference])[:100],
        page=page_of(statement),
        sequence=int(sequence) if sequence.isdecimal() and len(sequence) <= 18 else None,
        from_on=from_on,
        to_on=to_on or from_on,
        opening_minor=read_balance(opening, currency),
        closing_minor=read_balance(closing, currency),
    )


def page_of(statement: Element) -> int | None:
    """The page's number of a statement that has several pages."""
    page, is_last = statement.findtext("StmtPgntn/PgNb") or "", statement.findtext("StmtPgntn/LastPgInd")
    if not page.isdecimal() or len(page) > 5 or (int(page) == 1 and is_last == "true"):
        return None
    return int(page)


def read_balance(balance: Element | None, currency: str) -> int | None:
    """A balance in minor units; None if there is none in the account's currency. Raises FileRefused."""
    amount = None if balance is None else balance.find("Amt")
    if balance is None or amount is None or amount.get("Ccy", currency).lower() != currency:
        return None
    try:
        minor = minor_units(amount.text or "", currency, ".")
    except Unreadable as error:
        raise FileRefused(f"a balance of {amount.text!r}: {error}") from None
    return -minor if balance.findtext("CdtDbtInd") == "DBIT" else minor


def read_entry(entry: Element, details: Details, head: StatementHead, place: int) -> Iterator[StatementPart]:
    """The lines of an entry, or why there is none."""
    status = entry.findtext("Sts/Cd") or (entry.findtext("Sts") or "").strip() or entry.findtext("Sts/Prtry")
    if status != "BOOK":
        yield SkippedEntry(place)
        return
    amount, direction = entry.find("Amt"), entry.findtext("CdtDbtInd")
    currency = "" if amount is None else amount.get("Ccy", "").lower()
    booked = entry.findtext("BookgDt/Dt") or entry.findtext("BookgDt/DtTm") or ""
    value = entry.findtext("ValDt/Dt") or entry.findtext("ValDt/DtTm") or ""
    booked_on, value_on = day_of(booked), day_of(value)
    if currency != head.currency:
        yield RefusedEntry(place, "Amt/@Ccy", currency, f"an entry is in the account's currency, {head.currency}")
        return
    if direction not in {"CRDT", "DBIT"}:
        yield RefusedEntry(place, "CdtDbtInd", direction or "", "an entry is CRDT or DBIT")
        return
    if booked_on is None and value_on is None:
        yield RefusedEntry(place, "BookgDt", booked or value, "an entry has a date, YYYY-MM-DD")
        return
    assert amount is not None
    try:
        minor = minor_units(amount.text or "", currency, ".")
    except Unreadable as error:
        yield RefusedEntry(place, "Amt", amount.text or "", str(error))
        return
    if minor < 0:
        yield RefusedEntry(place, "Amt", amount.text or "", "an amount has no sign; CdtDbtInd is its direction")
        return
    line = StatementLine(
        place=place,
        booked_on=booked_on or value_on or date.min,
        value_on=value_on,
        amount_minor=minor if direction == "CRDT" else -minor,
        currency=currency,
        bank_reference=one_line([entry.findtext("AcctSvcrRef")])[:64],
        code="/".join(code for code in codes_of(entry) if code)[:64],
        is_reversal=(entry.findtext("RvslInd") or "").strip() in {"true", "1"},
    )
    texts = [entry.findtext("AddtlNtryInf"), *(part[3] for part in details.parts)]
    named = [line.bank_reference, entry.findtext("NtryRef"), *(one for part in details.parts for one in part[2])]
    line.text = one_line(texts)
    line.references = references_among(named, line.text)
    yield from split_batch(line, details) or [line]


def split_batch(line: StatementLine, details: Details) -> list[StatementLine]:
    """A line for each detail of a batch entry; none if their amounts are absent or do not add up to the entry."""
    try:
        amounts = [minor_units(amount, currency.lower(), ".") for amount, currency, *_ in details.parts]
    except Unreadable:
        return []
    is_same_currency = all(currency.lower() == line.currency for _, currency, *_ in details.parts)
    if len(amounts) < 2 or not is_same_currency or sum(amounts) != line.amount_minor:
        return []
    return [
        StatementLine(
            place=line.place,
            part=number,
            booked_on=line.booked_on,
            value_on=line.value_on,
            amount_minor=amount,
            currency=line.currency,
            bank_reference=line.bank_reference,
            references=references_among([*part[2], line.bank_reference], ""),
            text=part[3] or line.text,
            code=line.code,
            is_reversal=line.is_reversal,
        )
        for number, (amount, part) in enumerate(zip(amounts, details.parts, strict=True), start=1)
    ]


def codes_of(entry: Element) -> list[str | None]:
    """The bank's code of an entry: domain, family, subfamily, or its own."""
    domain = ("BkTxCd/Domn/Cd", "BkTxCd/Domn/Fmly/Cd", "BkTxCd/Domn/Fmly/SubFmlyCd")
    return [entry.findtext(path) for path in (*domain, "BkTxCd/Prtry/Cd")]


def day_of(text: str | None) -> date | None:
    """The day of a date or a time, as it is written: the bank's own day."""
    try:
        return date.fromisoformat((text or "").strip()[:10])
    except ValueError:
        return None
