"""README.md and docs/ are true: generated parts are current, names exist, the quickstart runs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import msgspec
from psycopg.conninfo import conninfo_to_dict

from app.cli import cli
from app.finding import FindingId
from app.local.processes import free_port
from app.status_findings import RUNBOOK
from db.settings import SECRET_FILES, Settings
from tests.db.test_ledger import HISTORIES
from tests.mutations.mutants import MUTANTS
from tests.project.test_prose import DOCUMENTS, ROOT, name_of
from tests.simulation.test_simulation import SCHEDULES
from tests.support.generated_docs import regenerated
from tests.support.payments import Connection, state_of

README = ROOT / "README.md"
DOCS = ROOT / "docs"
STORY_SECONDS_MAX = 60
TRACE_LINE = re.compile(r"(?:\d\d:\d\d:\d\d\.\d{3})?\s+(?:\+[\d.,]+ \w+)?\s+(\S+(?: Stripe| webhook| poll)?)  ")
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as they are made for Markdown."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_parts_are_current(conn: Connection) -> None:
    stale = [path for path, text in TEXTS.items() if regenerated(text, conn) != text]
    assert stale == [], "python -m tests.support.generated_docs writes them"


def test_every_linked_file_and_anchor_exists() -> None:
    broken = []
    for path, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
                broken.append((name_of(path), link))
    assert broken == []


def test_every_file_that_is_named_exists() -> None:
    named = {
        (name_of(path), name)
        for path, text in TEXTS.items()
        for name in re.findall(r"\b((?:app|db|jobs|tests|docs|deploy)/[\w/.]+\.(?:py|sql|md|txt))\b", text)
        if not (path.parent / name).exists()
    }
    assert [(document, name) for document, name in named if not (ROOT / name).exists()] == []


def test_every_surety_command_and_option_exists() -> None:
    lines = [
        (name_of(path), line)
        for path, text in TEXTS.items()
        for line in re.findall(r"(?:^ *|\(|`|uv run )(surety [a-z][^`\n#|]*)", text, re.MULTILINE)
    ]
    assert len(lines) > 20
    assert [(document, line) for document, line in lines if not command_exists(line)] == []


def command_exists(line: str) -> bool:
    """Whether `surety …` names a command, and options that it has."""
    command: click.Command = cli
    options: set[str] = set()
    for word in shlex.split(re.sub(r"[)&]+", " ", line).strip("\\ "))[1:]:
        if isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is None:
                return False
            command = found
            options = {option for param in command.params for option in [*param.opts, *param.secondary_opts]}
        elif word.startswith("--") and word not in options | {"--help"}:
            return False
    return True


def test_every_python_command_exists() -> None:
    modules = {module for text in TEXTS.values() for module in re.findall(r"python -m ([\w.]+)", text)}
    paths = [ROOT / module.replace(".", "/") for module in modules]
    assert [
        path for path in paths if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()
    ] == []


def test_every_environment_variable_exists() -> None:
    known = {field.encode_name for field in msgspec.structs.fields(Settings)} | SECRET_FILES | {"SURETY_SECRETS"}
    named = {name for text in TEXTS.values() for name in re.findall(r"\b((?:SURETY|STRIPE)_[A-Z_]+)\b", text)}
    assert named - known == set()


def test_every_database_object_that_is_named_exists(conn: Connection) -> None:
    pattern = r"(?<!//)\b((?:surety|outbox|ledger|audit|api|report|invariant)\.(?!md\b|env\b)[a-z_]+)\b"
    names = sorted({name for text in TEXTS.values() for name in re.findall(pattern, text)})
    rows = conn.execute(
        """
        select n.name from unnest(%s::text[]) as n (name)
        where coalesce(to_regclass(n.name)::oid, to_regproc(n.name)::oid, to_regtype(n.name)::oid) is null
        """,
        (names,),
    ).fetchall()
    assert len(names) > 20
    assert rows == []


def test_first_screen_shows_a_trace_and_the_two_commands() -> None:
    first_screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:40])
    assert "uv run surety demo" in first_screen
    assert "uv run pytest" in first_screen
    assert "accepted" in first_screen
    assert "settled" in first_screen


def test_readme_has_at_most_170_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


def test_runbook_has_a_heading_for_every_finding() -> None:
    runbook = TEXTS[DOCS / "operations.md"].partition("## Runbook")[2].partition("\n## ")[0]
    assert re.findall(r"^### (\S+)$", runbook, re.MULTILINE) == list(get_args(FindingId))
    assert RUNBOOK == "docs/operations.md"


def test_every_finding_is_reported_by_the_code() -> None:
    files = ("status_findings.py", "replication_findings.py", "cli/status.py")
    code = "".join((ROOT / "app" / name).read_text() for name in files)
    assert [finding for finding in get_args(FindingId) if f'"{finding}"' not in code] == []


def test_table_of_settings_is_complete() -> None:
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (\S+) \|", (DOCS / "operations.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    defaults = {
        field.encode_name: "–" if field.default is None else f"{field.default}".removesuffix(".0")
        for field in msgspec.structs.fields(Settings)
    }
    assert dict(rows) == defaults


def test_counts_in_documents_are_current(conn: Connection) -> None:
    row = conn.execute("select count(*) from surety.currencies").fetchone()
    assert row
    assert f"in {row[0]} currencies" in " ".join(TEXTS[README].split())
    assert f"{len(MUTANTS)} guards" in TEXTS[DOCS / "testing.md"]
    assert f"`pytest` runs {SCHEDULES} smaller schedules" in " ".join(TEXTS[DOCS / "testing.md"].split())


def test_worked_balances_are_those_of_tested_histories() -> None:
    section = (DOCS / "money.md").read_text(encoding="utf-8").partition("## Worked balances")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([a-z_]+ -?\d+[^|]*) \|$", section, re.MULTILINE)
    tested = [balances for _, balances in HISTORIES.values()]
    written = {
        history: {account: int(amount) for account, amount in map(str.split, balances.split(","))}
        for history, balances in rows
    }
    assert len(written) >= 10
    assert [history for history, balances in written.items() if balances not in tested] == []


def test_every_kind_of_discrepancy_is_explained(conn: Connection) -> None:
    row = conn.execute(
        "select pg_get_constraintdef(oid) from pg_constraint where conname = 'discrepancy_kind_is_known'"
    ).fetchone()
    assert row
    section = (DOCS / "money.md").read_text(encoding="utf-8").partition("### Discrepancies")[2].partition("\n## ")[0]
    explained = {kind for cell in re.findall(r"^\| ([a-z_, ]+) \|", section, re.MULTILINE) for kind in cell.split(", ")}
    assert explained - {"kind"} == set(re.findall(r"'(\w+)'", row[0]))


def test_quickstart_runs_as_written(database: str, conn: Connection, tmp_path: Path) -> None:
    story, environment = re.findall(r"```sh\n(.*?)```", (DOCS / "quickstart.md").read_text(encoding="utf-8"), re.DOTALL)
    assert {"DATABASE_URL", "SURETY_SANDBOX_URL"} <= set(re.findall(r"export (\w+)=", environment))
    variables = dict(re.findall(r"export (\w+)=(\S+)", environment)) | {"DATABASE_URL": database}
    for port in ("8000", "8001", "8002"):
        free = str(free_port(0))
        story = story.replace(port, free)
        variables = {name: value.replace(f":{port}", f":{free}") for name, value in variables.items()}
    assert conninfo_to_dict(variables["DATABASE_URL"]) == conninfo_to_dict(database)
    log = tmp_path / "story.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euc", story],
            cwd=tmp_path,
            env=inherited | variables | {"PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(STORY_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert status == 0, log.read_text()
    [payment_id] = [row[0] for row in conn.execute("select id from surety.payments")]
    assert state_of(conn, payment_id) == "settled"
    _, begin, trace = log.read_text().partition(f"{payment_id}   ")
    assert begin, log.read_text()
    check_trace_in_readme(trace)


def check_trace_in_readme(trace: str) -> None:
    """README's example has the headings, labels and last line that a real trace has."""
    shown = README.read_text(encoding="utf-8").partition("<!-- trace -->")[2].partition("<!-- trace end -->")[0]
    lines = shown.strip("`\n").splitlines()
    real = trace.splitlines()
    last = next(line for line in real if line.startswith("1 charge"))
    assert lines[-1] == last.rstrip()
    labels = [match[1] for line in lines if (match := TRACE_LINE.match(line))]
    known = {match[1] for line in real if (match := TRACE_LINE.match(line))}
    assert {"accepted", "submitting", "provider_submitted", "confirmed", "settled", "ledger"} <= set(labels)
    assert set(labels) <= known | {"← webhook", "← poll"}
