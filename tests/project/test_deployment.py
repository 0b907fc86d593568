"""The artefacts in deploy/ pass their linters, and use existing commands, options, variables and secrets."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement

from app.cli import COMMANDS
from app.web.serving import SHUTDOWN_SECONDS_MAX
from db.settings import SECRET_FILES, SECRETS
from jobs import app as workers
from tests.support.deployment import (
    BIN,
    DEPLOY,
    UNITS,
    VARIABLES,
    compose_services,
    ecs_containers,
    unit_setting,
    unit_settings,
)

ROOT = DEPLOY.parent
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yaml"
SERVICES = [unit for unit in UNITS if unit.name != "surety-backup.service"]
LINTERS = {
    "compose.yaml": ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")],
    "ecs.yaml": ["cfn-lint", "--non-zero-exit-code", "informational", str(DEPLOY / "ecs.yaml")],
    "Containerfile": ["hadolint", str(DEPLOY / "Containerfile")],
    "tests.yaml": ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)],
    "tests.yaml, security": ["zizmor", "--offline", "--no-progress", "--quiet", str(WORKFLOW)],
}
PROCESSES = {"api": ["surety", "api"], "webhooks": ["surety", "webhooks"], "deploy": ["surety", "deploy"]} | {
    "worker": ["procrastinate", "--app", "jobs.app", "worker"]
}
OWN_SECRETS = {
    "api": {"SURETY_API_DATABASE_URL"},
    "webhooks": {"SURETY_WEBHOOK_DATABASE_URL", "STRIPE_WEBHOOK_SECRET"},
    "worker": {"SURETY_WORKER_DATABASE_URL", "STRIPE_API_KEY", "SURETY_WEBHOOK_KEY"},
    "deploy": {"DATABASE_URL"},
}
"""The secrets of each process, and no others."""


def commands() -> list[list[str]]:
    """Every command line of ours in deploy/, its program without its folder."""
    lines = [shlex.split(unit_setting(unit, "ExecStart")) for unit in SERVICES]
    for service in [*compose_services().values(), *ecs_containers().values()]:
        lines += [service[key] for key in ("command", "Command") if key in service]
        check = service.get("healthcheck", {}).get("test") or service.get("HealthCheck", {}).get("Command")
        lines += [check[1:]] if check else []
    lines = [[Path(program).name, *arguments] for program, *arguments in lines]
    return [line for line in lines if line[0] not in ("sh", "pg_isready")]


@pytest.mark.parametrize("name", LINTERS)
def test_linter_accepts_the_artefact(name: str) -> None:
    program, *arguments = LINTERS[name]
    done = subprocess.run([str(BIN / program), *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


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
@pytest.mark.parametrize("unit", [*UNITS, DEPLOY / "surety-backup.timer"], ids=lambda unit: unit.name)
def test_systemd_accepts_every_unit(unit: Path, tmp_path: Path) -> None:
    for other in [*UNITS, DEPLOY / "surety-backup.timer"]:
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
    for name in ("NoNewPrivileges", "ProtectSystem", "ProtectHome", "PrivateTmp", "CapabilityBoundingSet"):
        assert unit_setting(unit, name) or name == "CapabilityBoundingSet"
    assert unit_setting(unit, "User") == ("postgres" if unit.name == "surety-backup.service" else "surety")
    assert unit_setting(unit, "EnvironmentFile").startswith("-/etc/surety/")
    if unit_settings(unit, "Type") != ["oneshot"]:
        assert (unit_setting(unit, "Restart"), unit_setting(unit, "StartLimitIntervalSec")) == ("always", "0")


def test_each_process_has_its_own_secrets_and_no_others() -> None:
    units, services, containers = {}, compose_services(), ecs_containers()
    for unit in SERVICES:
        given = dict(line.split("=", 1) for line in unit_settings(unit, "Environment"))
        loaded = dict(line.split(":", 1) for line in unit_settings(unit, "LoadCredential"))
        assert {path.removeprefix("%d/") for path in given.values()} == loaded.keys()
        assert all(path.startswith("/etc/surety/secrets/") for path in loaded.values())
        name = unit.name.removeprefix("surety-").removesuffix(".service").removesuffix("@")
        units[name] = {variable.removesuffix("_FILE") for variable in given}
    assert units == OWN_SECRETS
    composed = {
        name: {variable.removesuffix("_FILE") for variable in services[name]["environment"] if variable in SECRET_FILES}
        for name in OWN_SECRETS
    }
    assert composed == OWN_SECRETS
    for name in OWN_SECRETS:
        mounted = {f"/run/secrets/{secret}" for secret in services[name]["secrets"]}
        assert mounted == {
            value for variable, value in services[name]["environment"].items() if variable in SECRET_FILES
        }
    assert {name: {secret["Name"] for secret in containers[name]["Secrets"]} for name in OWN_SECRETS} == OWN_SECRETS
    plain = [*services.values(), *containers.values()]
    assert not [name for service in plain for name in names_of(service) if name in SECRETS]


def names_of(service: dict[str, Any]) -> Iterator[str]:
    """The variables whose values are in the artefact."""
    yield from service.get("environment", {})
    yield from (variable["Name"] for variable in service.get("Environment", []))


def test_every_variable_exists() -> None:
    for name, service in [*compose_services().items(), *ecs_containers().items()]:
        if name not in ("postgresql", "logins"):
            assert {*names_of(service)} <= VARIABLES | SECRET_FILES
    text = (DEPLOY / "Containerfile").read_text()
    assert set(re.findall(r"\b(SURETY_[A-Z_]+)=", text)) <= VARIABLES


def test_each_artefact_runs_every_process_without_privileges() -> None:
    services, containers = compose_services(), ecs_containers()
    assert {name: services[name]["command"] for name in PROCESSES} == PROCESSES
    assert {name: containers[name]["Command"] for name in PROCESSES} == PROCESSES
    for name in PROCESSES:
        assert (services[name]["user"], services[name]["cap_drop"], services[name]["read_only"]) == (
            "10001",
            ["ALL"],
            True,
        )
        assert (containers[name]["User"], containers[name]["ReadonlyRootFilesystem"]) == ("10001", True)
        assert containers[name]["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]}
        if name != "deploy":
            assert services[name]["healthcheck"]["test"] == ["CMD", "surety", "health", name]
            assert containers[name]["HealthCheck"]["Command"] == ["CMD", "surety", "health", name]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= services.keys(), name
        assert set(service.get("secrets", [])) <= declared_secrets(), name


def declared_secrets() -> set[str]:
    """The files of secrets that the compose file declares, which make-secrets.sh makes."""
    declared: dict[str, dict[str, str]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"]
    assert all(value == {"file": f"./secrets/{name}"} for name, value in declared.items())
    return set(declared)


def test_stop_timeouts_exceed_graceful_shutdown() -> None:
    graceful = {"worker": workers.worker_defaults["shutdown_graceful_timeout"]}
    graceful |= {"api": SHUTDOWN_SECONDS_MAX, "webhooks": SHUTDOWN_SECONDS_MAX}
    for name, seconds in graceful.items():
        unit = DEPLOY / f"surety-{name}{'@' if name == 'worker' else ''}.service"
        assert int(unit_setting(unit, "TimeoutStopSec")) > seconds
        assert int(compose_services()[name]["stop_grace_period"].removesuffix("s")) > seconds
        assert ecs_containers()[name]["StopTimeout"] > seconds


def test_cloudformation_gets_no_aliases_which_it_refuses() -> None:
    tokens = yaml.scan((DEPLOY / "ecs.yaml").read_text())
    assert not [token for token in tokens if isinstance(token, yaml.AliasToken | yaml.AnchorToken)]


def test_container_is_made_of_what_the_wheel_needs_and_its_last_stage_has_no_build_tools() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert [name for name in line.split() if not (ROOT / name).exists()] == []
    [floor] = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2 and all(stage.startswith(f"docker.io/library/python:{floor}.") for stage in stages)
    last = text[text.rindex("FROM ") :]
    assert "USER 10001" in last and "pip uninstall --yes pip setuptools wheel" in last and "apt-get" not in last


def test_images_and_actions_have_versions() -> None:
    images = [service["image"] for service in compose_services().values()]
    images += re.findall(r"^FROM (\S+)", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    images += re.findall(r"container: (\S+)", WORKFLOW.read_text())
    assert [image for image in images if not re.search(r":\d+\.\d+", image)] == []
    actions = re.findall(r"uses: (.+)$", WORKFLOW.read_text(), re.MULTILINE)
    assert (
        actions
        and [action for action in actions if not re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)] == []
    )
    version, *_ = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"surety:{version}" in images


def test_workflow_runs_every_test_on_both_versions_of_postgresql_and_builds_the_container() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]["include"]
    assert [entry["postgresql"] for entry in matrix] == ["15", "18"]
    assert ".ci/run" in [step.get("run") for step in jobs["tests"]["steps"]]
    assert any("docker build --file deploy/Containerfile" in step.get("run", "") for step in jobs["container"]["steps"])


def pinned(name: str) -> dict[str, str]:
    """The packages of a constraints file with their versions; each has a hash."""
    text = (DEPLOY / name).read_text()
    entries = re.findall(
        r"^([a-z0-9-]+)==(\S+)[^\n]*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    assert len(entries) == len(re.findall(r"^[a-z]", text, re.MULTILINE))
    return {package: version for package, version, _ in entries}


def test_constraints_pin_everything_that_an_installation_needs() -> None:
    found = pinned("constraints.txt")
    waiting: list[tuple[str, frozenset[str]]] = [("surety", frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        installed = distribution(name)
        # Other versions need other packages; the tests may have them.
        for text in (installed.requires or []) if found.get(name, installed.version) == installed.version else []:
            requirement = Requirement(text)
            if requirement.marker and not any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
            ):
                continue
            package = requirement.name.lower().replace("_", "-").replace(".", "-")
            assert package in found, f"{name} needs {package}"
            assert requirement.specifier.contains(found[package], prereleases=True), f"{name} needs {requirement}"
            if (key := (package, frozenset(requirement.extras))) not in seen:
                seen.add(key)
                waiting.append(key)
    assert len(seen) > 30
    built = re.findall(r'requires = \["hatchling==([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())
    assert [pinned("build-constraints.txt")["hatchling"]] == built


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed here")
def test_constraints_install_by_their_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, timeout=60)
    install = ["uv", "pip", "install", "--quiet", "--require-hashes", "--python", str(folder / "bin" / "python")]
    subprocess.run([*install, "--requirement", str(DEPLOY / "constraints.txt")], check=True, timeout=300)
    [packages] = folder.glob("lib/python*/site-packages")
    assert (packages / "procrastinate").is_dir()


def test_no_artefact_names_a_registry_of_packages() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and "secrets" not in path.parts]
    assert not [path.name for path in files if re.search(r"index-url|find-links /|://[^\s/]*pyp", path.read_text())]
