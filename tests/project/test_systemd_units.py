"""Units, compose file and image in deploy/ use existing commands, options and variables, and sufficient timeouts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml  # type: ignore[import-untyped]

from app.cli import COMMANDS
from app.web.serving import SHUTDOWN_SECONDS_MAX
from db.settings import Settings
from jobs import app as workers

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
BIN = Path(sys.executable).parent
VARIABLES = {field.encode_name for field in msgspec.structs.fields(Settings)}


def setting(unit: Path, name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)
    return str(value)


def compose() -> dict[str, Any]:
    output: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return output


def commands() -> list[list[str]]:
    """Every command line in deploy/, its program without its folder."""
    lines = [shlex.split(setting(unit, "ExecStart")) for unit in UNITS]
    lines += [service["command"] for service in compose()["services"].values() if "command" in service]
    return [[Path(program).name, *arguments] for program, *arguments in lines]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_and_option_exists(command: list[str]) -> None:
    program, *arguments = command
    if program == "surety":
        assert arguments[0] in COMMANDS
        asked = [arguments[0]]
    else:
        assert program == "procrastinate"
        asked = ["--app", "jobs.app", "worker"]
    output = subprocess.run(
        [str(BIN / program), *asked, "--help"],
        cwd=DEPLOY.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    assert [option for option in options if option not in output and option != "--app"] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_every_unit(unit: Path, tmp_path: Path) -> None:
    for other in UNITS:
        text = other.read_text().replace("/opt/surety/bin/", f"{BIN}/")
        (tmp_path / other.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name.replace("@", "@1"))],
        capture_output=True, text=True, check=False, timeout=60,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.returncode, [line for line in done.stderr.splitlines() if "surety" in line]) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_every_unit_is_hardened_and_services_restart(unit: Path) -> None:
    for name in ("NoNewPrivileges", "ProtectSystem", "ProtectHome", "PrivateTmp", "User", "CapabilityBoundingSet"):
        assert setting(unit, name) or name == "CapabilityBoundingSet"
    assert setting(unit, "EnvironmentFile").startswith("/etc/surety/")
    if unit.name != "surety-deploy.service":
        assert (setting(unit, "Restart"), setting(unit, "StartLimitIntervalSec")) == ("always", "0")


def test_stop_timeouts_exceed_graceful_shutdown() -> None:
    graceful = workers.worker_defaults["shutdown_graceful_timeout"]
    needed = {"surety-worker@.service": graceful, "surety-api.service": SHUTDOWN_SECONDS_MAX}
    needed["surety-webhooks.service"] = SHUTDOWN_SECONDS_MAX
    for name, seconds in needed.items():
        assert int(setting(DEPLOY / name, "TimeoutStopSec")) > seconds
    assert int(compose()["x-surety"]["stop_grace_period"].removesuffix("s")) > graceful


def test_the_compose_file_names_variables_and_services_that_exist() -> None:
    output = compose()
    assert set(output["x-surety"]["environment"]) <= VARIABLES
    services = output["services"]
    holders = {
        secret: [name for name, service in services.items() if secret in service.get("environment", {})]
        for secret in ("STRIPE_API_KEY", "STRIPE_WEBHOOK_SECRET")
    }
    assert holders == {"STRIPE_API_KEY": ["worker"], "STRIPE_WEBHOOK_SECRET": ["webhooks"]}
    assert all(set(service["environment"]) <= VARIABLES for name, service in services.items() if name != "postgresql")
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
    assert {"deploy", "api", "webhooks", "worker", "postgresql"} <= services.keys()
    ours = [service for service in services.values() if service.get("image") == "surety"]
    assert all(service["build"]["dockerfile"] == "deploy/Containerfile" for service in ours)


def test_the_image_is_made_of_what_the_wheel_needs() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert [name for name in line.split() if not (DEPLOY.parent / name).exists()] == []
    assert set(re.findall(r"\b(SURETY_[A-Z_]+)=", text)) <= VARIABLES
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    [floor] = re.findall(r'requires-python = ">=([\d.]+)"', project)
    assert f"python:{floor}" in text
