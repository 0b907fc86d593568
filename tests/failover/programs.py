"""The programs of the run that Surety does not need: etcd from the system, Patroni in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from db.embedded.accounts import SystemAccount
from db.errors import SuretyError

PATRONI = "patroni[etcd3,psycopg3]==4.1.5"


class MissingProgram(SuretyError):
    """A program is not installed; the text says how to get it."""


def find_etcd() -> str:
    """The path of etcd. Raises MissingProgram."""
    if path := shutil.which("etcd"):
        return path
    raise MissingProgram("etcd is not installed: apt-get install etcd-server, and stop its service")


def install_patroni(folder: Path, account: SystemAccount) -> list[str]:
    """Install Patroni in a folder; returns the command that runs it. The account must be able to enter its Python.

    Raises MissingProgram.
    """
    candidates = (Path(sys.executable).resolve(), Path("/usr/bin/python3"), Path("/usr/local/bin/python3"))
    python = next((path for path in candidates if path.exists() and account.can_enter(path)), None)
    if python is None:
        raise MissingProgram(
            f"Patroni would run as {account.name}, which can enter none of the Pythons of this machine"
        )
    if uv := shutil.which("uv"):
        steps = [
            [uv, "venv", "--quiet", "--clear", "--python", str(python), str(folder / "patroni")],
            [uv, "pip", "install", "--quiet", "--python", str(folder / "patroni" / "bin" / "python"), PATRONI],
        ]
    else:
        steps = [
            [str(python), "-m", "venv", str(folder / "patroni")],
            [str(folder / "patroni" / "bin" / "pip"), "install", "--quiet", PATRONI],
        ]
    for step in steps:
        done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingProgram(f"Patroni can't be installed: {done.stderr.strip()[-1000:]}")
    return [str(folder / "patroni" / "bin" / "patroni")]
