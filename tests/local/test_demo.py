"""`surety demo`, small, as the user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from db.embedded import MEMORY_FOLDER, wait_until


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_demo_of_forty_payments_with_faults_keeps_every_invariant() -> None:
    process = start("--payments", "40", "--merchants", "5", "--seed", "8311", "--json")
    stdout, stderr = process.communicate(timeout=90)
    result = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    assert result["payments"] == sum(result["states"].values()) == 40
    assert set(result["states"]) <= {"settled", "failed", "canceled", "partially_refunded", "refunded", "reversed"}
    assert len(result["invariants"]) >= 10 and not any(result["invariants"].values())
    assert (result["double_charges"], result["double_refunds"], result["lost"]) == (0, 0, 0)
    later = result["afterwards"]
    assert later["captured later"] > later["of these, in part"] > 0 and later["released"] > 0
    assert later["refunded"] > 0 and later["refunded in part"] > 0 and later["refunds that came back"] > 0
    assert result["disputes"] == {"won": later["disputes won"], "lost": later["disputes lost"]} == {"won": 1, "lost": 1}
    assert result["refunds"] == later["refunded"] + later["refunded in part"]
    assert result["charges_at_provider"] == result["confirmed_here"] > 0


@pytest.mark.parametrize("moment", ["PostgreSQL", "ended"])
def test_ctrl_c_leaves_no_process_and_no_folder(moment: str, tmp_path: Path) -> None:
    before = set(MEMORY_FOLDER.glob("surety-*"))
    process = start("--payments", "200", "--seed", "1", "--no-faults")
    assert process.stderr is not None
    if moment == "ended":
        for line in process.stderr:
            if "workers" in line:
                break
    else:
        # Its first child is PostgreSQL, or who prepares it; others' folders come and go meanwhile.
        assert wait_until(lambda: bool(children_of(process.pid)), 20)
    family = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 10)
    # Others' demos have folders, too; theirs go with them, ours would stay.
    left = {path for path in set(MEMORY_FOLDER.glob("surety-*")) - before if (path / "sandbox.sqlite").exists()}
    assert wait_until(lambda: not any(path.exists() for path in left), 90)


def test_killed_demo_leaves_no_process() -> None:
    process = start("--payments", "200", "--seed", "1", "--no-faults")
    assert process.stderr is not None
    for line in process.stderr:
        if "workers" in line:
            break
    family = children_of(process.pid)
    assert len(family) > 5
    process.kill()
    process.communicate(timeout=30)
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 15)


def children_of(pid: int) -> set[int]:
    """A process's descendants."""
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children | {grandchild for child in children for grandchild in children_of(child)}
