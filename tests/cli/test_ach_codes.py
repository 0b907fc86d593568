"""Codes of ACH returns: rows in the database, and their command."""

from __future__ import annotations

import json

from db.formats.nacha import codes
from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection


def column(conn: Connection, condition: str) -> set[str]:
    return {code for (code,) in conn.execute(f"select code from surety.ach_return_codes where {condition}".encode())}


def words(text: str) -> set[str]:
    return set(text.split())


def test_the_rows_are_the_codes_by_which_files_are_checked(conn: Connection) -> None:
    assert column(conn, "true") == codes.RETURN_CODES
    assert column(conn, "kind = 'dishonored'") == codes.DISHONORED_CODES
    assert column(conn, "kind = 'contested'") == codes.CONTESTED_CODES


def test_codes_freeze_count_and_are_presented_again_as_the_rules_say(conn: Connection) -> None:
    assert column(conn, "freezes") == words("R02 R03 R04 R05 R07 R08 R10 R11 R16 R20 R29")
    assert column(conn, "rate_group = 'unauthorized'") == words("R05 R07 R10 R11 R29 R51")
    assert column(conn, "rate_group = 'administrative'") == words("R02 R03 R04")
    assert column(conn, "presentation = 'twice_within_180_days'") == words("R01 R09")
    assert column(conn, "presentation = 'with_a_new_authorization'") == words("R08")
    assert column(conn, "presentation = 'corrected_within_60_days'") == words("R11")
    assert column(conn, "presentation = 'after_correction'") == {
        "R03",
        "R04",
        "R12",
        "R13",
        "R17",
        "R18",
        "R19",
        "R21",
        "R22",
        "R25",
        "R26",
        "R27",
        "R28",
    }
    assert column(conn, "window_days = 60") == words("R05 R07 R10 R11 R33 R37 R38 R51 R52 R53")
    assert column(conn, "window_unit = 'next_file_of_the_operator'") == {
        "R13",
        "R18",
        "R19",
        "R25",
        "R26",
        "R27",
        "R28",
        "R30",
        "R32",
        "R34",
        "R35",
        "R36",
    }


def test_codes_are_listed(run: Run) -> None:
    [shown] = json.loads(said(run("ach", "codes", "r10", "--json")))
    assert (shown["code"], shown["window_days"], shown["freezes"]) == ("R10", "60", True)
    assert len(said(run("ach", "codes")).splitlines()) == len(codes.RETURN_CODES) + 1
    assert "R99 has no meaning in the rules" in refused(run("ach", "codes", "R99"))
