"""The SQL files build on one another: each uses only functions and views that it or a file before it defines."""

from __future__ import annotations

import re
from pathlib import Path

from db import BEHAVIOUR_FILES
from db.deploy.statements import Statement, read_statements

SQL_FOLDER = Path(__file__).parent.parent.parent / "db" / "sql"
NAME = re.compile(r"\b(?:surety|api|outbox|audit|ledger|report)\.\w+")
PROSE = re.compile(r"--[^\n]*|(?<= is\s)'.*'(?=;$)", re.DOTALL)


def statements_by_file() -> dict[str, list[Statement]]:
    """The statements of each file, in the order in which the files are deployed."""
    return {name: read_statements(SQL_FOLDER / f"{name}.sql") for name in BEHAVIOUR_FILES}


def test_every_sql_file_is_deployed_once() -> None:
    found = {str(path.relative_to(SQL_FOLDER).with_suffix("")) for path in SQL_FOLDER.rglob("*.sql")}
    assert sorted(BEHAVIOUR_FILES) == sorted(found)


def test_every_sql_file_uses_only_what_it_or_an_earlier_file_defines() -> None:
    files = statements_by_file()
    defined_in = {
        statement.name: name
        for name, statements in files.items()
        for statement in statements
        if statement.kind in {"function", "view"}
    }
    assert len(defined_in) > 150
    order = {name: place for place, name in enumerate(BEHAVIOUR_FILES)}
    upward = [
        f"{name}:{statement.line} uses {used}, which {defined_in[used]} defines"
        for name, statements in files.items()
        for statement in statements
        for used in sorted(set(NAME.findall(PROSE.sub("", statement.text))) & defined_in.keys())
        if order[defined_in[used]] > order[name]
    ]
    assert upward == []
