"""`surety deploy`."""

from __future__ import annotations

import click
from rich.console import Console

from app.wording import describe_mode
from db.connect import connect
from db.deploy.deploy import deploy as deploy_to
from db.settings import load_settings


@click.command()
@click.option("--force", is_flag=True, help="Write functions, views and triggers again, even if nothing changed.")
def deploy(force: bool) -> None:
    """Bring the database of DATABASE_URL to this version: safe to repeat, to race and to run beside traffic."""
    progress = Console(stderr=True, highlight=False)
    settings = load_settings()
    done = deploy_to(settings.require("database_url").reveal(), force=force, say=progress.print)
    console = Console(highlight=False)
    parts = {
        "migrated": done.migrations,
        "wrote anew": [] if done.outcome == "created" else done.written,
        "dropped": done.dropped,
    }
    for what, names in parts.items():
        if names:
            console.print(f"{what} {', '.join(names)}")
    console.print(
        f"{done.outcome} in {done.seconds:.2f} s" + (f", {done.attempts} attempts" if done.attempts > 1 else "")
    )
    with connect("deploy", settings) as conn:
        [(livemode,)] = conn.execute("select surety.read_livemode()").fetchall()
    console.print(f"mode {describe_mode(livemode)}")
