"""Removal of what must not be kept.

Client secrets are never stored: the client secret of an intent gives the rights of its payer. A redacted body no longer
verifies against its signature, so the signature is verified before. Payers' addresses, and the part of our key that the
provider's words about a refused key hold, appear neither in the audit trail nor in logs.
"""

from __future__ import annotations

import re

CLIENT_SECRET = re.compile(rb'("client_secret"\s*:\s*)"(?:[^"\\]|\\.)*"')
# The same with the key's letters escaped, as JSON allows.
ESCAPED_SECRET = re.compile(
    b'("%s"%s)"%s"'
    % (
        b"".join(rb"(?:%c|\\u00(?i:%02x))" % (letter, letter) for letter in b"client_secret"),
        rb"\s*:\s*",
        rb'(?:[^"\\]|\\.)*',
    )
)


API_KEY = re.compile(r"\b([a-z]{2,4}_(?:live|test)_)[^\s'\"]+")
EMAIL_ADDRESS = re.compile(r"[^\s@]+@[^\s@]+")


def without_addresses(text: str) -> str:
    """A text of the provider without e-mail addresses; its errors repeat the one that it refuses."""
    return EMAIL_ADDRESS.sub("(an e-mail address)", text)


def without_secrets(body: bytes) -> bytes:
    """JSON with client secrets made null."""
    return (ESCAPED_SECRET if b"\\u00" in body else CLIENT_SECRET).sub(rb"\1null", body)


def without_keys(text: str) -> str:
    """A text without the provider's API keys, or what it shows of them: `sk_live_…`."""
    return API_KEY.sub(r"\1…", text)
