"""The view from outside during a disturbance: acknowledged payments, and the status report."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

PAYMENT_SECONDS = 0.05
STATUS_SECONDS = 3.0
STATUS_SECONDS_MAX = 60.0


class Observer:
    """Watches from its creation until `close`: acknowledged payments, and `surety status`."""

    def __init__(self, acknowledged: Sequence[str], environment: Mapping[str, str]) -> None:
        self.unavailable_seconds = 0.0
        """The longest time without an acknowledged payment."""
        self.findings: dict[str, str] = {}
        """What `surety status` reported meanwhile: the first text of each finding, by its id."""
        self._acknowledged, self._environment = acknowledged, environment
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._watch_payments), threading.Thread(target=self._watch_status)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _watch_payments(self) -> None:
        count, since = len(self._acknowledged), time.monotonic()
        while not self._closing.wait(PAYMENT_SECONDS):
            now = time.monotonic()
            self.unavailable_seconds = max(self.unavailable_seconds, now - since)
            if len(self._acknowledged) != count:
                count, since = len(self._acknowledged), now

    def _watch_status(self) -> None:
        while not self._closing.is_set():
            for name, text in read_findings(self._environment).items():
                self.findings.setdefault(name, text)
            self._closing.wait(STATUS_SECONDS)


def read_findings(environment: Mapping[str, str]) -> dict[str, str]:
    """The findings of `surety status` by id; its error under the id `error`."""
    command = [sys.executable, "-m", "app.cli", "status", "--json"]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=STATUS_SECONDS_MAX, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {STATUS_SECONDS_MAX:g} s"}
    with suppress(json.JSONDecodeError):
        return {finding["id"]: finding["what"] for finding in json.loads(done.stdout)["findings"]}
    return {"error": " ".join([*done.stdout.splitlines()[-1:], *done.stderr.splitlines()[-1:]])}
