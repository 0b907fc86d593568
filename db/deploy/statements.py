"""Split SQL files into statements, and find the object that each creates or alters.

A statement keeps its file and line for error messages. The splitter knows line and block comments, plain, quoted and
dollar-quoted text, and bodies of `begin atomic … end`. It doesn't know psql's backslash commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

StatementKind = Literal["function", "view", "trigger", "schema", "index", "alteration", "other"]

TOKEN = re.compile(
    r"""
      --[^\n]*
    | /\*.*?\*/
    | (?:\be)'(?:[^'\\]|''|\\.)*'
    | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | (?P<tag>\$(?:[a-z_]\w*)?\$).*?(?P=tag)
    | (?P<word>\bbegin\s+atomic\b|\bcase\b|\bend\b)
    | (?P<semicolon>;)
    """,
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
COMMENT = re.compile(r"\s+|--[^\n]*|/\*.*?\*/", re.DOTALL)
NAME = r"(?P<name>[\w.]+)"
PATTERNS: dict[StatementKind, re.Pattern[str]] = {
    "function": re.compile(rf"create\s+(?:or\s+replace\s+)?(?:function|procedure)\s+{NAME}", re.IGNORECASE),
    "view": re.compile(rf"create\s+(?:or\s+replace\s+)?(?:recursive\s+)?view\s+{NAME}", re.IGNORECASE),
    "trigger": re.compile(
        rf"create\s+(?:or\s+replace\s+)?(?:constraint\s+)?trigger\s+{NAME}\s.*?\son\s+(?P<table>[\w.]+)",
        re.IGNORECASE | re.DOTALL,
    ),
    "schema": re.compile(
        rf"create\s+schema\s+(?:if\s+not\s+exists\s+)?(?!authorization\b){NAME}", re.IGNORECASE | re.DOTALL
    ),
    "index": re.compile(
        rf"create\s+(?:unique\s+)?index\s+(?:concurrently\s+)?(?:if\s+not\s+exists\s+)?{NAME}\s+on\s+"
        r"(?:only\s+)?(?P<table>[\w.]+)",
        re.IGNORECASE,
    ),
    "alteration": re.compile(r"alter\s+table\s+(?:if\s+exists\s+)?(?:only\s+)?(?P<table>[\w.]+)", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; `name` and `table` are written as in the file, so they name their schema only if the file does."""

    text: str
    file: str
    line: int
    kind: StatementKind
    name: str = ""
    table: str = ""

    @property
    def identity(self) -> str:
        """schema.name of a function or view, schema.table.name of a trigger."""
        return f"{self.table}.{self.name}" if self.kind == "trigger" else self.name

    @property
    def replaces(self) -> bool:
        """Whether it can be repeated, because it says `or replace`."""
        return re.match(r"create\s+or\s+replace\b", self.text, re.IGNORECASE) is not None


def read_statements(path: Path) -> list[Statement]:
    """The statements of a file, in its order."""
    return list(split(path.read_text(encoding="utf-8"), path.name))


def split(text: str, file: str = "") -> Iterator[Statement]:
    """The statements of a text, without the comments before them: a changed comment does not change its statement."""
    start, depth = 0, 0
    for token in TOKEN.finditer(text):
        word = (token["word"] or "").lower()
        if word.startswith("begin") or (word == "case" and depth):
            depth += 1
        elif word == "end" and depth:
            depth -= 1
        elif token["semicolon"] and not depth:
            yield from classify(text, start, token.end(), file)
            start = token.end()
    yield from classify(text, start, len(text), file)


def classify(text: str, start: int, end: int, file: str) -> Iterator[Statement]:
    """The statement between two places of a text, none if there is only space and comment."""
    while skipped := COMMENT.match(text, start, end):
        start = skipped.end()
    body = text[start:end].strip()
    if not body:
        return
    line = text.count("\n", 0, start) + 1
    for kind, pattern in PATTERNS.items():
        if found := pattern.match(body):
            groups = found.groupdict()
            yield Statement(body, file, line, kind, groups.get("name", "").lower(), groups.get("table", "").lower())
            return
    yield Statement(body, file, line, "other")
