"""The linters of style and types find nothing. They run in parallel to other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlfluff.core import FluffConfig, Linter

from tests.support.linters import LINTERS, Linters

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", LINTERS)
def test_linter_finds_nothing(name: str, linters: Linters) -> None:
    status, output = linters.result(name)
    assert status == 0, output


def test_sqlfluff_skips_no_file_and_parses_everything() -> None:
    config = FluffConfig.from_path(str(ROOT))
    assert config.get("large_file_skip_byte_limit") == 0
    found = Linter(config=config).lint_string("select foo bar baz from from;\n").get_violations()
    assert "PRS" in {violation.rule_code() for violation in found}


def test_all_sql_is_indented_by_four_spaces() -> None:
    files = [ROOT / "schema.sql", *ROOT.glob("db/**/*.sql"), *ROOT.glob("migrations/*.sql")]
    lines = [
        (path.name, number, line)
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    indents = {(name, number): len(line) - len(line.lstrip(" ")) for name, number, line in lines if line.strip()}
    assert [place for place, indent in indents.items() if indent % 4] == []
    assert [(name, number) for name, number, line in lines if line != line.rstrip() or "\t" in line] == []
    assert [(name, number) for name, number, line in lines if len(line) > 120] == []
