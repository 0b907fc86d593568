"""The command line's frame."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from app.cli import COMMANDS, LazyCommandGroup, cli
from tests.support.operators import admin_key


def surety(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", *arguments],
        env={"PATH": os.defpath, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_option_prints_the_version() -> None:
    assert surety("--version").stdout == f"surety, version {version('surety')}\n"


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys; from app.cli import cli; cli(['--help'], standalone_mode=False); print('psycopg' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *page, imported = done.stdout.splitlines()
    assert imported == "False"
    assert set(COMMANDS) <= {line.split()[0] for line in page if line.startswith("  ")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_documented(name: str) -> None:
    assert isinstance(cli, LazyCommandGroup)
    command = cli.get_command(cli.make_context("surety", [], resilient_parsing=True), name)
    assert command
    assert command.help


def test_user_error_is_one_line_without_a_traceback() -> None:
    done = surety("deploy")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "surety: DATABASE_URL is not set\n")


def test_deploy_reports_its_changes(blank: str) -> None:
    assert surety("deploy", DATABASE_URL=blank).stdout.startswith("created in ")
    assert surety("deploy", DATABASE_URL=blank).stdout.startswith("unchanged in ")


def test_argument_that_is_no_utf_8_is_named() -> None:
    done = surety("trace", "pay_\udcff")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "surety: argument 2 is not UTF-8\n")


def test_output_that_is_closed_or_full_is_one_line(database: str) -> None:
    environment = {"PATH": os.defpath, "DATABASE_URL": database}
    command = f"{sys.executable} -c 'from app.cli import main; main()' merchants list"
    for output, message in (
        (">&-", "surety: standard output is closed, so that nothing could be shown\n"),
        (">/dev/full", "surety: the output can't be written (No space left on device); what the command did is done\n"),
    ):
        done = subprocess.run(
            ["sh", "-c", f"{command} {output}"], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (1, message)


def test_read_only_database_is_not_called_unreachable(database: str) -> None:
    for address in (
        "default_transaction_read_only%3Don",
        "default_transaction_read_only%3Don&target_session_attrs=any",
    ):
        url = f"{database}{'&' if '?' in database else '?'}options=-c%20{address}"
        done = surety("merchants", "add", "Acme", DATABASE_URL=url, SURETY_OPERATOR_KEY=admin_key(database))
        refusal = "surety: this command needs the primary, and PostgreSQL is read-only here: "
        assert done.returncode == 1 and done.stderr.startswith(refusal), done.stderr
