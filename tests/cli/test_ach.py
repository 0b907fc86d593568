"""NACHA files on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from app.cli import cli
from tests.ach.files import replace, write
from tests.cli.conftest import refused, said

VALID = write(({}, [{}, {"amount_minor": 7500_00}]), ({"company_name": "GRACES TEA"}, [{}]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A valid file."""
    path = tmp_path / "file.ach"
    path.write_bytes(VALID)
    return path


def test_a_valid_file_is_shown_without_account_numbers_and_names(path: Path) -> None:
    shown = said(CliRunner().invoke(cli, ["ach", "read", str(path), "--strict"]))
    assert "from      1234567890 SURETY" in shown
    assert "ADAS BOOKS  WEB    PURCHASE" in shown
    assert "entries   3: debits 7,525.00, credits 0.00" in shown
    assert shown.endswith("0 errors, 0 warnings")
    assert "987654321012" not in shown and "LOVELACE" not in shown


def test_warnings_leave_status_0_and_errors_give_1(path: Path) -> None:
    path.write_bytes(replace(VALID, 3, 12, "4"))
    patient = CliRunner().invoke(cli, ["ach", "read", str(path), "--json"])
    assert patient.exit_code == 0
    found = json.loads(patient.stdout)
    assert (found["errors"], found["warnings"], found["batch_count"], found["entries"]) == (0, 1, 2, 3)
    assert found["problems"] == [
        {
            "line": 3, "field": "check_digit", "rule": "follows_from_the_routing_number", "value": "011401534",
            "severity": "warning", "expected": "3",
        }
    ]  # fmt: skip
    strict = CliRunner().invoke(cli, ["ach", "read", str(path), "--strict"])
    assert strict.exit_code == 1
    assert "error: line 3: check_digit: broken rule: follows from the routing number" in strict.stdout


def test_codes_of_returns_are_counted(path: Path) -> None:
    terms = {"is_return": True, "effective_date": None}
    addenda = {"type_code": "99", "code": "R01", "original_trace_number": "1", "original_rdfi": "01140153"}
    path.write_bytes(write((terms, [{"transaction_code": "26", "addenda": [addenda]}] * 2)))
    assert "codes     R01 2" in said(CliRunner().invoke(cli, ["ach", "read", str(path)]))


def test_a_file_that_is_none_is_an_error(path: Path, tmp_path: Path) -> None:
    assert "no.ach can't be read: No such file" in refused(CliRunner().invoke(cli, ["ach", "read", "no.ach"]))
    assert "can't be read: Is a directory" in refused(CliRunner().invoke(cli, ["ach", "read", str(tmp_path)]))
    path.write_bytes(b"A" * 100_000)
    result = CliRunner().invoke(cli, ["ach", "read", str(path)])
    assert result.exit_code == 1
    assert "ends within 94 characters" in result.stdout


def test_standard_input_is_read() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "ach", "read", "-", "--json"], input=VALID, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["entries"] == 3
