"""Another revision's own `lifecycle`, run from a worktree with an environment of its own.

A revision whose benchmark doesn't report costs is measured from outside, during the second of two rounds: the first
warms it up. The benchmark prints a line after each round. The processes are recognized by their commands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from db.embedded.databases import with_database
from db.embedded.processes import die_with_parent
from tests.bench.costs import median_costs, read_counters, server_pids
from tests.bench.cpu_time import command_of, peak_rss_mb, process_tree, read_processes
from tests.bench.databases import PREFIX, ROOT, Connection, Results, connection, log_progress, scratch_folder

COMMANDS = {
    "workers": r" -m procrastinate .*worker",
    "api": r" -m app\.cli api ",
    "receiver": r" -m app\.cli webhooks ",
    "sandbox": r" -m app\.sandbox ",
}
STOP_SECONDS_MAX = 20.0


@contextmanager
def checked_out(revision: str) -> Generator[Path]:
    """The folder of a worktree at a revision, with its environment in `.venv`; removed at the end."""
    if shutil.which("uv") is None:
        raise click.ClickException("--against needs uv, which installs the other revision")
    with scratch_folder(Path(tempfile.gettempdir())) as scratch:
        folder = scratch / "revision"
        git("worktree", "prune")
        git("worktree", "add", "--quiet", "--detach", str(folder), revision)
        try:
            environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
            subprocess.run(["uv", "sync", "--quiet"], cwd=folder, env=environment, check=True)
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> None:
    """Run git in this repository. Raises CalledProcessError."""
    subprocess.run(["git", *arguments], cwd=ROOT, check=True)


@dataclass(slots=True)
class OtherRevision:
    """A revision's `lifecycle` on a server of its own."""

    folder: Path
    server_url: str
    reports_costs: bool = False

    def __post_init__(self) -> None:
        usage = subprocess.run(self.command("--help"), cwd=self.folder, capture_output=True, text=True, check=True)
        self.reports_costs = "--warm-mb" in usage.stdout

    def command(self, *options: str) -> list[str]:
        """The command line of its benchmark."""
        return [str(self.folder / ".venv/bin/python"), "-m", "tests.bench", "lifecycle", *options]

    def measure(
        self, *, payments: int, slow_payments: int, merchants: int, workers: int, idle_payments: int
    ) -> Results:
        """Its results for one round; of `slow_payments`, if it has to be measured from outside."""
        rounds = 1 if self.reports_costs else 2
        if not self.reports_costs:
            payments, idle_payments = slow_payments, max(1, idle_payments)
        options = [f"--payments={payments}", f"--merchants={merchants}", f"--workers={workers}"]
        options += [f"--idle-payments={idle_payments}", f"--rounds={rounds}", "--json"]
        options += ["--warm-mb=1"] if self.reports_costs else []
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        process = subprocess.Popen(
            self.command(*options), cwd=self.folder, env=environment | {"DATABASE_URL": self.server_url},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  it calls nothing that another thread could have locked
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            sampled = self.follow(process.pid, process.stderr, payments)
            output = process.stdout.read()
            assert process.wait() == 0, "the other revision's benchmark failed"
        finally:
            stop(process)
        results: Results = json.loads(output.splitlines()[-1])
        return results | sampled | {"payments_per_second": results["rounds"][-1]}

    def follow(self, pid: int, lines: IO[str], payments: int) -> Results:
        """Repeat its output until its end; returns the costs of its second round, unless it reports them itself."""
        sampled: Results = {}
        with ExitStack() as stack:
            sampler = None
            for line in lines:
                log_progress(f"    {line.rstrip()}")
                if self.reports_costs or not re.search(r" round \d+:", line):
                    continue
                if sampler is None:
                    sampler = Sampler(stack.enter_context(connection(self.find_database())), pid)
                else:
                    sampled = sampler.finish(payments)
                    stack.close()
        return sampled

    def find_database(self) -> str:
        """The address of the database that its benchmark uses at present."""
        with connection(self.server_url) as conn:
            row = conn.execute("select datname from pg_database where starts_with(datname, %s)", (PREFIX,)).fetchone()
        assert row is not None
        return with_database(self.server_url, row[0])


class Sampler:
    """The counters of a benchmark that runs in another process, from now until the end of its round.

    The server process of the benchmark's own queries is counted by itself, as `waiting`.
    """

    def __init__(self, conn: Connection, pid: int) -> None:
        self.conn = conn
        conn.execute("vacuum (analyze)")
        tree = process_tree(read_processes(), pid)
        self.pids = {
            group: [each for each in tree if re.search(pattern, command_of(each))]
            for group, pattern in COMMANDS.items()
        }
        waiting = conn.execute(
            "select pid from pg_stat_activity"
            " where datname = current_database() and application_name = 'surety-deploy' and pid <> pg_backend_pid()"
        )
        self.pids |= {"postgres": server_pids(conn), "waiting": [row[0] for row in waiting], "client": [pid]}
        self.before = read_counters(conn, self.pids)

    def finish(self, payments: int) -> Results:
        """The costs since the beginning."""
        costs = self.before.costs_until(read_counters(self.conn, self.pids), payments)
        costs.cpu_ms["postgres"] -= costs.cpu_ms["waiting"]
        peaks = {"worker": peak_rss_mb(self.pids["workers"]), "api": peak_rss_mb(self.pids["api"])}
        return median_costs([costs]) | {"peak_rss_mb": peaks}


def stop(process: subprocess.Popen[str]) -> None:
    """End a benchmark early, so that it cleans up."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS_MAX)
        process.kill()
    process.wait()
