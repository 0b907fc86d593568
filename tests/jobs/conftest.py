"""Fixtures of the workers' tests; a file may have its own instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.payments import Connection, add_merchant, pay
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import (
    NO_AUTOMATIC_RETRY,
    shorten_delays,
)

Pay = Callable[..., list[str]]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    options = ("--hang-seconds=30", "--slow-seconds=0.7", "--payout-seconds=0")
    with running_sandbox(tmp_path_factory.mktemp("workers"), *options) as sandbox:
        yield sandbox


@pytest.fixture
def shop(conn: Connection) -> Pay:
    """Makes payments of 100.00 USD."""
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    _, key_hash = add_merchant(conn)
    return lambda count=1, **fields: pay(conn, key_hash, count, **fields)
