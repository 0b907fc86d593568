"""Clients that others' generators make from the OpenAPI document work without a type error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.test_payment_lives import PaymentScenario, running_scenario

PROGRAM = Path(__file__).parent / "clients" / "generated_python.py"
TYPESCRIPT = Path(__file__).parent / "clients" / "typescript"
UNREACHABLE = ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN", "ETIMEDOUT", "ENETUNREACH")
TOOLS = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints. Fails with its output."""
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def scenario(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaymentScenario]:
    with running_scenario(server, tmp_path_factory.mktemp("generated")) as running:
        yield running


def test_generated_python_client_makes_captures_refunds_and_lists(scenario: PaymentScenario, tmp_path: Path) -> None:
    url = str(scenario.merchant.client.base_url).rstrip("/")
    document = tmp_path / "openapi.json"
    document.write_bytes(httpx.get(f"{url}/docs/openapi.json").content)
    path = os.pathsep.join([str(TOOLS), os.environ["PATH"]])
    said = run(TOOLS / "openapi-python-client", "generate", "--path", document, cwd=tmp_path, PATH=path)
    assert "Warning" not in said
    client = str(tmp_path / "surety-client")
    run(TOOLS / "mypy", "--strict", "--cache-dir", tmp_path / "cache", PROGRAM, cwd=tmp_path, MYPYPATH=client)
    answer = json.loads(run(sys.executable, PROGRAM, url, scenario.merchant.key, cwd=tmp_path, PYTHONPATH=client))
    assert answer == {
        "payment": answer["payment"],
        "captured": 4000,
        "refund": ["succeeded", [1000]],
        "listed": answer["listed"],
        "refused": "The request breaks a rule",
    }
    assert answer["payment"] in answer["listed"]


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node.js is not installed")
def test_generated_typescript_client_makes_captures_refunds_lists_and_reads_events(
    scenario: PaymentScenario, tmp_path: Path
) -> None:
    url = str(scenario.merchant.client.base_url).rstrip("/")
    shutil.copytree(TYPESCRIPT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "openapi.json").write_bytes(httpx.get(f"{url}/docs/openapi.json").content)
    try:
        run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=tmp_path)
    except AssertionError as error:
        if any(sign in str(error) for sign in UNREACHABLE):
            pytest.skip("npm can't reach its registry")
        raise
    run("npx", "--no-install", "openapi-typescript", "openapi.json", "--output", "surety.d.ts", cwd=tmp_path)
    run("npx", "--no-install", "tsc", cwd=tmp_path)
    answer = json.loads(run("node", "built/generated_typescript.js", url, scenario.merchant.key, cwd=tmp_path))
    assert answer == {
        "payment": answer["payment"],
        "status": "requires_capture",
        "captured": 4000,
        "refund": "succeeded",
        "listed": answer["listed"],
        "confirmed": [4000],
        "refused": "The request breaks a rule",
    }
    assert answer["payment"] in answer["listed"]
