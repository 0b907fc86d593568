"""Plain words: short lines and sentences in the documents, retired words nowhere.

`python -m tests.project.test_prose` shows every retired word with its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "app" / "api" / "introduction.md",
    ROOT / "findings" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINE_CHARACTERS_MAX = 120
SENTENCE_WORDS_MAX = 25

# Words with a plain one in their place; docs/glossary.md has those. `--single-lanes` and `single_lanes` are the option
# and the JSON field of a benchmark.
RETIRED = (
    "told|untold|tell|tells|telling|whoever|nobody(?![`\"'])|somebody|what is|those who|(?<!single[-_])lanes?|"
    "kick(?:s|ed|ing)?|sweep(?:s|ing)?|swept|parked|bury|buri(?:ed|es)|ticks?|wakes?|waking|woken|woke|"
    "call(?:s|ed|ing)?[ _]off|epochs?(?! from|')|promise[sd]?|standing|unheard|doorkeeper|troupe|clerk|"
    "strangers?|himself|him|his|he|poisonous|tasted"
)
# The simulation's options --lanes and --tell keep their names.
ALLOWED = {
    "tests/simulation/__main__.py": 3,
    "tests/simulation/schedule.py": 1,
}
RETIRED_WORD = re.compile(rf"(?<![a-z])(?:{RETIRED})(?![a-z])")


def words_retired(text: str) -> list[tuple[int, str]]:
    """(line number, word) for each retired word, also within identifiers."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", line).lower()
        found += [(number, word) for word in RETIRED_WORD.findall(apart)]
    return found


def sources() -> Iterator[Path]:
    """The product's and the tests' own texts, but this file."""
    for folder in ("app", "db", "jobs", "tests", "deploy", "findings"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".sql", ".service", ".yaml", ".sh", ".txt"} and path != Path(__file__):
                yield path
    yield ROOT / "schema.sql"
    yield ROOT / "pyproject.toml"


def sentences(text: str) -> Iterator[str]:
    """The sentences of a document; code and tables have none."""
    text = re.sub(r"```.*?```|<!--.*?-->|^ {4}\S.*$|^\|.*$|^#.*$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
        yield from re.split(r"(?<=[.!?:;])[*_)]*\s+", plain)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_lines_of_documents_are_short() -> None:
    long = [
        (name_of(path), line)
        for path in DOCUMENTS
        for line in path.read_text(encoding="utf-8").splitlines()
        if len(line) > LINE_CHARACTERS_MAX and not re.match(r"\||- \[.*\)$", line)
    ]
    assert long == []


def test_sentences_of_documents_are_short() -> None:
    long = [
        (name_of(path), sentence)
        for path in DOCUMENTS
        for sentence in sentences(path.read_text(encoding="utf-8"))
        if len(sentence.split()) > SENTENCE_WORDS_MAX
    ]
    assert long == []


def test_documents_use_no_retired_word() -> None:
    used = {name_of(path): found for path in DOCUMENTS if (found := words_retired(path.read_text(encoding="utf-8")))}
    assert used == {}


def test_code_uses_no_retired_word() -> None:
    used = {name_of(path): found for path in sources() if (found := words_retired(path.read_text(encoding="utf-8")))}
    assert {path: found for path, found in used.items() if len(found) > ALLOWED.get(path, 0)} == {}


if __name__ == "__main__":
    for path in sources():
        for number, word in words_retired(path.read_text(encoding="utf-8")):
            print(f"{name_of(path)}:{number}: {word}")
