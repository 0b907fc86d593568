"""The README is true: its diagram is drawn from the rows, its files exist, its story runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from app.local.processes import free_port
from tests.support.payments import Connection, state_of
from tests.support.state_diagram import README, draw, with_diagram

TEXT = README.read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
STORY_SECONDS_MAX = 60


def test_state_diagram_matches_the_transitions(conn: Connection) -> None:
    assert with_diagram(TEXT, draw(conn)) == TEXT, "python -m tests.support.state_diagram draws it anew"


def test_every_file_that_is_linked_exists() -> None:
    links = [link.replace("\\", "") for link in re.findall(r"\]\(([^)#][^)]*)\)", TEXT)]
    assert links
    assert [link for link in links if "://" not in link and not (README.parent / link).exists()] == []


def test_the_two_commands_are_on_the_first_screen() -> None:
    first_screen = "\n".join(TEXT.splitlines()[:12])
    assert "uv run surety demo" in first_screen and "uv run pytest" in first_screen


def test_quickstart_runs_as_written(database: str, conn: Connection, tmp_path: Path) -> None:
    story, environment = BLOCKS
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
    assert payment_id in log.read_text() and "settled" in log.read_text()
