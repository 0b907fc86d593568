"""`lifecycle --dbos`: the payments of dbos_payments.py, with as many processes as ours and the same sandbox.

DBOS is installed into a temporary folder that only its processes see.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from app.local.demo.sandbox_record import CHARGES_SUMMARY, read_sandbox
from db.embedded.databases import temporary_database
from tests.bench.databases import PREFIX, Connection, Results, connection, scratch_folder
from tests.bench.lifecycle import measure_rounds
from tests.bench.services import Services, running_sandbox

PACKAGES = ("dbos==3.4.0", "starlette==1.10.0")
SETTLED = "select workflow_uuid from dbos.workflow_status where workflow_uuid = any(%s) and status = 'SUCCESS'"
MODULE = ("-m", "tests.bench.dbos_payments")


@contextmanager
def installed_dbos() -> Generator[Path]:
    """A folder with DBOS and its dependencies, for PYTHONPATH; removed at the end."""
    if shutil.which("uv") is None:
        raise click.ClickException("--dbos needs uv, which installs DBOS")
    with scratch_folder(Path(tempfile.gettempdir())) as folder:
        packages = folder / "packages"
        command = ["uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", str(packages)]
        subprocess.run([*command, *PACKAGES], check=True)
        yield packages


def measure(
    server_url: str, packages: Path, *, payments: int, merchants: int, workers: int, idle_payments: int, rounds: int
) -> Results:
    """The results of some rounds, in a new database of a server. Single payments on an idle system are left out."""
    with ExitStack() as stack:
        url = stack.enter_context(temporary_database(server_url, PREFIX))
        conn = stack.enter_context(connection(url))
        services = stack.enter_context(running_dbos(conn, url, packages, workers))
        results = measure_rounds(conn, services, ["" for _ in range(merchants)], payments, rounds)
        assert read_sandbox(services.sandbox_url, CHARGES_SUMMARY)["double"] == []
    return results


@contextmanager
def running_dbos(conn: Connection, url: str, packages: Path, workers: int) -> Generator[Services]:
    """API, webhook receiver and workers. The first worker creates DBOS's tables."""
    with running_sandbox(url) as services:
        process_group, ports = services.process_group, services.ports
        process_group.environment |= {"PYTHONPATH": str(packages), "SANDBOX_URL": services.sandbox_url}
        for number in range(1, workers + 1):
            process_group.start(f"worker-{number}", *MODULE, "worker")
            process_group.wait_for(f"worker-{number}", lambda: has_queue(conn))
        for role in ("api", "webhooks"):
            process_group.start(role, *MODULE, role, str(ports[role]))
            process_group.wait_for_port(role, ports[role])
        yield Services(process_group, ports, SETTLED)


def has_queue(conn: Connection) -> bool:
    """Whether a worker has created the tables and registered the queue."""
    (table,) = conn.execute("select to_regclass('dbos.queues')").fetchone() or (None,)
    return table is not None and conn.execute("select from dbos.queues").fetchone() is not None
