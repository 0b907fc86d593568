"""The benchmarks' server and databases, and the arithmetic and output of their results."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.folders import OWNER_FILE, lock_folder, stop_abandoned_server
from db.embedded.server import EmbeddedServer
from db.errors import EmbeddedServerError

Connection = psycopg.Connection[tuple[Any, ...]]
Results = dict[str, Any]

PREFIX = "surety_bench"
DISK_FOLDER = Path("/var/tmp")  # noqa: S108  folders in it are made by mkdtemp
ROOT = Path(__file__).parent.parent.parent

# Commits wait for the log as in production. Vacuum and checkpoints run between measurements, so that none of them pays
# for another's leftovers.
SERVER_SETTINGS = {
    "shared_buffers": "512MB",
    "min_wal_size": "1GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
}


@contextlib.contextmanager
def server(*, on_disk: bool = False) -> Generator[str]:
    """The address of a server, by a superuser: DATABASE_URL's, else an embedded one whose commits are durable.

    `on_disk` puts its data on a disk instead of the folder for temporary files, which may be in memory.
    """
    if given := os.environ.get("DATABASE_URL"):
        yield given
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(DISK_FOLDER)) / "server" if on_disk else None
        yield stack.enter_context(EmbeddedServer(folder, durable=True, settings=SERVER_SETTINGS)).url


@contextlib.contextmanager
def warm_server(megabytes: int, *, on_disk: bool = False) -> Generator[str]:
    """The address of a server that has used this much of its memory and log."""
    with server(on_disk=on_disk) as url:
        with temporary_database(url, PREFIX) as database, connection(database) as conn:
            touch_memory_and_log(conn, megabytes)
        yield url


@contextlib.contextmanager
def scratch_folder(base: Path) -> Generator[Path]:
    """A folder that is removed at the end, or by a later run if this one is killed."""
    for mark in base.glob(f"{PREFIX}-*/{OWNER_FILE}"):
        with contextlib.suppress(OSError, EmbeddedServerError):
            remove_scratch_folder(mark.parent, lock_folder(mark.parent))
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-", dir=base))
    folder.chmod(0o711)
    lock = lock_folder(folder)
    try:
        yield folder
    finally:
        remove_scratch_folder(folder, lock)


def remove_scratch_folder(folder: Path, lock: int) -> None:
    """Remove a locked folder; a server whose owner was killed still runs in it."""
    stop_abandoned_server(folder / "server" / "data")
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


@contextlib.contextmanager
def deployed_database(server_url: str) -> Generator[str]:
    """The address of a temporary database with everything deployed, without rate limits."""
    with temporary_database(server_url, PREFIX) as url:
        deploy(url, say=log_progress)
        with connection(url) as conn:
            set_rate_limits(conn, 0, 0)
        yield url


@contextlib.contextmanager
def copied_database(server_url: str, url: str) -> Generator[str]:
    """The address of a copy of a database without connections."""
    name = conninfo_to_dict(url)["dbname"]
    with temporary_database(server_url, PREFIX, template=str(name)) as copy:
        yield copy


@contextlib.contextmanager
def connection(url: str) -> Generator[Connection]:
    """A connection in autocommit mode, with all rights."""
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        yield conn


def set_rate_limits(conn: Connection, requests_per_second: int, burst: int) -> None:
    """Set the limits of all keys and merchants; 0: none. Processes that run know them after a second."""
    for subject in ("keys", "merchants"):
        conn.execute("select surety.set_rate_limit(%s, %s, %s)", (subject, requests_per_second, burst))


def touch_memory_and_log(conn: Connection, megabytes: int) -> None:
    """Use this much of the server's memory and log once, as a server has that ran for a while.

    On a virtual machine the first use of a page costs more than the write.
    """
    conn.execute("create table public.filler (t text)")
    conn.execute("insert into public.filler select repeat('x', 1900) from generate_series(1, %s)", (megabytes * 520,))
    conn.execute("drop table public.filler")
    conn.execute("checkpoint")


def log_progress(message: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr, flush=True)


def print_results(results: Results, *, as_json: bool) -> None:
    """Print the results, as one line of JSON or as a table."""
    if as_json:
        print(json.dumps(results), flush=True)
        return
    for name, value in results.items():
        print(f"{name:28} {value}")


def median(values: Sequence[float], digits: int = 3) -> float:
    """The median of several rounds, rounded."""
    return round(statistics.median(values), digits)


def median_results(results: Sequence[Results]) -> Results:
    """The median of each number in the results of several rounds; any other value is that of the first round."""
    medians: Results = {}
    for name, value in results[0].items():
        values = [each[name] for each in results]
        match value:
            case dict():
                medians[name] = median_results(values)
            case float():
                medians[name] = median(values)
            case _:
                medians[name] = value
    return medians


def median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of the rounds' ratios: other load on the machine disturbs both measurements of a round alike."""
    return median([this / that for this, that in zip(these, those, strict=True)])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share (0 to 1) of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def round_all(rounds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Every round's measurement, which shows the variance."""
    return {name: [round(value, 1) for value in values] for name, values in rounds.items()}
