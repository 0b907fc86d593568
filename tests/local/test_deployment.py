"""The commands of compose file and units run as they stand: own logins, secrets as files, health checks."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

from app.local.processes import free_port
from db.embedded.accounts import SystemAccount
from db.embedded.binaries import find_binaries
from db.embedded.processes import die_with_parent
from db.embedded.server import PORT, EmbeddedServer
from tests.support.deployment import BIN, DEPLOY, compose_services, unit_setting, unit_settings
from tests.support.http_client import Connection
from tests.support.sandbox_process import SandboxProcess, eventually

LOGINS = ("deploy", "api", "webhook", "worker", "analyst", "auditor")
PASSWORDS_ONLY = "local all,replication postgres trust\nlocal all all scram-sha-256\n"
SUPERUSER_RIGHTS = "rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls"


class Deployment(NamedTuple):
    """A server with the logins of create-logins.sql, and the folder of their secrets."""

    server: EmbeddedServer
    secrets: Path

    def url(self, login: str) -> str:
        """The address of a login, from its file."""
        return (self.secrets / f"{login}-database-url").read_text().strip()


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A new server, where passwords are asked for."""
    with EmbeddedServer() as server:
        assert server.folder
        secrets = server.folder / "secrets"
        make_secrets(server, secrets)
        (server.data / "pg_hba.conf").write_text(PASSWORDS_ONLY)
        with psycopg.connect(server.url, autocommit=True) as conn:
            conn.execute("select pg_reload_conf()")
        for _ in range(2):
            create_logins(server, secrets)
        yield Deployment(server, secrets)


def make_secrets(server: EmbeddedServer, secrets: Path) -> None:
    """Run make-secrets.sh; again it changes nothing."""
    host = f"{quote(str(server.socket_folder), safe='')}:{PORT}"
    user = str(user_of_processes() or os.getuid())
    subprocess.run([str(DEPLOY / "make-secrets.sh"), str(secrets), host, user], check=True, timeout=60)


def create_logins(server: EmbeddedServer, secrets: Path) -> None:
    """Run create-logins.sql as a superuser; again it changes nothing."""
    command = [find_binaries()["psql"], "--no-psqlrc", "--file", str(DEPLOY / "create-logins.sql"), server.url]
    known = {"PATH": os.environ["PATH"], "SURETY_SECRETS": str(secrets)}
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def user_of_processes() -> int | None:
    """The user that runs the processes: an unprivileged one where the tests' own is root, and where it can run them."""
    account = SystemAccount.for_servers()
    interpreter = (BIN / "python").resolve()
    return account.uid if account.uid is not None and account.can_enter(interpreter) else None


