"""A server that archives its log, base backups of it, and servers recovered from both to a point in time."""

from __future__ import annotations

import shutil
from pathlib import Path

import psycopg

from db.embedded.accounts import SystemAccount
from db.embedded.binaries import Binaries, find_binaries
from db.embedded.server import PORT, SUPERUSER, EmbeddedServer
from tests.support.sandbox_process import eventually


class ArchivingServer(EmbeddedServer):
    """A server with the settings of docs/backup.md. Archive and base backup are folders beside its data."""

    def __init__(self) -> None:
        super().__init__(
            durable=True,
            settings={
                "archive_mode": "on",
                "archive_command": "mkdir -p ../archive && test ! -f ../archive/%f && cp %p ../archive/%f",
            },
        )

    @property
    def archive(self) -> Path:
        assert self.folder
        return self.folder / "archive"

    @property
    def base_backup(self) -> Path:
        assert self.folder
        return self.folder / "base"

    def back_up(self) -> None:
        """Take the base backup, without the log: that comes from the archive."""
        address = f"host={self.socket_folder} port={PORT} user={SUPERUSER}"
        command = [find_binaries()["pg_basebackup"], "-D", str(self.base_backup), "-d", address, "-c", "fast"]
        self._run_as(SystemAccount.for_servers(), [*command, "--wal-method=none"])

    def archive_log(self) -> None:
        """Wait until everything that was committed is in the archive."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            [(last,)] = conn.execute("select pg_walfile_name(pg_switch_wal())").fetchall()
            eventually((self.archive / last).exists, 30)


class RecoveredServer(EmbeddedServer):
    """A server recovered from a base backup and an archive to a time, as docs/backup.md describes it."""

    def __init__(self, origin: ArchivingServer, until: str) -> None:
        super().__init__(
            durable=True,
            settings={
                "restore_command": f"cp {origin.archive}/%f %p",
                "recovery_target_time": until,
                "recovery_target_action": "promote",
            },
        )
        self.origin = origin

    def _create_data_folder(self, account: SystemAccount, installed: Binaries) -> None:
        shutil.copytree(self.origin.base_backup, self.data)
        (self.data / "recovery.signal").touch()
        for path in (self.data, *self.data.rglob("*")):
            if account.uid is not None and account.gid is not None:
                shutil.chown(path, account.uid, account.gid)

    def wait_until_recovered(self) -> None:
        """Wait until the server has reached the time and takes writes."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            eventually(lambda: conn.execute("select not pg_is_in_recovery()").fetchone() == (True,), 30)
