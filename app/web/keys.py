"""API keys: `sty_test_…`, `sty_live_…` or an operator's `sty_operator_…`, 32 random characters and a checksum of 6.

The checksum recognizes a misspelt key without the database, which stores only the SHA-256.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from typing import NamedTuple

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY_PATTERN = re.compile(r"(sty_(?:live|test|operator)_[0-9A-Za-z]{32})([0-9A-Za-z]{6})")
AUTHORIZATION_PATTERN = re.compile(
    rb"(?i:bearer) +((sty_(?:live|test|operator)_[0-9A-Za-z]{32})([0-9A-Za-z]{6}))[ \t]*"
)
DIGIT_PAIRS = [first + second for first in ALPHABET for second in ALPHABET]
HINT_CHARACTERS = 4


class NewKey(NamedTuple):
    """A key that was just made: `text` is shown once, `hash` and `hint` are kept."""

    text: str
    hash: bytes
    hint: str


def new_key(*, livemode: bool) -> NewKey:
    """A new key for a merchant."""
    return new_key_for("live" if livemode else "test")


def new_operator_key() -> NewKey:
    """A new key for an operator."""
    return new_key_for("operator")


def new_key_for(kind: str) -> NewKey:
    """A new key of a kind: `test`, `live` or `operator`."""
    body = f"sty_{kind}_{''.join(secrets.choice(ALPHABET) for _ in range(32))}"
    text = body + checksum(body)
    return NewKey(text, hashlib.sha256(text.encode()).digest(), text[-HINT_CHARACTERS:])


def checksum(body: str) -> str:
    """CRC-32 in six digits of base 62."""
    return checksum_of(body.encode())


def checksum_of(body: bytes) -> str:
    """CRC-32 in six digits of base 62."""
    rest, last = divmod(zlib.crc32(body), len(DIGIT_PAIRS))
    first, middle = divmod(rest, len(DIGIT_PAIRS))
    return DIGIT_PAIRS[first] + DIGIT_PAIRS[middle] + DIGIT_PAIRS[last]


def key_hash_of(authorization: bytes) -> bytes | None:
    """The SHA-256 of the key in an Authorization header; None if its text can't be a key.

    It is not cached here, because any client could fill the cache.
    """
    given = AUTHORIZATION_PATTERN.fullmatch(authorization)
    if given is None or checksum_of(given[2]).encode() != given[3]:
        return None
    return hashlib.sha256(given[1]).digest()


def why_no_key(authorization: bytes) -> str:
    """Why the text of an Authorization header can't be a key. The text itself, a secret, is not repeated."""
    scheme, _, text = authorization.strip().partition(b" ")
    if not scheme:
        return "the header Authorization is missing: send `Authorization: Bearer sty_…`"
    if scheme.lower() != b"bearer":
        return "the header Authorization has another scheme than Bearer: send `Authorization: Bearer sty_…`"
    if not text.strip():
        return "the header Authorization has no key after Bearer"
    if not text.strip().startswith(b"sty_"):
        return "the key in the header Authorization is not of this service: its keys begin with sty_"
    return (
        "the API key is misspelt: after sty_test_, sty_live_ or sty_operator_ it has 38 letters and digits, "
        "the last six a checksum of the others"
    )


def livemode_of(authorization: bytes) -> bool | None:
    """The mode of the merchant's key in an Authorization header; None for an operator's key or no key."""
    given = AUTHORIZATION_PATTERN.fullmatch(authorization)
    return {b"sty_live_": True, b"sty_test_": False}.get(given[2][:9]) if given else None
