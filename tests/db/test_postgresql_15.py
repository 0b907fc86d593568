"""PostgreSQL 15, the oldest version supported, passes the core's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

POSTGRESQL_15 = Path("/usr/lib/postgresql/15/bin")
# Orders of facts depend on the core's own code, not on the version.
SELECTED = "not every_order and not fact_order"
CORE = (
    "test_states.py",
    "test_facts.py",
    "test_ledger.py",
    "test_races.py",
    "test_outbox.py",
    "test_restore.py",
    "test_publication.py",
)


@pytest.mark.skipif(not POSTGRESQL_15.is_dir(), reason="PostgreSQL 15 is not installed here")
def test_core_behaves_the_same_on_postgresql_15() -> None:
    folder = Path(__file__).parent
    inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", SELECTED, *(str(folder / name) for name in CORE)],
        cwd=folder.parent.parent,
        env=inherited | {"SURETY_PG_BIN": str(POSTGRESQL_15)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
