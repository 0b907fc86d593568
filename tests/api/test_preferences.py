"""The grammar of the header Prefer (RFC 7240)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.web.preferences import WAIT_SECONDS_MAX, read_wait_seconds


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["wait=10"], 10),
        (["WAIT=10"], 10),
        (["wait = 10"], 10),
        (["wait=0"], 0),
        (["wait=007"], 7),
        (["wait=31"], 30),
        (["wait=" + "9" * 5000], 30),
        (["respond-async, wait=10"], 10),
        (["respond-async", "wait=10"], 10),
        (["wait=10, wait=20"], 10),
        (["wait=10", "wait=20"], 10),
        (["wait=soon, wait=20"], None),
        (["wait=10; foo=bar; baz"], 10),
        (["wait=10;;"], 10),
        (['foo="wait=5, wait=6"; a="\\",wait=7", wait=8'], 8),
        ([", ,wait=3,"], 3),
        (["a b, wait=3"], 3),
        (["foo=, wait=3"], 3),
        ([""], None),
        (["wait"], None),
        (["wait="], None),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=1s"], None),
        (['wait="10"'], None),
        (["wait=1 2"], None),
        (["wait=10; =3"], None),
        (["wait:10"], None),
        (["waits=10"], None),
        (['foo="unfinished, wait=10'], None),
        (['foo="unfinished\\, wait=10\\'], None),
        (["wait=\xb2"], None),
    ],
)
def test_wait_is_read_by_the_grammar_of_prefer(values: list[str], seconds: int | None) -> None:
    headers = [(b"host", b"wait=1"), *((b"prefer", value.encode("latin-1")) for value in values)]
    assert read_wait_seconds(headers) == seconds


def test_no_prefer_is_no_wait() -> None:
    assert read_wait_seconds([(b"accept", b"wait=10")]) is None


@given(st.lists(st.text(st.sampled_from('wait=10;, "\\\t'), max_size=400).map(str.encode), max_size=3))
def test_any_prefer_is_read_without_an_error(values: list[bytes]) -> None:
    seconds = read_wait_seconds([(b"prefer", value) for value in values])
    assert seconds is None or 0 <= seconds <= WAIT_SECONDS_MAX


@pytest.mark.parametrize("repeated", ["; ", '"', "\\", " ", "a=", ', "', ';a="\\'])
def test_long_prefer_is_read_to_its_end(repeated: str) -> None:
    prefer = ("wait=1" + repeated * 8000)[:16_000]
    assert read_wait_seconds([(b"prefer", prefer.encode() + b"\x00")]) is None or repeated == ', "'
