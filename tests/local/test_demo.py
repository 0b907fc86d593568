"""`surety demo` with few payments, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from app.local.demo.report import Report
from db.embedded.folders import MEMORY_FOLDER
from db.embedded.processes import wait_until
from tests.support.sandbox_process import eventually


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("options", [(), ("--live",)], ids=["test", "live"])
def test_demo_of_forty_payments_with_faults_keeps_every_invariant(options: tuple[str, ...]) -> None:
    process = start("--payments", "40", "--merchants", "5", "--seed", "8311", "--json", *options)
    stdout, stderr = process.communicate(timeout=90)
    result = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    assert result["payments"] == sum(result["states"].values()) == 40
    assert result["live_payments"] == (40 if options else 0)
    assert ("live mode, against the sandbox: no real money moves" in stderr) is bool(options)
    assert set(result["states"]) <= {"settled", "failed", "canceled", "partially_refunded", "refunded", "reversed"}
    assert len(result["invariants"]) >= 10 and not any(result["invariants"].values())
    assert (result["double_charges"], result["double_refunds"], result["lost"]) == (0, 0, 0)
    later = result["afterwards"]
    assert later["captured later"] > later["of these, in part"] > 0 and later["released"] > 0
    assert later["refunded"] > 0 and later["refunded in part"] > 0 and later["refunds that came back"] > 0
    assert result["disputes"] == {"won": later["disputes won"], "lost": later["disputes lost"]} == {"won": 1, "lost": 1}
    assert result["refunds"] == later["refunded"] + later["refunded in part"]
    assert result["charges_at_provider"] == result["confirmed_here"] > 0


def test_second_charge_of_a_payment_makes_the_demo_fail() -> None:
    process = start("--payments", "20", "--seed", "1", "--no-faults", "--json")
    assert process.stderr is not None
    ports = next(filter(None, (re.search(r"sandbox :(\d+)", line) for line in process.stderr)))
    sandbox = f"http://127.0.0.1:{ports[1]}"
    charge = eventually(lambda: httpx.get(f"{sandbox}/sandbox/charges").json(), 30)[0]
    second = {"metadata": charge["metadata"], "amount": charge["amount"], "currency": charge["currency"]}
    httpx.post(f"{sandbox}/sandbox/foreign-charge", json=second).raise_for_status()
    stdout, stderr = process.communicate(timeout=120)
    result = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 1, stderr
    assert result["double_charges"] == result["invariants"]["no payment is charged twice"] == 1


SOUND = Report(
    payments=1, live_payments=0, states={"settled": 1}, invariants={"debits equal credits": 0}, charges_at_provider=1,
    confirmed_here=1, double_charges=0, refunds=0, double_refunds=0, disputes={}, lost=0, not_ended=0, seconds=1.0,
    seed=1, stages=[], afterwards={}, faults={}, dead_letters=0, replayed=0, example=None,
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"double_charges": 1},
        {"double_refunds": 1},
        {"lost": 1},
        {"not_ended": 1},
        {"invariants": {"charged at the provider = confirmed here": 1}},
    ],
)
def test_report_with_any_violation_is_unsound(wrong: dict[str, Any]) -> None:
    assert SOUND.is_sound
    assert not msgspec.structs.replace(SOUND, **wrong).is_sound


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
        # The first child is PostgreSQL or its initdb. The folders of other demos come and go meanwhile.
        assert wait_until(lambda: bool(children_of(process.pid)), 20)
    family = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 10)
    # Folders of other demos go with them; a folder left behind by this one would stay.
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
