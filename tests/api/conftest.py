"""Services shared by the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.http_client import Connection, Merchant, ServerProcess, connect_as_owner, running_server


@pytest.fixture(scope="module")
def api(module_database: str) -> Iterator[ServerProcess]:
    """An API process."""
    with running_server("api", module_database) as running:
        yield running


@pytest.fixture(scope="module")
def rights(module_database: str) -> Iterator[Connection]:
    """A connection with all rights, in autocommit mode."""
    with connect_as_owner(module_database) as conn:
        yield conn


@pytest.fixture
def merchant(rights: Connection, api: ServerProcess) -> Iterator[Merchant]:
    """A merchant of the test's own."""
    made = Merchant(rights, api.url)
    yield made
    made.client.close()
