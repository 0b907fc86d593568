"""The embedded server: started, halted, resumed, stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

from db.embedded.accounts import SystemAccount
from db.embedded.binaries import Binaries, find_binaries
from db.embedded.folders import (
    FOLDER_PREFIX,
    MEMORY_FOLDER,
    STOP_SECONDS_MAX,
    lock_folder,
    remove_abandoned_folders,
    stop_abandoned_server,
    temporary_base_folder,
)
from db.embedded.processes import die_with_parent, wait_until
from db.errors import EmbeddedServerError

StopMode = Literal["smart", "fast", "immediate"]

SUPERUSER = "postgres"
PORT = 5432
START_SECONDS_MAX = 60.0
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
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


class EmbeddedServer:
    """An embedded PostgreSQL.

    `folder` keeps the data there for the next time; without it they are removed at the end. `durable` makes commits
    survive a crash of the machine (they survive a kill of the server anyway); by default only if `folder` is given.
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
            self._create_data_folder(account, installed)
        stop_abandoned_server(self.data)
        self._launched_with = account, installed
        self._spawn(account, installed)

    def _create_data_folder(self, account: SystemAccount, installed: Binaries) -> None:
        self._run_as(account, [
            installed["initdb"], "-D", str(self.data), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C",
            "--no-instructions", *([] if self.durable else ["--no-sync"]),
        ])  # fmt: skip

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
        """Stop the server and remove its temporary folders."""
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
        """Whether the last line of the lock file says ready, as pg_ctl checks."""
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
