"""Bytes to records of 94 characters, in bounded memory.

A file may have a line end after each record (LF, CRLF or CR), after each block of ten, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from db.formats.nacha.fields import RECORD_CHARACTERS, RECORDS_PER_BLOCK
from db.formats.nacha.problems import NachaError, NachaProblem, show_value

BLOCK_BYTES = RECORD_CHARACTERS * RECORDS_PER_BLOCK
PIECE_BYTES = BLOCK_BYTES * 70
"""Read at once; a longer line is refused unless it consists of records."""
LINES_MAX = 50_000_000
"""Of one stream; about a hundred times the largest file that is expected."""
RECORD_BEGINS = frozenset(b"156789")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class NachaLine:
    """A record's bytes without its line end, the line end, and its number from 1."""

    number: int
    content: bytes
    end: bytes


def nacha_lines(stream: BinaryIO) -> Iterator[NachaLine]:
    """The lines of a stream. Raises NachaError for a line that is too long, or a stream that does not end."""
    number = 0
    in_long_line = False
    while piece := stream.readline(PIECE_BYTES):
        content, end = cut_line_end(piece)
        whole = end.endswith(b"\n") or len(piece) < PIECE_BYTES
        for record, record_end in split_records(content, end, number, in_long_line=in_long_line or not whole):
            number += 1
            if number > LINES_MAX:
                raise NachaError([NachaProblem(number, "line", f"is_among_the_first_{LINES_MAX}", "")])
            yield NachaLine(number, record, record_end)
        in_long_line = not whole


def cut_line_end(piece: bytes) -> tuple[bytes, bytes]:
    """A piece without its line end, and the line end."""
    for end in (b"\r\n", b"\n", b"\r"):
        if piece.endswith(end):
            return piece[: -len(end)], end
    return piece, b""


def split_records(content: bytes, end: bytes, number: int, *, in_long_line: bool) -> Iterator[tuple[bytes, bytes]]:
    """The records of a piece: one, or many if line ends are CR alone or absent."""
    if len(content) > RECORD_CHARACTERS and b"\r" in content and not in_long_line:
        *parts, last = content.split(b"\r")
        for part in parts:
            yield part, b"\r"
        yield last, end
        return
    records = [content[at : at + RECORD_CHARACTERS] for at in range(0, len(content), RECORD_CHARACTERS)]
    unbroken = len(records) > 1 and len(content) % RECORD_CHARACTERS == 0
    if records and (unbroken or in_long_line) and all(record[0] in RECORD_BEGINS for record in records):
        for record in records[:-1]:
            yield record, b""
        yield records[-1], end
    elif records and in_long_line:
        raise NachaError([NachaProblem(number + 1, "line", "ends_within_94_characters", f"{len(content)} characters")])
    else:
        yield content, end


def decode_line(content: bytes) -> tuple[str, list[tuple[str, str]]]:
    """The 94 characters of a line, and each broken rule with its value. Nothing of an account number is shown."""
    broken = []
    if content.startswith(BYTE_ORDER_MARK):
        content = content[len(BYTE_ORDER_MARK) :]
        broken.append(("has_no_byte_order_mark", "EF BB BF"))
    text = content.decode("latin-1")
    if not text.isascii():
        broken.append(("is_printable_ascii", show_foreign(text)))
        if len(text) > RECORD_CHARACTERS:
            text = decode_utf8(content, text)
    if len(text) != RECORD_CHARACTERS:
        kept = text.rstrip(" \t\0\x1a")
        length = f"{len(text)} characters"
        if len(kept) > RECORD_CHARACTERS:
            broken.append(("has_at_most_94_characters", length))
        elif len(text) > RECORD_CHARACTERS:
            broken.append(("is_not_padded_beyond_94_characters", length))
        else:
            broken.append(("has_94_characters", length))
        text = kept[:RECORD_CHARACTERS].ljust(RECORD_CHARACTERS)
    return text, broken


def decode_utf8(content: bytes, text: str) -> str:
    """The text as UTF-8 if that is valid and fits into a record; else as it was."""
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError:
        return text
    return decoded if len(decoded.rstrip()) <= RECORD_CHARACTERS else text


def show_foreign(text: str) -> str:
    """The characters of a text that are not ASCII."""
    return show_value(" ".join(f"{ord(each):02X}" for each in text if not each.isascii())[:60])
