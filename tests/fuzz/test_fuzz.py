"""A few hundred unlikely requests; `python -m tests.fuzz --cases 20000 --json` is the long run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.verdicts import find_faults
from tests.fuzz.world import Caller, World

ROOT = Path(__file__).parent.parent.parent
OURS, THEIRS = f"mer_{'a' * 24}", f"mer_{'b' * 24}"
FOREIGN_ID, OWN_ID, ADDRESS = f"pay_{'b' * 24}", f"pay_{'a' * 24}", "ada@shop.example"
WORLD = World((), {OWN_ID: OURS, FOREIGN_ID: THEIRS}, {ADDRESS: THEIRS})
READER = Caller(name="reader", key="k", merchant=OURS, scopes=frozenset({"read"}))
LIST = "GET /v1/payments"


def test_no_unlikely_request_gets_a_wrong_answer(server: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "300", "--seed", "18", "--json"],
        cwd=ROOT, env=os.environ | {"DATABASE_URL": server}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["cases"] >= 300
    assert set(result["faults"].values()) == {0}
    assert {"200", "400", "401", "403", "404"} <= result["statuses"].keys()
    assert len(result["callers"]) > 15


@pytest.mark.parametrize(
    ("caller", "route", "sent", "status", "answered", "kinds"),
    [
        (READER, LIST, "", 200, OWN_ID, []),
        (READER, LIST, "", 200, f"[{FOREIGN_ID}]", ["leaks"]),
        (READER, LIST, "", 400, f"[{ADDRESS}]", ["leaks"]),
        (READER, LIST, FOREIGN_ID, 404, f"no payment {FOREIGN_ID}", []),
        (READER, LIST, "", 500, "", ["server_errors"]),
        (READER, "POST /v1/payments", "", 201, OWN_ID, ["admitted"]),
        (READER, "GET /v1/operator/status", "", 200, "", ["admitted"]),
        (Caller(name="expired", key="k"), LIST, "", 200, "", ["admitted"]),
        (Caller(name="expired", key="k"), LIST, "", 401, OWN_ID, ["leaks"]),
        (Caller(name="admin", key="k", is_operator=True), "GET /v1/operator/status", "", 200, OWN_ID, []),
        (Caller(name="admin", key="k", is_operator=True), LIST, "", 200, "", ["admitted"]),
        (
            Caller(name="suspended", key="k", merchant=OURS, scopes=frozenset({"payments:write"}), is_suspended=True),
            *("POST /v1/payments", "", 201, "", ["admitted"]),
        ),
    ],
)
def test_wrong_answers_are_found(
    caller: Caller, route: str, sent: str, status: int, answered: str, kinds: list[str]
) -> None:
    assert [kind for kind, _ in find_faults(WORLD, caller, route, sent, status, answered)] == kinds
