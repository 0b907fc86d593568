"""A primary with a synchronous standby, two real servers; the standby can be lost, return, and take over."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import psycopg

from db.embedded.accounts import SystemAccount
from db.embedded.binaries import Binaries
from db.embedded.server import PORT, SUPERUSER, EmbeddedServer
from tests.support.http_client import Connection, connect_as_owner
from tests.support.sandbox_process import eventually

STANDBY = "standby_1"


class StandbyServer(EmbeddedServer):
    """A standby of another embedded server, which follows it over a Unix socket."""

    def __init__(self, primary: EmbeddedServer) -> None:
        self.primary_address = f"host={primary.socket_folder} port={PORT} user={SUPERUSER} application_name={STANDBY}"
        super().__init__(durable=True, settings={"primary_conninfo": self.primary_address})

    def _create_data_folder(self, account: SystemAccount, installed: Binaries) -> None:
        self._run_as(
            account,
            [installed["pg_basebackup"], "-D", str(self.data), "-d", self.primary_address, "-R", "-c", "fast"],
        )


class ReplicatedServers:
    """The primary, its standby, and a connection to the primary that only reads."""

    def __init__(self, primary: EmbeddedServer, standby: StandbyServer, conn: Connection) -> None:
        self.primary = primary
        self.standby = standby
        self.conn = conn

    @contextmanager
    def without_standby(self) -> Generator[None]:
        """Commits wait in this block. In the end the standby is back, and catches up."""
        self.standby.halt("immediate")
        try:
            yield
        finally:
            self.standby.resume()

    def fail_over(self) -> None:
        """The primary is lost as it is, and the standby takes its place."""
        self.primary.halt("immediate")
        with psycopg.connect(self.standby.url, autocommit=True) as conn:
            conn.execute("select pg_promote()")

    def catch_up(self) -> None:
        """Wait until the standby has replayed what the primary has written so far."""
        [(position,)] = self.conn.execute("select pg_current_wal_flush_lsn()").fetchall()
        with connect_as_owner(f"{self.standby.url}&target_session_attrs=any") as conn:
            replayed = "select pg_last_wal_replay_lsn() >= %s"
            eventually(lambda: conn.execute(replayed, (position,)).fetchone() == (True,), 30)

    def waiting_sessions(self) -> list[int]:
        """The sessions whose commit waits for the standby."""
        waiting = "select pid from pg_stat_activity where wait_event = 'SyncRep' order by pid"
        return [pid for (pid,) in self.conn.execute(waiting)]

    def is_synchronous(self) -> bool:
        """Whether the standby is present and commits wait for it."""
        present = "select from pg_stat_replication where sync_state = 'sync'"
        return self.conn.execute(present).fetchone() is not None


@contextmanager
def replicated_servers(primary: EmbeddedServer) -> Generator[ReplicatedServers]:
    """A running, durable server with a synchronous standby beside it, which ends with this block."""
    with StandbyServer(primary) as standby, connect_as_owner(primary.url) as conn:
        conn.execute(f"alter system set synchronous_standby_names = '{STANDBY}'")
        conn.execute("select pg_reload_conf()")
        servers = ReplicatedServers(primary, standby, conn)
        eventually(servers.is_synchronous, 30)
        yield servers
