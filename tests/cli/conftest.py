"""The command line in the tests' own process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from app.cli import cli
from db.errors import SuretyError
from tests.support.operators import admin_key

Run = Callable[..., Result]


@pytest.fixture
def run(database: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`surety …` in the test's database."""
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("SURETY_OPERATOR_KEY", admin_key(database))
    return lambda *words: CliRunner().invoke(cli, list(words))


def said(result: Result) -> str:
    """The output of a command that succeeded."""
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def refused(result: Result) -> str:
    """The line that a user sees of a command that failed."""
    assert isinstance(result.exception, SuretyError), result.output
    return str(result.exception)
