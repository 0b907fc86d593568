"""The real PgBouncer in front of a server, on a port of loopback, as the account that runs servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from app.local.processes import free_port, is_listening
from db.embedded.accounts import SystemAccount
from db.embedded.processes import die_with_parent, wait_until

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
START_SECONDS_MAX = 30.0

PoolMode = Literal["session", "transaction"]

needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed")


@contextmanager
def running_pgbouncer(
    database: str, pool_mode: PoolMode, *users: str, ignored: str = "options", **settings: str | int
) -> Generator[str]:
    """The address of a database through a PgBouncer of its own, for the user of `database` and others.

    `ignored` are the start-up parameters that it ignores.
    """
    target, account = conninfo_to_dict(database), SystemAccount.for_servers()
    folder, port = Path(tempfile.mkdtemp(prefix="pgbouncer-")), free_port(0)
    account.own_folder(folder)
    lines = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "trust",
        "auth_file": folder / "users.txt",
        "pool_mode": pool_mode,
        "ignore_startup_parameters": ignored,
        "default_pool_size": 50,
        **settings,
    }
    logins = {str(target["user"]): str(target.get("password") or ""), **dict.fromkeys(users, "")}
    entries = "".join(f'"{name}" "{password}"\n' for name, password in logins.items())
    (folder / "users.txt").write_text(entries, encoding="utf-8")
    server = f"host={target['host']} port={target.get('port') or 5432}"
    configured = "\n".join(f"{name} = {value}" for name, value in lines.items())
    (folder / "pgbouncer.ini").write_text(f"[databases]\n* = {server}\n[pgbouncer]\n{configured}\n", encoding="utf-8")
    assert PROGRAM is not None
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, str(folder / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent(),  # noqa: PLW1509  it calls nothing that another thread could have locked
            cwd="/",
            env={"PATH": os.defpath},
            user=account.uid,
            group=account.gid,
            extra_groups=account.groups,
        )
    try:
        wait_until(lambda: process.poll() is not None or is_listening(port), START_SECONDS_MAX)
        assert process.poll() is None, (folder / "log").read_text()
        yield make_conninfo(database, host="127.0.0.1", port=port)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)
