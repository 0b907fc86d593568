"""Files, functions, folders and names keep within what a reader can hold."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("app", "db", "jobs", "tests")
FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70
FOLDER_FILES_MAX = 12

# Each exception has its reason.
LONG_FILES = {
    "schema.sql": "the whole state of the database, read from top to bottom",
    "tests/db/test_ledger.py": "a table: each history of a payment, and its balances",
    "tests/mutations/mutants.py": "one entry a mutant",
    "tests/support/provider_faults.py": "a table: each call, each fault, what comes of it",
}
LONG_FUNCTIONS = {
    "app/sandbox/stripe/objects/payloads.py:charge": "a table: the fields of a charge",
}
LARGE_FOLDERS = {
    "app/api": "one file a resource",
    "app/api/schemas": "one file a resource, as in app/api",
    "app/cli": "one file a command",
    "app/web": "one file a concern of HTTP: authentication, batching, load shedding, problems, routing …",
    "db/sql/api": "one file a resource, as in app/api",
    "tests/api": "one file a concern of the HTTP processes",
    "tests/bench": "one file a benchmark",
    "tests/cli": "one file a command, as in app/cli",
    "tests/db": "one file a subject, as in db/sql",
    "tests/simulation": "one file a part of the simulated world",
    "tests/support": "helpers of all tests, one subject each",
}
# The sandbox is a program of its own with the provider's words, so its functions are not compared.
REPEATED_FUNCTIONS = {
    "create_app": "the application of each of the two HTTP processes",
    "deploy": "the function, and the command that calls it",
}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_fits_in_450_lines() -> None:
    files = [ROOT / "schema.sql", *python_files(*FOLDERS), *(ROOT / "db").rglob("*.sql")]
    lines = {relative(path): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {path: count for path, count in lines.items() if count > FILE_LINES_MAX and path not in LONG_FILES} == {}


def test_every_function_fits_on_a_screen() -> None:
    lengths = {
        f"{relative(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in python_files(*FOLDERS)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {place: lines for place, lines in lengths.items() if lines > FUNCTION_LINES_MAX}
    assert {place: lines for place, lines in long.items() if place not in LONG_FUNCTIONS} == {}


def test_every_folder_holds_at_most_twelve_files() -> None:
    counts: dict[str, int] = defaultdict(int)
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".sql"} and path.name != "__init__.py":
                counts[relative(path.parent)] += 1
    large = {folder: count for folder, count in counts.items() if count > FOLDER_FILES_MAX}
    assert {folder: count for folder, count in large.items() if folder not in LARGE_FOLDERS} == {}


def test_every_class_and_function_of_the_product_has_a_name_of_its_own() -> None:
    classes: dict[str, list[str]] = defaultdict(list)
    functions: dict[str, list[str]] = defaultdict(list)
    for path in python_files("db", "app", "jobs"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(relative(path))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "app/sandbox" not in relative(path):
                functions[node.name].append(relative(path))
    assert {name: paths for name, paths in classes.items() if len(paths) > 1} == {}
    repeated = {name: paths for name, paths in functions.items() if len(paths) > 1}
    assert {name: paths for name, paths in repeated.items() if name not in REPEATED_FUNCTIONS} == {}
