"""etcd, and two PostgreSQL servers with a Patroni each. All end with their parent."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg

from app.local.processes import free_port, is_listening
from db.embedded.accounts import SystemAccount
from db.embedded.binaries import Binaries, find_binaries
from db.embedded.folders import FOLDER_PREFIX, lock_folder, remove_abandoned_folders, temporary_base_folder
from db.embedded.processes import die_with_parent, server_pid, wait_until
from db.embedded.server import SUPERUSER
from tests.crash.processes import PORTS
from tests.failover.programs import find_etcd, install_patroni
from tests.support.postgres_proxy import KEEPALIVE_SECONDS, PostgresProxy

SCOPE = "surety"
NODES = ("node-1", "node-2")
READY_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 30.0
POLL_SECONDS = 0.2

# The shortest time to live that Patroni takes. loop_wait + 2 * retry_timeout may not exceed it.
PATRONI_SETTINGS = {"ttl": 20, "loop_wait": 5, "retry_timeout": 5, "synchronous_mode": True}
# A cut link is noticed after these, a minute by default.
POSTGRESQL_SETTINGS = {"wal_sender_timeout": "10s", "wal_receiver_timeout": "10s", "max_connections": 200}

Process = subprocess.Popen[bytes]


class ClusterError(Exception):
    """The cluster did not reach a state in time; the text says which, and what was seen."""


class Launcher:
    """Starts programs as the account that may run PostgreSQL, each with a log of its own."""

    def __init__(self, logs: Path) -> None:
        self.account = SystemAccount.for_servers()
        self._logs = logs
        self._folders: list[tuple[Path, int]] = []

    def folder(self) -> Path:
        """A folder of the account. A later run removes it, and ends a server on its `data`, if this run is killed."""
        path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=temporary_base_folder()))
        self._folders.append((path, lock_folder(path)))
        self.account.own_folder(path)
        return path

    def start(self, name: str, command: list[str], home: Path) -> Process:
        """Start a program."""
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509  it calls nothing that locks
                cwd=home,
                env={"PATH": os.defpath, "HOME": str(home), "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                user=self.account.uid,
                group=self.account.gid,
                extra_groups=self.account.groups,
            )

    def remove_folders(self) -> None:
        """Remove all folders."""
        while self._folders:
            path, lock = self._folders.pop()
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


class Node:
    """A server and its Patroni. The other server replicates from it through `link`, which can be cut."""

    def __init__(self, name: str, launcher: Launcher, patroni: list[str], installed: Binaries) -> None:
        self.name = name
        self.folder = launcher.folder()
        self.port = unused_port()
        self.api = f"127.0.0.1:{unused_port()}"
        self.link = PostgresProxy(f"host=127.0.0.1 port={self.port}", reset_seconds=KEEPALIVE_SECONDS)
        self.process: Process | None = None
        self._launcher, self._patroni, self._installed = launcher, patroni, installed

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    def write_settings(self, etcd: str, passwords: dict[str, str], cluster_settings: dict[str, Any]) -> None:
        """Write Patroni's settings."""
        logins = {
            "superuser": {"username": SUPERUSER, "password": passwords["superuser"]},
            "replication": {"username": "replicator", "password": passwords["replication"]},
        }
        host_rules = [f"host {which} all 127.0.0.1/32 scram-sha-256" for which in ("all", "replication")]
        settings = {
            "scope": SCOPE,
            "name": self.name,
            "etcd3": {"host": etcd},
            "restapi": {"listen": self.api, "connect_address": self.api},
            "bootstrap": {
                "dcs": cluster_settings,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, {"auth": "trust"}, "data-checksums"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.link.port}",
                "data_dir": str(self.data),
                "bin_dir": str(self._installed.bin),
                "pgpass": str(self.folder / "pgpass"),
                "use_unix_socket": True,
                "authentication": logins,
                "pg_hba": ["local all all trust", "local replication all trust", *host_rules],
                "parameters": {"unix_socket_directories": str(self.folder), "timezone": "UTC"},
            },
        }
        (self.folder / "patroni.yml").write_text(json.dumps(settings), encoding="utf-8")

    def start(self) -> None:
        """Start Patroni, which starts the server, and makes its data where there are none."""
        command = [*self._patroni, str(self.folder / "patroni.yml")]
        self.process = self._launcher.start(self.name, command, self.folder)

    def kill(self) -> None:
        """Kill Patroni, which would restart the server, then the server's first process."""
        assert self.process is not None
        server = server_pid(self.data)
        self.process.kill()
        if server is not None:
            os.kill(server, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End Patroni, which ends the server, or else both."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS_MAX)
            self.process.kill()
            self.process.wait()
        if (server := server_pid(self.data)) is not None:
            os.kill(server, signal.SIGQUIT)
            wait_until(lambda: server_pid(self.data) is None, STOP_SECONDS_MAX)
        self.link.close()


class PatroniCluster:
    """Two nodes and one etcd, on ports of loopback of their own."""

    def __init__(self, logs: Path, *, strict: bool = False) -> None:
        remove_abandoned_folders()
        self.is_strict = strict
        self._launcher = Launcher(logs)
        self._etcd_process: Process | None = None
        self._passwords = {login: secrets.token_hex(16) for login in ("superuser", "replication")}
        self._settings = {
            **PATRONI_SETTINGS,
            "synchronous_mode_strict": strict,
            "postgresql": {"use_pg_rewind": True, "parameters": POSTGRESQL_SETTINGS},
        }
        programs = find_etcd(), install_patroni(self._launcher.folder(), self._launcher.account)
        self._etcd, patroni = programs
        installed = find_binaries()
        if not self._launcher.account.can_enter(installed.bin / "postgres"):
            copies = self._launcher.folder()
            copies.chmod(0o755)
            installed = installed.copied_to(copies)
        self.nodes = {name: Node(name, self._launcher, patroni, installed) for name in NODES}

    def url(self, *first_ports: int) -> str:
        """The address of both servers, behind other ports of loopback."""
        ports = [*first_ports, *(node.port for node in self.nodes.values())]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"postgresql://{SUPERUSER}:{self._passwords['superuser']}@{hosts}/postgres"

    def connect_to(self, node: Node) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection as superuser to one server, over its Unix socket."""
        address = f"host={node.folder} port={node.port} user={SUPERUSER} dbname=postgres"
        return psycopg.connect(address, autocommit=True)

    def start(self) -> None:
        """Start everything; returns once the second server is a synchronous standby."""
        home, client, peer = self._launcher.folder(), unused_port(), unused_port()
        peer_url, client_url = f"http://127.0.0.1:{peer}", f"http://127.0.0.1:{client}"
        self._etcd_process = self._launcher.start("etcd", [
            self._etcd, "--name", SCOPE, "--data-dir", str(home / "etcd"),
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", f"{SCOPE}={peer_url}",
        ], home)  # fmt: skip
        self._wait("etcd listens", lambda: is_listening(client))
        for node in self.nodes.values():
            node.write_settings(f"127.0.0.1:{client}", self._passwords, self._settings)
            node.start()
            self._wait("there is a primary", lambda: self.primary is not None)
        self.wait_until_synchronous()

    def wait_until_synchronous(self) -> None:
        """Return once one server is the primary and the other its synchronous standby."""
        self._wait("there is a synchronous standby", self._is_synchronous)

    @property
    def primary(self) -> Node | None:
        """The node that Patroni names as the primary, if it runs."""
        named = [member["name"] for member in self._members() if member["role"] == "leader"]
        return self.nodes[named[0]] if named else None

    def require_primary(self) -> Node:
        """The node that is the primary now."""
        self._wait("there is a primary", lambda: self.primary is not None)
        node = self.primary
        assert node is not None
        return node

    def switch_over(self) -> None:
        """Make the standby the primary."""
        leader = self.require_primary()
        [candidate] = [name for name in self.nodes if name != leader.name]
        asked = {"leader": leader.name, "candidate": candidate}
        answer = httpx.post(f"http://{leader.api}/switchover", json=asked, timeout=READY_SECONDS_MAX)
        if answer.status_code != 200:
            raise ClusterError(f"no switchover to {candidate}: {answer.status_code} {answer.text}")

    def cut_replication(self, *, is_cut: bool = True) -> None:
        """Cut the link between the servers, in silence, or mend it: connections that were cut stay silent."""
        for node in self.nodes.values():
            node.link.is_dead = is_cut

    def close(self) -> None:
        """End all processes, and remove their folders."""
        for node in reversed(self.nodes.values()):
            node.stop()
        if self._etcd_process is not None:
            self._etcd_process.kill()
            self._etcd_process.wait()
        self._launcher.remove_folders()

    def _is_synchronous(self) -> bool:
        states = {(member["role"], member["state"]) for member in self._members()}
        return states == {("leader", "running"), ("sync_standby", "streaming")}

    def _members(self) -> list[dict[str, Any]]:
        """The members as the first Patroni that answers sees them."""
        for node in self.nodes.values():
            with contextlib.suppress(httpx.TransportError):
                members: list[dict[str, Any]] = httpx.get(f"http://{node.api}/cluster", timeout=2).json()["members"]
                return members
        return []

    def _wait(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not is_so():
            if time.monotonic() > deadline:
                raise ClusterError(f"not within {READY_SECONDS_MAX:g} s: {what}; members: {self._members()}")
            time.sleep(POLL_SECONDS)


def unused_port() -> int:
    """A port below the ephemeral ones, which no client's own end can take."""
    return free_port(random.SystemRandom().choice(PORTS))
