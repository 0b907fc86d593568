"""A payer's consent to later payments: the rules that no type of a field can state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import msgspec

from app.api.schemas.payments import Mandate
from app.web.problems import RuleViolation
from app.web.validation import echo

EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
CLOCK_DIFFERENCE_MAX = timedelta(minutes=5)
"""The clock of the merchant may be ahead of ours."""


def mandate_violations(mandate: Any) -> list[RuleViolation]:
    """The rules about time and address that a mandate of any form breaks. Values of another form break other rules."""
    if not isinstance(mandate, dict):
        return []
    found = []
    try:
        accepted_at = msgspec.convert(mandate.get("accepted_at"), datetime)
    except msgspec.ValidationError:
        accepted_at = None
    if accepted_at is not None and accepted_at.tzinfo is not None:
        given = mandate["accepted_at"]
        if accepted_at < EARLIEST:
            limit = f"{EARLIEST:%Y-%m-%dT%H:%M:%SZ}"
            message = f"mandate.accepted_at must be at least {limit}"
            found.append(RuleViolation("/mandate/accepted_at", "minimum", message, limit, given))
        elif is_in_future(accepted_at):
            message = "mandate.accepted_at must not be in the future: it is when the payer agreed"
            found.append(RuleViolation("/mandate/accepted_at", "past", message, given=given))
    address = mandate.get("ip_address")
    if isinstance(address, str) and not is_address(address):
        message = "mandate.ip_address must be an IPv4 or IPv6 address"
        found.append(RuleViolation("/mandate/ip_address", "format", message, given=echo(address)))
    return found


def is_acceptable(mandate: Mandate) -> bool:
    """Whether a mandate breaks none of the rules of `mandate_violations`."""
    is_in_time = mandate.accepted_at >= EARLIEST and not is_in_future(mandate.accepted_at)
    return is_in_time and is_address(mandate.ip_address)


def is_in_future(instant: datetime) -> bool:
    """Whether a time is later than the difference of two clocks explains."""
    return instant > datetime.now(UTC) + CLOCK_DIFFERENCE_MAX


def is_address(text: str) -> bool:
    """Whether a text is an IPv4 or IPv6 address."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
