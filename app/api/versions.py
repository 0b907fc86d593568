"""Versions of the API, each named by its date. A request may ask for one by the header Surety-Version.

A request without the header gets the oldest version, so that a client which was never changed is answered as on its
first day. Commands are audited with their version.
"""

from __future__ import annotations

from app.web.problems import RuleViolation, invalid_request
from app.web.validation import echo

VERSION_HEADER = "Surety-Version"
VERSIONS = ("2026-11-30",)
"""All versions, the oldest first."""
ANSWERED_VERSION = (VERSION_HEADER.lower().encode(), VERSIONS[0].encode())


def version_of(headers: dict[bytes, bytes]) -> str:
    """The version of a request. Raises Problem for an unknown one."""
    asked = headers.get(ANSWERED_VERSION[0])
    if asked is None:
        return VERSIONS[0]
    version = asked.decode("latin-1")
    if version not in VERSIONS:
        message = f"{VERSION_HEADER} must be {' or '.join(VERSIONS)}"
        violation = RuleViolation(VERSION_HEADER, "one_of", message, list(VERSIONS), echo(version), place="header")
        raise invalid_request([violation])
    return version
