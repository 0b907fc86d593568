"""The request header Prefer (RFC 7240), of which `wait` is understood.

A preference is a wish. One that is unknown, or breaks the header's grammar, is ignored. Of several preferences of one
name, the first counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WAIT_SECONDS_MAX = 30

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
# Possessive, so that no text takes more than linear time.
SPACES = rb"[ \t]*+"
QUOTED = rb'"(?:[^"\\]|\\.)*+"'
VALUE = rb"(?:" + SPACES + rb"=" + SPACES + rb"(" + TOKEN + rb"|" + QUOTED + rb")?+)?+"
PARAMETER = rb"(?:" + TOKEN + VALUE + rb")?+"
# An unfinished quoted string reaches to the header's end.
LIST_ELEMENT = re.compile(rb'(?:[^",]|"(?:[^"\\]|\\.?)*+"?+)++', re.DOTALL)
PREFERENCE = re.compile(
    rb"(?P<name>" + TOKEN + rb")" + VALUE + rb"(?:" + SPACES + rb";" + SPACES + PARAMETER + rb")*+" + SPACES, re.DOTALL
)


def read_wait_seconds(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The whole seconds of the preference `wait`, at most WAIT_SECONDS_MAX; None if it is absent or malformed."""
    for name, value in headers:
        if name != b"prefer":
            continue
        for element in LIST_ELEMENT.findall(value):
            preference = PREFERENCE.fullmatch(element.strip(b" \t"))
            if preference is not None and preference["name"].lower() == b"wait":
                return seconds_of(preference[2] or b"")
    return None


def seconds_of(value: bytes) -> int | None:
    """Digits as seconds, at most WAIT_SECONDS_MAX; None for another text."""
    if not value.isdigit():
        return None
    digits = value.lstrip(b"0") or b"0"
    return min(int(digits), WAIT_SECONDS_MAX) if len(digits) < 10 else WAIT_SECONDS_MAX