def run(deployment: Deployment, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command line of deploy/ with its secrets' files in the place of their mounts."""
    program, *arguments = command
    known = {name: value.replace("/run/secrets", str(deployment.secrets)) for name, value in environment.items()}
    return subprocess.Popen(
        [str(BIN / Path(program).name), *arguments],
        env={"PATH": os.environ["PATH"]} | known,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=user_of_processes(),
        cwd=DEPLOY.parent if user_of_processes() is None else "/",
        preexec_fn=die_with_parent(),  # noqa: PLW1509  it calls nothing that another thread could have locked
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@contextmanager
def running(process: subprocess.Popen[str]) -> Generator[subprocess.Popen[str]]:
    """A process that is asked to stop in the end, and does so in good order."""
    try:
        yield process
    finally:
        process.terminate()
        status, output = finish(process)
    assert status == 0, output


def composed(name: str, **more: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service of the compose file; variables without a value are not set."""
    service = compose_services()[name]
    return service["command"], {key: value for key, value in service["environment"].items() if value} | more


def in_unit(name: str, **more: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a unit; its credentials are in the folder of the secrets, by their files' names."""
    unit = DEPLOY / name
    files = {
        key: Path(path).name for key, _, path in (line.partition(":") for line in unit_settings(unit, "LoadCredential"))
    }
    environment = {}
    for line in unit_settings(unit, "Environment"):
        variable, _, value = line.partition("=")
        environment[variable] = f"/run/secrets/{files[value.removeprefix('%d/')]}"
    command = shlex.split(unit_setting(unit, "ExecStart").replace("%H-%i", "machine-1"))
    return command, environment | more


Describe = Callable[..., tuple[list[str], dict[str, str]]]
ARTEFACTS: dict[str, dict[str, tuple[Describe, str]]] = {
    "compose file": {name: (composed, name) for name in ("deploy", "api", "webhooks", "worker")},
    "units": {
        name: (in_unit, f"surety-{name}{'@' if name == 'worker' else ''}.service")
        for name in ("deploy", "api", "webhooks", "worker")
    },
}


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_every_process_runs_by_its_own_login_and_becomes_healthy(
    deployment: Deployment, artefact: str, tmp_path: Path
) -> None:
    processes = ARTEFACTS[artefact]
    describe, name = processes["deploy"]
    status, output = finish(run(deployment, *describe(name)))
    assert status == 0, output
    ports = {"api": free_port(0), "webhooks": free_port(0)}
    sandbox = SandboxProcess(tmp_path)
    settings = {
        "SURETY_API_PORT": str(ports["api"]),
        "SURETY_WEBHOOK_PORT": str(ports["webhooks"]),
        "SURETY_SANDBOX_URL": sandbox.url,
        "SURETY_POLL_SECONDS": "1",
    }
    with ExitStack() as stack:
        stack.callback(sandbox.stop)
        for process in ("api", "webhooks", "worker"):
            describe, name = processes[process]
            command, environment = describe(name, **settings)
            check = compose_services()[process]["healthcheck"]["test"][1:]
            if process != "worker":
                assert finish(run(deployment, check, environment))[0] == 1, "nothing runs yet"
            stack.enter_context(running(run(deployment, command, environment)))
            eventually(lambda: finish(run(deployment, check, environment)) == (0, f"{process} is healthy\n"), 30)  # noqa: B023
        with connect(deployment, "deploy") as conn:
            eventually(lambda: conn.execute("select from procrastinate.procrastinate_workers").fetchall(), 30)
            used = conn.execute("select distinct usename from pg_stat_activity where datname = 'surety'").fetchall()
        assert {name for (name,) in used} >= {"login_deploy", "login_api", "login_webhook", "login_worker"}


def connect(deployment: Deployment, login: str) -> Connection:
    return psycopg.connect(deployment.url(login), autocommit=True)


def test_logins_have_no_rights_of_a_superuser_and_only_their_roles(deployment: Deployment) -> None:
    with psycopg.connect(deployment.server.url, autocommit=True) as conn:
        strong = conn.execute(
            f"select rolname from pg_roles where rolname ~ '^(login|surety)_' and ({SUPERUSER_RIGHTS})"
        ).fetchall()
        roles = conn.execute(
            "select m.rolname, array_agg(r.rolname::text order by r.rolname) from pg_auth_members as a"
            " join pg_roles as r on r.oid = a.roleid join pg_roles as m on m.oid = a.member"
            " where m.rolname ~ '^login_' and m.rolname <> 'login_deploy' group by m.rolname"
        ).fetchall()
        [(stored,)] = conn.execute(
            "select bool_and(rolpassword like 'SCRAM%') from pg_authid where rolname ~ '^login_'"
        )
    assert strong == [] and stored
    assert dict(roles) == {f"login_{name}": [f"surety_{name}"] for name in LOGINS if name != "deploy"}
    log = deployment.server.log.read_text()
    assert not [login for login in LOGINS if str(conninfo_to_dict(deployment.url(login))["password"]) in log]


@pytest.mark.parametrize("login", [name for name in LOGINS if name != "deploy"])
def test_login_reaches_no_table_and_no_other_role(deployment: Deployment, login: str) -> None:
    with connect(deployment, login) as conn:
        for statement in (
            "select from surety.payments",
            "create table mine ()",
            "create temporary table mine ()",
            "set role surety_owner",
            "create role other",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                conn.execute(statement.encode())


def test_wrong_password_is_refused_and_a_secret_stays_as_it_is(deployment: Deployment) -> None:
    before = deployment.url("api")
    make_secrets(deployment.server, deployment.secrets)
    assert deployment.url("api") == before
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(before, password="another")


def test_backup_unit_makes_a_verified_base_backup(deployment: Deployment, tmp_path: Path) -> None:
    programs = find_binaries()
    if not Path(programs["pg_verifybackup"]).exists():
        pytest.skip("pg_verifybackup is not installed here")
    command = shlex.split(
        unit_setting(DEPLOY / "surety-backup.service", "ExecStart").replace("%%", "%").replace("$$", "$")
    )
    known = {
        "PATH": f"{programs.bin}:{os.environ['PATH']}",
        "BACKUPS": str(tmp_path),
        "PGHOST": str(deployment.server.socket_folder),
        "PGUSER": "postgres",
    }
    subprocess.run(command, env=known, check=True, timeout=120)
    [backup] = tmp_path.iterdir()
    assert backup.name.startswith("base-20") and (backup / "backup_manifest").exists()


@pytest.mark.parametrize(
    ("host", "address"),
    [("db", "db"), ("db:5433", "db:5433"), ("::1", "[::1]"), ("[::1]:5432", "[::1]:5432"), ("db x", None), ("", None)],
)
def test_secrets_name_the_host_as_an_address_needs_it(tmp_path: Path, host: str, address: str | None) -> None:
    kept = tmp_path / "api-database-url"
    kept.touch()
    command = [str(DEPLOY / "make-secrets.sh"), str(tmp_path), host, str(os.getuid())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) == (address is not None), done.stderr
    if address is None:
        assert "HOST" in done.stderr
    else:
        assert kept.read_text().endswith(f"@{address}/surety\n"), "an empty file of an interrupted run is written"
    assert not list(tmp_path.glob("*.part"))
