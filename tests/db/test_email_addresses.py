"""E-mail addresses are compared in upper and lower case alike, whatever the locale."""

from __future__ import annotations

import unicodedata

import pytest

from tests.support.payments import Connection

COMPLETE_RANGES = (range(0x41, 0x590), range(0x1E00, 0x2000), range(0xFF21, 0xFF5B), range(0x10400, 0x10450))
"""Latin, Greek, Cyrillic, Armenian, full-width letters, and a script beyond 16 bits."""


def fold(conn: Connection, text: str | None, collation: str = "C") -> str | None:
    query = f'select surety.fold_email(%s::text collate "{collation}")'
    [(folded,)] = conn.execute(query.encode(), (text,)).fetchall()
    return None if folded is None else str(folded)


def simple_folding(letter: str) -> str:
    """Unicode's simple case folding of one letter, as Python knows it."""
    for folded in (letter.casefold(), letter.lower()):
        if len(folded) == 1:
            return folded
    return folded[0]


@pytest.mark.parametrize(
    ("given", "folded"),
    [
        (None, None),
        ("Ada.King+1@Shop.Example", "ada.king+1@shop.example"),
        ("ZOË@Müller.example", "zoë@müller.example"),
        ("ZOE\u0308@mu\u0308ller.example", "zoë@müller.example"),
        ("ΩΜΕΓΑΣ@x.example", "ωμεγασ@x.example"),
        ("ωμεγας@x.example", "ωμεγασ@x.example"),
        ("ПОЧТА@пример.example", "почта@пример.example"),
        ("GROẞ@x.example", "groß@x.example"),
        ("\u212b\u212a@x.example", "åk@x.example"),
        ("İI@x.example", "ii@x.example"),
    ],
)
def test_capitals_and_accents_of_every_script_are_folded(
    conn: Connection, given: str | None, folded: str | None
) -> None:
    assert fold(conn, given) == folded


@pytest.mark.parametrize("collation", ["C", "default", "ucs_basic", "tr-x-icu"])
def test_folding_is_the_same_under_every_locale(conn: Connection, collation: str) -> None:
    if not conn.execute("select from pg_collation where collname = %s", (collation,)).fetchall():
        pytest.skip(f"this server has no collation {collation}")
    assert fold(conn, "INFO@x.example", collation) == "info@x.example"
    assert fold(conn, "İNFO@x.example", collation) == "info@x.example"


def test_every_letter_is_folded_as_unicode_says_and_folding_again_changes_nothing(conn: Connection) -> None:
    letters = [
        letter for letter in map(chr, (code for codes in COMPLETE_RANGES for code in codes))
        if unicodedata.category(letter) != "Cn" and unicodedata.normalize("NFC", letter) == letter
    ]  # fmt: skip
    rows = conn.execute(
        "select l.letter, surety.fold_email(l.letter), surety.fold_email(surety.fold_email(l.letter) || 'É')"
        " from unnest(%s::text[]) as l (letter)",
        (letters,),
    ).fetchall()
    assert len(rows) > 1500
    assert [row for row in rows if row[1] != simple_folding(row[0])] == []
    assert [row for row in rows if row[2] != unicodedata.normalize("NFC", f"{row[1]}é")] == []
