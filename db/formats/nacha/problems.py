"""The problems of a NACHA file: each with its line, field, rule and value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from db.errors import SuretyError

PROBLEMS_MAX = 1000
"""Kept of a file; more are counted."""
VALUE_CHARACTERS_MAX = 94


@dataclass(frozen=True, slots=True)
class NachaProblem:
    """A broken rule. `severity` is `warning` if the entry is usable all the same; `line` is 0 for the whole file."""

    line: int
    field: str
    rule: str
    value: str
    severity: Literal["error", "warning"] = "error"
    expected: str = ""

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        wanted = f", expected {self.expected!r}" if self.expected else ""
        return f"{place}{self.field}: broken rule: {self.rule.replace('_', ' ')} (found {self.value!r}{wanted})"


class NachaError(SuretyError):
    """A file, batch or entry breaks the rules; `problems` has all of them."""

    def __init__(self, problems: list[NachaProblem]) -> None:
        shown = "; ".join(map(str, problems[:10]))
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        super().__init__(f"not a valid NACHA file: {shown}{more}")
        self.problems = problems


def show_value(value: object, *, secret: bool = False) -> str:
    """A value as an error may show it: printable, short, and of a secret one its last four characters."""
    text = str(value)
    if secret:
        kept = "".join(text.split())
        return f"…{kept[-4:]}" if len(kept) > 8 else "…"
    shown = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= VALUE_CHARACTERS_MAX else shown[: VALUE_CHARACTERS_MAX - 1] + "…"
