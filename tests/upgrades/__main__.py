"""`python -m tests.upgrades`: dumps of this version, and upgrades of running processes.

dump FOLDER             a populated database of this version, for the tests of later ones
roll --from REVISION    that revision's processes are replaced by this version's, and back, under traffic
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import psycopg

from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from tests.bench.databases import ROOT
from tests.bench.revisions import checked_out
from tests.support.payments import violations
from tests.upgrades.dumps import write_dump
from tests.upgrades.population import populate
from tests.upgrades.rolling import COUNTED, Version, roll


@click.group()
def upgrades() -> None:
    """Upgrades of populated databases."""


@upgrades.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def dump(folder: Path) -> None:
    """Write dump.sql of a populated database of this version into FOLDER."""
    with EmbeddedServer(settings={"autovacuum": "off"}) as server, temporary_database(server.url, "surety_test") as url:
        deploy(url)
        with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
            populate(conn)
            if found := violations(conn):
                raise click.ClickException(f"the database violates invariants: {found}")
            [(count,)] = conn.execute("select count(*) from surety.payments").fetchall()
        write_dump(url, folder / "dump.sql")
    click.echo(f"{folder / 'dump.sql'}: {count} payments")


@upgrades.command("roll")
@click.option("--from", "revision", required=True, help="The revision that runs first: a tag, a commit.")
@click.option("--payments", default=100, show_default=True, type=click.IntRange(1), help="In each of six phases.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON, on one line.")
def roll_back_and_forth(revision: str, payments: int, *, as_json: bool) -> None:
    """Replace the processes of a revision by this version's, and back, under traffic. Exit 1: something failed."""
    with checked_out(revision) as folder, tempfile.TemporaryDirectory() as logs:
        old = Version("old", folder, str(folder / ".venv/bin/python"))
        result = roll(old, Version("new", ROOT, sys.executable), Path(logs), payments=payments)
    result["old"] = revision
    click.echo(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    if any(result[name] for name in COUNTED):
        raise SystemExit(1)


if __name__ == "__main__":
    upgrades()
