"""Fixtures of the tests about payouts, bank statements and reports."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.payments import Connection, add_merchant, pay
from tests.support.workers import NO_AUTOMATIC_RETRY, shorten_delays

Pay = Callable[..., list[str]]


@pytest.fixture
def shop(conn: Connection) -> Pay:
    """Makes payments of 100.00 USD."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    return lambda count=1, **fields: pay(conn, key_hash, count, **fields)
