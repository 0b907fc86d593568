"""Fixtures of the tests of calls to Stripe; a file may have its own instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.payments import Connection, add_merchant, pay
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, shorten_delays


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("rail"), "--hang-seconds=1", "--slow-seconds=0.1") as sandbox:
        yield sandbox


@pytest.fixture
def payment(conn: Connection) -> Callable[..., str]:
    """A new payment of 100.00 USD by a card."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)

    def make(card: str = "pm_card_visa", **fields: Any) -> str:
        return pay(conn, key_hash, method_token=card, **fields)[0]

    return make
