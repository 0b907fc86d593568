"""A well-behaved sandbox that the tests of this folder share, unless a file has one of its own."""

from collections.abc import Iterator

import pytest

from tests.support.sandbox_process import SandboxProcess, running_sandbox


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox"), "--payout-seconds=0.3") as running:
        yield running
