"""The wheel contains everything that a machine without the checkout needs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from db import BEHAVIOUR_FILES

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_carries_state_behaviour_and_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "db/_state/schema.sql",
        "db/deploy/bookkeeping.sql",
        *(f"db/sql/{name}.sql" for name in BEHAVIOUR_FILES),
    } <= names
    assert {f"db/_state/migrations/{path.name}" for path in ROOT.glob("migrations/*.sql")} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_surety_deploys_from_the_wheel(wheel: Path, blank: str, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = "import app.cli, db; print(db.__file__); app.cli.main()"
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", script, "deploy"],
        cwd=tmp_path,
        env={"DATABASE_URL": blank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, outcome, mode = done.stdout.splitlines()
    assert Path(where) == packages / "db" / "__init__.py"
    assert outcome.startswith("created in ") and mode == "mode test: no real money moves"
