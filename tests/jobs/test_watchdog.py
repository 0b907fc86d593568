"""A worker that has stopped working ends itself, and says why."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from db.connect import conninfo
from db.settings import Settings
from jobs.watchdog import EXIT_STALLED
from tests.support.payments import Connection
from tests.support.sandbox_process import eventually
from tests.support.workers import ROOT, in_process_worker, shorten_delays, wait_for_worker, worker_process

NOWHERE = "http://127.0.0.1:9"


def test_worker_with_a_blocked_event_loop_exits_with_a_message(
    conn: Connection, database: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shorten_delays(conn)
    with worker_process(database, NOWHERE, app="tests.support.stalled_worker.app", SURETY_STALL_SECONDS="1") as worker:
        wait_for_worker(conn)
        with conn.transaction():
            conn.execute("set local search_path = procrastinate")
            conn.execute("insert into procrastinate_jobs (queue_name, task_name) values ('outbox', 'block')")
        assert worker.wait(30) == EXIT_STALLED
    result = capfd.readouterr().err
    assert "its event loop has not turned for 1 s" in result
    assert "in block" in result, "its stack"


def test_worker_continues_after_system_sleep(conn: Connection, database: str) -> None:
    beats = "select count(*) from procrastinate.procrastinate_workers"
    with worker_process(database, NOWHERE, SURETY_STALL_SECONDS="1") as worker:
        wait_for_worker(conn)
        stopped = Path(f"/proc/{worker.pid}/stat")
        worker.send_signal(signal.SIGSTOP)
        eventually(lambda: stopped.read_text().rpartition(")")[2].split()[0] == "T")
        conn.execute("select pg_sleep(1.5)")
        worker.send_signal(signal.SIGCONT)
        conn.execute("select pg_sleep(1.5)")
        assert worker.poll() is None
        assert conn.execute(beats).fetchone() == (1,)


WATCHED = """
import sys, time
from jobs.watchdog import Watchdog
dog = Watchdog(sys.argv[1], 1.0)
dog.start()
while True:
    dog.loop_turned()
    time.sleep(0.05)
"""


def test_worker_cut_from_a_serving_database_exits(settings: Settings) -> None:
    command = [sys.executable, "-c", WATCHED, conninfo("worker", settings)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == EXIT_STALLED
    assert "the database answers new connections, but not this process" in ended.stderr


def test_worker_does_not_exit_when_the_database_is_down() -> None:
    command = [sys.executable, "-c", WATCHED, "host=127.0.0.1 port=9"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=4, check=False)


async def test_reports_of_checked_accounts_show_that_the_database_answers(
    database: str,
) -> None:
    async with in_process_worker(database, NOWHERE, judged=False) as worker:
        circuit_breaker = worker.circuit_breaker
        assert await circuit_breaker.report_and_probe(), "the first report is due"
        for _ in range(3):
            await circuit_breaker.check_accounts([("", time.monotonic())])
            assert await circuit_breaker.report_and_probe()


def test_failed_watchdog_ends_its_worker() -> None:
    broken = WATCHED.replace("dog.start()", "dog.start(); dog._patience_seconds = None")
    ended = subprocess.run(
        [sys.executable, "-c", broken, ""], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == EXIT_STALLED
    assert "the watchdog failed" in ended.stderr
