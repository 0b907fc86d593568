"""Services that the tests of this folder share, unless a file has its own."""

from collections.abc import Iterator

import pytest

from tests.support.sandbox_process import SandboxProcess, WebhookReceiver, running_receiver, running_sandbox


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    """A sandbox without faults."""
    with running_sandbox(tmp_path_factory.mktemp("sandbox"), "--payout-seconds=0.3") as running:
        yield running


@pytest.fixture(scope="module")
def receiver() -> Iterator[WebhookReceiver]:
    """A web server that receives the sandbox's webhooks."""
    with running_receiver() as running:
        yield running
