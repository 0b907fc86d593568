"""Serving ends, whatever an application does when it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from litestar import Litestar

from db.embedded.processes import wait_until
from tests.crash.kills import children_of

ROOT = Path(__file__).parent.parent.parent
IMPATIENT = """
from app.web import serving
serving.SHUTDOWN_SECONDS_MAX, serving.GRACE_SECONDS = 1, 0.5
serving.serve("tests.api.test_serving:create_stubborn", name="api", host="127.0.0.1", port=0, processes=2)
"""

EARLY = """
import os, pathlib, signal, sys, uvicorn
from app.sandbox.server import serve_sandbox
from app.web.serving import serve

listens, number, memory = uvicorn.Server.capture_signals, int(sys.argv[1]), pathlib.Path(sys.argv[2])

def capture_signals(server):
    os.kill(os.getpid(), number)
    return listens(server)

uvicorn.Server.capture_signals = capture_signals
"""
STARTS = (
    'serve("tests.api.test_serving:create_empty", name="api", host="127.0.0.1", port=0)',
    "serve_sandbox(memory=memory)",
)


def create_empty() -> Litestar:
    return Litestar([], openapi_config=None, logging_config=None)


def create_stubborn() -> Litestar:
    """An application that never closes."""

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        os.write(1, b"open\n")  # one write, as both processes share the pipe; print makes two with PYTHONUNBUFFERED
        yield
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()

    return Litestar([], lifespan=[lifespan], openapi_config=None, logging_config=None)


def test_processes_that_do_not_stop_are_killed_by_their_parent() -> None:
    serving = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert wait_until(lambda: len(children_of(serving.pid)) == 2, 30)
        family = children_of(serving.pid)
        assert serving.stdout is not None
        answer = [serving.stdout.readline() for _ in range(3)]
        assert answer[0].startswith("listening on") and answer[1:] == ["open\n"] * 2
        serving.terminate()
        _, log = serving.communicate(timeout=60)
        assert serving.returncode == 0
        assert [line for line in log.splitlines() if line.endswith("does not end: killed")]
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    finally:
        if serving.poll() is None:
            for pid in children_of(serving.pid):
                os.kill(pid, signal.SIGKILL)
            serving.kill()
            serving.communicate()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_server_listens_for_signals_ends_it_in_good_order(
    start: str, number: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", EARLY + start, str(int(number)), str(tmp_path / "memory.sqlite")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("listening on")
