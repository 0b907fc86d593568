"""The shape of the code: imports in one direction, and equal lists of dependencies."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("app", "db", "jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def imports_of(folder: str) -> set[tuple[str, str]]:
    """(file, module imported) for all files under a folder, wherever in the file the import stands."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(path.relative_to(ROOT).parent.parts[: -node.level + 1 or None]) if node.level else ""
                modules = [".".join(filter(None, (package, node.module or "")))]
            found |= {(str(path.relative_to(ROOT)), module) for module in modules}
    return found


def crossings(folder: str, forbidden: tuple[str, ...]) -> list[tuple[str, str]]:
    """The imports under a folder that reach a package that they must not."""
    return sorted((file, module) for file, module in imports_of(folder) if module.split(".")[0] in forbidden)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("db", ("app", "jobs", "tests")),
        ("app", ("jobs", "tests")),
        ("jobs", ("app", "tests")),
    ],
)
def test_imports_run_from_app_and_jobs_to_db(folder: str, forbidden: tuple[str, ...]) -> None:
    assert crossings(folder, forbidden) == []


def test_the_sandbox_imports_none_of_the_rest() -> None:
    ours = [(file, module) for file, module in imports_of("app/sandbox") if module.split(".")[0] in PACKAGES]
    found = [(file, module) for file, module in ours if not f"{module}.".startswith("app.sandbox.")]
    assert {module for _, module in found} == {"app.bounded_http", "app.connection_limits", "app.graceful_stop"}


def test_the_limits_of_connections_import_nothing_of_ours() -> None:
    files = {"app/bounded_http.py", "app/connection_limits.py", "app/connection_responses.py"}
    modules = {module for file, module in imports_of("app") if file in files and module.split(".")[0] in PACKAGES}
    assert modules == {"app.connection_limits", "app.connection_responses"}


def test_the_sandboxs_shared_modules_know_no_provider() -> None:
    shared = ("commit_log", "connections", "faults", "memory", "settings", "state", "tables")
    found = [(file, module) for file, module in imports_of("app/sandbox") if module.startswith("app.sandbox.stripe")]
    assert [(file, module) for file, module in found if file in {f"app/sandbox/{name}.py" for name in shared}] == []


def test_providers_are_called_from_jobs_only() -> None:
    assert crossings("app", ("stripe",)) == []
    assert crossings("db", ("stripe",)) == []


def test_the_extra_and_the_group_of_development_are_the_same() -> None:
    assert PROJECT["project"]["optional-dependencies"]["dev"] == PROJECT["dependency-groups"]["dev"]


def test_every_dependency_is_pinned_exactly() -> None:
    requirements = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["dependency-groups"]["dev"],
        *PROJECT["build-system"]["requires"],
    ]
    pinned = re.compile(r"[a-z0-9-]+(\[[a-z,]+\])?==[0-9.]+(; .+)?")
    assert [requirement for requirement in requirements if not pinned.fullmatch(requirement)] == []


def test_every_disabled_lint_rule_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r'(?:^ignore|^exclude_rules|^"[^"]+") = \[\n(.*?)^\]', text, re.MULTILINE | re.DOTALL)
    rules = [line for block in lists for line in block.splitlines()]
    assert len(rules) > 20
    assert [line for line in rules if not re.fullmatch(r'    "[A-Z]+\d+",  # .+', line)] == []
